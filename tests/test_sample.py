"""sample.py as a user runs it: prompts in, text out, and a sentence for what can't be."""
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, refused, run, run_here, succeeded

from model import GPT, GPTConfig
from plaingpt.formats import peft_adapter
from plaingpt.inference import engine, window
from plaingpt.training import checkpoints, lora, starting_weights

CHARS = list('\n abcdefgh')


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    """A checkpoint of random weights whose model has 30 tokens, 20 more than its tokenizer; there is no data set."""
    folder = tmp_path_factory.mktemp('sample') / 'out'
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=8))
    checkpoints.save(str(folder), {'model': model.state_dict(), 'optimizer': {}, 'model_args': asdict(model.config),
                                  'iter_num': 7, 'best_val_loss': 1.0, 'config': {'dataset': 'gone'},
                                  'tokenizer': {'kind': 'char', 'chars': CHARS}}, ['last', 'ckpt'])
    return folder


def sample(folder, **keys):
    return run_here('sample.py', **{'out_dir': folder, 'device': 'cpu', 'max_new_tokens': 40, 'num_samples': 3, **keys})


def samples(out_dir, **keys):
    return succeeded(sample(out_dir, **keys)).split('\n---------------\n')[:-1]


def test_samples_begin_with_the_prompt_and_hold_only_what_the_tokenizer_knows(out_dir):
    texts = samples(out_dir, start='ab')
    assert len(texts) == 3 and len(set(texts)) == 3
    for text in texts:
        assert text.startswith('ab') and len(text) == 42 and set(text) <= set(CHARS)


def test_the_seed_decides_the_text(out_dir):
    assert samples(out_dir) == samples(out_dir) != samples(out_dir, seed=1)


@pytest.mark.parametrize('keys', [dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(min_p=1)])
def test_greedy_samples_are_alike(out_dir, keys):
    assert len(set(samples(out_dir, **keys))) == 1


@pytest.mark.parametrize('keys', [dict(top_k='None'), dict(top_k=0), dict(top_k=1000), dict(top_p='None'),
                                  dict(min_p='None'), dict(min_p=0), dict(repetition_penalty=1), dict(stride='None')])
def test_switched_off_filters_change_nothing(out_dir, keys):
    assert samples(out_dir, **keys) == samples(out_dir)


@pytest.mark.parametrize('keys', [dict(top_k=3), dict(top_p=0.5), dict(min_p=0.9), dict(repetition_penalty=5),
                                  dict(stride=8), dict(temperature=1.5)])
def test_what_decides_the_choice_of_tokens_changes_the_text(out_dir, keys):
    texts = samples(out_dir, **keys)
    assert texts != samples(out_dir) and all(len(text) == 41 for text in texts)


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize('number', [0, 2])
def test_a_completion_ends_before_the_text_to_stop_at(out_dir, tmp_path, monkeypatch, number):
    free = samples(out_dir, start='ab')
    stop = free[number][20:23]
    cut = [text[2:].partition(stop)[0] for text in free]
    assert len(cut[number]) < 20 and 40 in map(len, cut)
    assert samples(out_dir, start='ab', stop=stop) == ['ab' + text for text in cut]
    (tmp_path / 'prompts.jsonl').write_text('{"prompt": "ab"}', encoding='utf-8')
    succeeded(sample(out_dir, prompts=tmp_path / 'prompts.jsonl', output=tmp_path / 'output.jsonl', stop=stop))
    assert json.loads((tmp_path / 'output.jsonl').read_text(encoding='utf-8'))['completions'] == cut
    monkeypatch.setattr(io, 'TextIOWrapper', Terminal)
    assert samples(out_dir, start='ab', stop=stop) == ['ab' + text for text in cut]


def test_generation_ends_when_all_completions_do(out_dir, monkeypatch):
    texts, steps = [text[1:] for text in samples(out_dir)], []
    stop = min(set.intersection(*map(set, texts)))
    monkeypatch.setattr(window.Window, 'append', lambda window, chosen, append=window.Window.append:
                        steps.append(1) or append(window, chosen))
    assert samples(out_dir, stop=stop) == ['\n' + text.partition(stop)[0] for text in texts]
    assert len(steps) == max(text.index(stop) for text in texts) < 39


