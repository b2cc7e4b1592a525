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

import generation

CHARS = list('\n abcdefgh')


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    """A checkpoint of random weights whose model has 30 tokens, 20 more than its tokenizer; there is no data set."""
    import checkpoint
    from model import GPT, GPTConfig
    folder = tmp_path_factory.mktemp('sample') / 'out'
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save(str(folder), {'model': model.state_dict(), 'optimizer': {}, 'model_args': asdict(model.config),
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
    monkeypatch.setattr(generation.Window, 'append', lambda window, chosen, append=generation.Window.append:
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
    monkeypatch.setattr('runtime.room_for_batch', lambda device: room)
    monkeypatch.setattr('generation.stream', lambda *arguments, stream=generation.stream, **keys:
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
    (dict(temperature=-1), 'temperature=-1.0: allowed is >= 0'),
    (dict(temperature='nan'), 'temperature=nan'),
    (dict(num_samples=0), 'num_samples=0: allowed is [1, 1000000]'),
    (dict(top_p=2), 'top_p=2.0'),
    (dict(min_p=2), 'min_p=2.0: allowed is [0, 1]'),
    (dict(repetition_penalty=0), 'repetition_penalty=0.0: allowed is > 0'),
    (dict(stride=0), 'stride=0: allowed is >= 1'),
    (dict(stride=9), 'stride=9 must be at least 1 and at most the block_size'),
    (dict(prompts='p.jsonl'), 'prompts and output go together'),
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