@pytest.mark.parametrize('room, alone, together', [(0, 3, 9), (8000, 2, 6), (20_000, 1, 3), (25_000, 1, 2)])
def test_the_text_does_not_depend_on_what_is_computed_at_once(out_dir, tmp_path, monkeypatch, room, alone, together):
    prompts, output, batches = tmp_path / 'prompts.jsonl', tmp_path / 'output.jsonl', []
    prompts.write_text('{"prompt": "a"}\n{"prompt": "bad cafe bad"}\n{"prompt": "cab"}', encoding='utf-8')

    def texts():
        succeeded(sample(out_dir, prompts=prompts, output=output))
        return samples(out_dir, start='ab'), output.read_text(encoding='utf-8')

    expected = texts()
    monkeypatch.setattr('plaingpt.system.devices.room_for_batch', lambda device: room)
    monkeypatch.setattr('plaingpt.inference.engine.stream', lambda *arguments, stream=engine.stream, **keys:
                        batches.append(1) or stream(*arguments, **keys))
    assert texts() == expected and len(batches) == alone + together
    assert len({text for line in expected[1].splitlines() for text in json.loads(line)['completions']}) == 9


def test_the_prompt_may_be_a_file_and_longer_than_the_context(out_dir, tmp_path):
    (tmp_path / 'prompt.txt').write_text('abc\n' * 10, encoding='utf-8')
    texts = samples(out_dir, start=f'FILE:{tmp_path / "prompt.txt"}', max_new_tokens=0)
    assert texts == ['abc\n' * 10] * 3


def test_many_prompts_from_a_file_into_a_file(out_dir, tmp_path):
    prompts, output = tmp_path / 'prompts.jsonl', tmp_path / 'completions.jsonl'
    prompts.write_text('{"prompt": "a"}\n\n{"prompt": "bad cafe"}\n', encoding='utf-8')
    succeeded(sample(out_dir, prompts=prompts, output=output, num_samples=2))
    lines = [json.loads(line) for line in output.read_text(encoding='utf-8').splitlines()]
    assert [line['prompt'] for line in lines] == ['a', 'bad cafe']
    assert all(len(line['completions']) == 2 and len(line['completions'][0]) == 40 for line in lines)
    assert sorted(os.listdir(tmp_path)) == ['completions.jsonl', 'prompts.jsonl']


def test_a_terminal_shows_the_same_text_as_a_pipe(out_dir):
    pty = pytest.importorskip('pty')
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / 'sample.py', f'--out_dir={out_dir}', '--device=cpu',
                                '--max_new_tokens=40', '--num_samples=3'], stdout=follower, stderr=subprocess.DEVNULL)
    os.close(follower)
    pieces = []
    while True:
        try:
            piece = os.read(leader, 1000)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(leader)
    assert process.wait() == 0 and len(pieces) > 5  # it came bit by bit
    shown = b''.join(pieces).decode().replace('\r\n', '\n')
    assert shown.split('\n---------------\n')[:-1] == samples(out_dir)


@pytest.mark.parametrize('keys, sentence', [
    (dict(start='abcX'), "the character 'X' (U+0058) is not among the 10"),
    (dict(start=''), 'the prompt has no tokens'),
    (dict(start='FILE:nowhere.txt'), "nowhere.txt' cannot be read"),
    (dict(temperature=-1), 'temperature=-1.0: must be >= 0'),
    (dict(temperature='nan'), 'temperature=nan'),
    (dict(num_samples=0), 'num_samples=0: must be in [1, 1000000]'),
    (dict(top_p=2), 'top_p=2.0'),
    (dict(min_p=2), 'min_p=2.0: must be in [0, 1]'),
    (dict(repetition_penalty=0), 'repetition_penalty=0.0: must be > 0'),
    (dict(stride=0), 'stride=0: must be >= 1'),
    (dict(stride=9), 'stride=9 must be at least 1 and at most the context_size'),
    (dict(context_size=9), 'context_size=9 must be at least 1, and at most block_size=8'),
    (dict(context_size=0), 'context_size=0: must be >= 1'),
    (dict(context_size=4, stride=5), 'stride=5 must be at least 1 and at most the context_size'),
    (dict(prompts='p.jsonl'), 'prompts and output go together'),
    (dict(merge=__file__), 'is for a checkpoint: name a folder'),
    (dict(merge='m', prompts='p', output='o'), 'merge=m is for a checkpoint: name a folder, and leave out prompts'),
    (dict(merge=f'{__file__}/m'), 'out_dir cannot be written'),
    (dict(adapter='nowhere'), 'nowhere/adapter_config.json not found'),
    (dict(init_from=__file__), 'is not a checkpoint that can be read safely'),
    (dict(init_from='no/ckpt.pt'), 'no/ckpt.pt not found'),
    (dict(init_from=ROOT / 'docs'), 'docs has neither the ckpt.pt or last.pt of a run nor the config.json'),
    (dict(out_dir='nowhere'), 'nowhere holds no checkpoint'),
    (dict(init_from='gtp2'), 'gtp2 cannot be loaded as a GPT-2'),
    (dict(device='tpu'), "device='tpu'"),
])
def test_what_cannot_be_sampled_is_said_in_one_sentence(out_dir, keys, sentence):
    assert sentence in refused(sample(out_dir, **keys))


def test_no_prompt_is_completed_when_one_cannot_be(out_dir, tmp_path):
    (tmp_path / 'prompts.jsonl').write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}', encoding='utf-8')
    ended = sample(out_dir, prompts=tmp_path / 'prompts.jsonl', output=tmp_path / 'out.jsonl')
    assert '(U+D800) is not among the 10' in refused(ended)
    assert os.listdir(tmp_path) == ['prompts.jsonl']


@pytest.mark.parametrize('line', ['{"prompt": ""}', '{"prompt": 3}', '["prompt"]', 'prompt', '{}'])
def test_a_broken_line_of_prompts_is_named(out_dir, tmp_path, line):
    (tmp_path / 'prompts.jsonl').write_text('{"prompt": "a"}\n' + line, encoding='utf-8')
    ended = sample(out_dir, prompts=tmp_path / 'prompts.jsonl', output=tmp_path / 'out.jsonl')
    assert 'prompts.jsonl, line 2' in refused(ended)
    assert not (tmp_path / 'out.jsonl').exists()


@pytest.mark.slow
def test_compiled_samples_are_the_eager_ones(out_dir):
    compiled = sample(out_dir, compile=True, temperature=0)
    assert succeeded(compiled).split('\n---------------\n')[:-1] == samples(out_dir, temperature=0)
    assert 'torch.compile failed' not in compiled.stderr


@pytest.mark.slow
def test_without_a_network_a_published_model_is_refused_in_one_line(tmp_path):
    ended = run('sample.py', init_from='gpt2', env={'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': 'http://127.0.0.1:9',
                                                    'HF_HOME': str(tmp_path)})
    assert refused(ended) == ended.stderr.strip()
    assert 'gpt2 cannot be loaded as a GPT-2' in ended.stderr


@pytest.mark.skipif(not hasattr(signal, 'SIGPIPE'), reason='Windows has none')
def test_a_script_run_here_leaves_the_signals_as_they_were(out_dir):
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    assert samples(out_dir) and signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN


# ---- a window of another size ----

def test_a_model_sees_as_much_as_it_is_told(out_dir):
    free = samples(out_dir, start='abcdefgh', stride=1)
    assert samples(out_dir, start='abcdefgh', stride=1, context_size=8) == free
    short, same = ([text[8:] for text in samples(out_dir, start=start, stride=1, context_size=2)]
                   for start in ('abcdefgh', 'aaaaaagh'))
    assert short == same != [text[8:] for text in free]


@pytest.fixture(scope='module')
def rope_dir(tmp_path_factory):
    """The same for a model that has no end, with keys and values of one head in four."""
    return save_run(tmp_path_factory.mktemp('rope'), random_gpt(position='rope', n_head=4, n_kv_head=1, n_embd=8))


def test_without_learned_positions_it_may_see_more_than_it_was_trained_with(rope_dir):
    texts = {size: samples(rope_dir, context_size=size) for size in ('None', 8, 41, 1000)}
    assert texts['None'] == texts[8] != texts[41] == texts[1000]


@pytest.mark.parametrize('keys, bytes_a_row', [  # 8 n_layer n_kv_head hs + 40 n_embd a position, 20 a token
    ({}, 8 * (8 * 2 + 40 * 8) + 20 * 30), (dict(context_size=4), 4 * 336 + 600),
    (dict(context_size=30), 30 * 336 + 600), (dict(context_size=50), 41 * 336 + 600)])
def test_what_is_computed_at_once_fits_the_memory(rope_dir, monkeypatch, keys, bytes_a_row):
    rows = []
    monkeypatch.setattr('plaingpt.inference.engine.stream', lambda *arguments, stream=engine.stream, **keys:
                        rows.append(keys['num_samples']) or stream(*arguments, **keys))
    for room, expected in (bytes_a_row * 3 - 1, [2, 1]), (bytes_a_row * 3, [3]):
        rows.clear()
        monkeypatch.setattr('plaingpt.system.devices.room_for_batch', lambda device, room=room: room)
        samples(rope_dir, **keys)
        assert rows == expected


# ---- adapters, and what else a model is read from ----

def random_gpt(**shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=8), **shape}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def save_run(folder, gpt, **entries):
    checkpoints.save(str(folder), {
        'model': gpt.state_dict(), 'optimizer': {}, 'model_args': asdict(gpt.config), 'iter_num': 7,
        'best_val_loss': 1.0, 'config': {'dataset': 'gone'}, 'tokenizer': {'kind': 'char', 'chars': CHARS}, **entries},
        ['ckpt'])
    return folder


def save_gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=30, bos_token_id=0,
                                       eos_token_id=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def adapted(base):
    """(the GPT in base with an adapter whose B is not 0, the digest without it)."""
    torch.manual_seed(0)
    gpt, _ = starting_weights.open_base(str(base))
    digest = lora.digest_of_base(gpt)
    lora.add_lora(gpt, 2, 20, 0.1, 'c_attn,c_proj')
    for name, tensor in lora.adapter_state(gpt).items():
        if 'lora_B' in name:
            torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(1))
    return gpt, digest


@pytest.fixture(params=['run', 'gpt2'])
def adapter(request, tmp_path):
    """(folder of an adapter, that of its base)."""
    base = save_run(tmp_path / 'base', random_gpt()) if request.param == 'run' else save_gpt2(tmp_path / 'base')
    gpt, digest = adapted(base)
    settings = lora.LoraSettings(2, 20, 0.1, 'c_attn,c_proj', str(base), digest)
    peft_adapter.save_adapter(tmp_path / 'adapter', gpt, settings, {'kind': 'char', 'chars': CHARS})
    return tmp_path / 'adapter', base


def test_an_adapter_writes_the_text_of_the_model_it_is_merged_into(adapter, tmp_path):
    folder, base = adapter
    keys = dict(temperature=0, num_samples=1, start='abc', dtype='float32', repetition_penalty=3)
    found = samples(tmp_path, adapter=folder, **keys)
    (gpt, _), (plain, _) = adapted(base), starting_weights.open_base(str(base))
    expected, other = (''.join(CHARS[i] for i in model.eval().generate(
        torch.tensor([[CHARS.index(char) for char in 'abc']]), 40, temperature=0, vocab_size=len(CHARS),
        repetition_penalty=3)[0]) for model in (gpt, plain))
    assert found == [expected] != [other] and len(set(expected)) > 3
    assert 'python sample.py --out_dir=' in succeeded(sample(tmp_path, adapter=folder, merge=tmp_path / 'merged'))
    assert samples(tmp_path / 'merged', **keys) == found
    saved = torch.load(tmp_path / 'merged' / 'ckpt.pt')
    assert saved['model'].keys() == plain.state_dict().keys() and (saved['iter_num'], saved['optimizer']) == (0, {})
    assert saved['tokenizer'] == {'kind': 'char', 'chars': CHARS} and 'lora' not in saved
    assert samples(tmp_path, init_from=tmp_path / 'merged', **keys) == found


def test_an_adapter_finds_its_base_where_it_is_now(adapter, tmp_path):
    folder, base = adapter
    found = samples(tmp_path, adapter=folder)
    base.rename(tmp_path / 'moved')
    assert 'base' in refused(sample(tmp_path, adapter=folder))
    assert samples(tmp_path, adapter=folder, init_from=tmp_path / 'moved') == found


def test_an_adapter_of_other_weights_is_refused(adapter, tmp_path):
    folder, _ = adapter
    other = save_run(tmp_path / 'other', random_gpt(bias=False))
    ended = refused(sample(tmp_path, adapter=folder, init_from=other))
    assert 'belongs to other weights than' in ended and str(other) in ended
    assert 'belongs to other weights' in refused(sample(other, adapter=folder, init_from='resume'))


def test_an_adapter_that_names_no_base_asks_for_one(adapter, tmp_path):
    folder, base = adapter
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | {'base_model_name_or_path': None}),
                    encoding='utf-8')
    assert 'does not name its base: give it with --init_from' in refused(sample(tmp_path, adapter=folder))
    samples(tmp_path, adapter=folder, init_from=base)
    path.write_text('{', encoding='utf-8')
    assert 'is not the folder of a LoRA adapter that can be used' in refused(sample(tmp_path, adapter=folder))


@pytest.fixture
def lora_run(tmp_path):
    """(folder of a LoRA run, as train.py will leave it, and of its base; a function that saves it with changes)."""
    base = save_run(tmp_path / 'base', random_gpt())
    gpt, digest = adapted(base)
    settings = {'rank': 2, 'alpha': 20, 'dropout': 0.1, 'targets': 'c_attn,c_proj', 'base': str(base),
            'base_digest': digest}
    peft_adapter.save_adapter(tmp_path / 'adapter', gpt, lora.LoraSettings(**settings))

    def save(settings=settings, args=(), **changes):
        return save_run(tmp_path / 'run', gpt, model=lora.adapter_state(gpt), lora=settings | changes,
                        model_args=asdict(gpt.config) | dict(args))
    return save(), base, save


def test_a_lora_run_is_sampled_and_merged(lora_run, tmp_path):
    folder, base, _ = lora_run
    found = samples(folder)
    assert found == samples(tmp_path, adapter=tmp_path / 'adapter') == samples(tmp_path, init_from=folder)
    assert found != samples(base)
    merged = sample(folder, merge=folder)
    assert succeeded(merged) and f'which is now in {folder}{os.sep}replaced' in merged.stderr
    assert samples(folder) == found and 'lora' not in torch.load(folder / 'ckpt.pt')
    (base / 'ckpt.pt').unlink()
    assert 'has neither the ckpt.pt' in refused(sample(folder / 'replaced' / '1'))


@pytest.mark.parametrize('changes, sentence', [
    (dict(rank=0), 'has rank=0'), (dict(rank=3), 'is (2, 8), expected (3, 8)'), (dict(alpha=None), 'has alpha=None'),
    (dict(targets='c_fc'), 'do not belong to this adapter'), (dict(targets='no'), "'no' is no layer"),
    (dict(base=None), 'has base=None'), (dict(base_digest='x'), 'belongs to other weights than'),
    (dict(base='gtp2'), 'gtp2 cannot be loaded'), (dict(args={'n_head': 2}), 'has another n_head than'),
    (dict(args={'block_size': 9}), 'block_size=9: this model takes at most 8 positions')])
def test_a_lora_run_whose_settings_are_wrong_is_refused(lora_run, changes, sentence):
    folder, _, save = lora_run
    save(**changes)
    assert sentence in refused(sample(folder)) and str(folder) in refused(sample(folder))


def test_a_plain_model_is_written_as_a_checkpoint(out_dir, tmp_path):
    succeeded(sample(out_dir, merge=tmp_path / 'copy'))
    assert samples(tmp_path / 'copy') == samples(out_dir) == samples(tmp_path, init_from=out_dir / 'last.pt')
    before, after = (torch.load(folder / 'ckpt.pt') for folder in (out_dir, tmp_path / 'copy'))
    assert set(before) == set(after) and after['config'] == {'dataset': 'gone'}
    assert all(torch.equal(before['model'][name], tensor) for name, tensor in after['model'].items())
