"""sample.py as a user runs it: prompts in, text out, and one sentence for what can't be sampled."""
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, refused, run, succeeded, tiny_gpt
from fine_tuning import save_gpt2, save_run
from generating import CHARS, SHAPE, TOKENIZER, lively_gpt, sample, samples, split_samples

from plaingpt.inference import engine, window


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    """A run with random weights; its data set no longer exists."""
    folder = tmp_path_factory.mktemp('sample') / 'out'
    return save_run(folder, tiny_gpt(**SHAPE), config={'dataset': 'gone'}, tokenizer=TOKENIZER)


@pytest.fixture
def prompts_file(tmp_path):
    """write(text) -> the path of a file of prompts with this content."""
    def write(text):
        path = tmp_path / 'prompts.jsonl'
        path.write_text(text, encoding='utf-8')
        return path
    return write


def read_completions(path):
    """The lines of a file of completions, as dicts."""
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


# ---- text ----

def test_samples_begin_with_the_prompt_and_use_only_the_tokens_of_the_tokenizer(out_dir):
    texts = samples(out_dir, start='ab')
    assert len(texts) == len(set(texts)) == 3
    for text in texts:
        assert text.startswith('ab')
        assert len(text) == 42
        assert set(text) <= set(CHARS)


def test_the_seed_decides_the_text(out_dir):
    assert samples(out_dir) == samples(out_dir)
    assert samples(out_dir) != samples(out_dir, seed=1)


@pytest.mark.parametrize('keys', [
    dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(min_p=1)])
def test_greedy_samples_are_equal(out_dir, keys):
    assert len(set(samples(out_dir, **keys))) == 1


@pytest.mark.parametrize('keys', [
    dict(top_k='None'), dict(top_k=0), dict(top_k=1000), dict(top_p='None'), dict(min_p='None'),
    dict(min_p=0), dict(repetition_penalty=1), dict(stride='None')])
def test_options_that_are_switched_off_change_nothing(out_dir, keys):
    assert samples(out_dir, **keys) == samples(out_dir)


@pytest.mark.parametrize('keys', [
    dict(top_k=3), dict(top_p=0.5), dict(min_p=0.9), dict(repetition_penalty=5), dict(stride=8),
    dict(temperature=1.5)])
def test_options_that_decide_the_choice_of_tokens_change_the_text(out_dir, keys):
    texts = samples(out_dir, **keys)
    assert texts != samples(out_dir)
    assert [len(text) for text in texts] == [41, 41, 41]


def test_the_prompt_may_be_in_a_file_and_longer_than_the_context(out_dir, tmp_path):
    path = tmp_path / 'prompt.txt'
    path.write_text('abc\n' * 10, encoding='utf-8')
    assert samples(out_dir, start=f'FILE:{path}', max_new_tokens=0) == ['abc\n' * 10] * 3


def test_a_file_of_prompts_becomes_a_file_of_completions(out_dir, tmp_path, prompts_file):
    prompts = prompts_file('{"prompt": "a"}\n\n{"prompt": "bad cafe"}\n')
    output = tmp_path / 'completions.jsonl'
    succeeded(sample(out_dir, prompts=prompts, output=output, num_samples=2))
    lines = read_completions(output)
    assert [line['prompt'] for line in lines] == ['a', 'bad cafe']
    for line in lines:
        assert [len(completion) for completion in line['completions']] == [40, 40]
    assert sorted(os.listdir(tmp_path)) == ['completions.jsonl', 'prompts.jsonl']


# ---- text to stop at ----

class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize('number', [0, 2])
def test_a_completion_ends_before_the_text_to_stop_at(
        out_dir, tmp_path, prompts_file, monkeypatch, number):
    free = samples(out_dir, start='ab')
    stop = free[number][20:23]
    cut = [text[2:].partition(stop)[0] for text in free]
    assert len(cut[number]) < 20  # the text to stop at comes in this sample,
    assert 40 in [len(text) for text in cut]  # but not in all
    expected = ['ab' + text for text in cut]
    assert samples(out_dir, start='ab', stop=stop) == expected

    output = tmp_path / 'output.jsonl'
    prompts = prompts_file('{"prompt": "ab"}')
    succeeded(sample(out_dir, prompts=prompts, output=output, stop=stop))
    assert read_completions(output) == [{'prompt': 'ab', 'completions': cut}]

    # On a terminal, where the text appears piece by piece.
    monkeypatch.setattr(io, 'TextIOWrapper', Terminal)
    assert samples(out_dir, start='ab', stop=stop) == expected


def test_generation_ends_once_all_completions_have_ended(out_dir, monkeypatch):
    completions = [text.removeprefix('\n') for text in samples(out_dir)]
    in_all = set.intersection(*[set(completion) for completion in completions])
    stop = min(in_all)
    steps = []

    def counted(self, original=window.Window.count_token):
        steps.append(1)
        return original(self)

    monkeypatch.setattr(window.Window, 'count_token', counted)
    expected = ['\n' + completion.partition(stop)[0] for completion in completions]
    assert samples(out_dir, stop=stop) == expected
    assert len(steps) == 1 + max(completion.index(stop) for completion in completions)
    assert len(steps) < 40


# ---- terminals ----

def read_until_closed(descriptor):
    """The pieces that arrive at a terminal, as bytes, until its other end is closed."""
    pieces = []
    while True:
        try:
            piece = os.read(descriptor, 1000)
        except OSError:  # how Linux reports the end
            return pieces
        if not piece:
            return pieces
        pieces.append(piece)


def test_a_terminal_shows_the_same_text_as_a_pipe_but_bit_by_bit(out_dir):
    pty = pytest.importorskip('pty')
    leader, follower = pty.openpty()
    command = [sys.executable, ROOT / 'sample.py', f'--out_dir={out_dir}', '--device=cpu',
               '--max_new_tokens=40', '--num_samples=3']
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL)
    os.close(follower)
    pieces = read_until_closed(leader)
    os.close(leader)
    assert process.wait() == 0
    assert len(pieces) > 5
    shown = b''.join(pieces).decode().replace('\r\n', '\n')
    assert split_samples(shown) == samples(out_dir)


@pytest.mark.skipif(not hasattr(signal, 'SIGPIPE'), reason='Windows has no SIGPIPE')
def test_run_here_leaves_the_signals_of_the_tests_as_they_were(out_dir):
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    assert samples(out_dir)
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN


# ---- batches that fit the memory ----

@pytest.fixture
def batches(monkeypatch):
    """num_samples of each call of stream(), a list that grows with them."""
    calls = []

    def counted_stream(*arguments, original=engine.stream, **keys):
        calls.append(keys['num_samples'])
        return original(*arguments, **keys)

    monkeypatch.setattr(engine, 'stream', counted_stream)
    return calls


def limit_memory(monkeypatch, room):
    """Lets sample.py believe that a batch may take this number of bytes."""
    monkeypatch.setattr('plaingpt.system.devices.room_for_batch', lambda device: room)


@pytest.mark.parametrize('room, batches_of_text, batches_of_prompts', [
    (0, 3, 9),  # one row at a time
    (8000, 2, 6),
    (20_000, 1, 3),
    (25_000, 1, 2),
])
def test_the_text_does_not_depend_on_the_size_of_batches(
        out_dir, tmp_path, prompts_file, monkeypatch, batches, room, batches_of_text,
        batches_of_prompts):
    prompts = prompts_file('{"prompt": "a"}\n{"prompt": "bad cafe bad"}\n{"prompt": "cab"}')
    output = tmp_path / 'output.jsonl'

    def both_ways():
        succeeded(sample(out_dir, prompts=prompts, output=output))
        return samples(out_dir, start='ab'), output.read_text(encoding='utf-8')

    expected = both_ways()
    completions = set()
    for line in read_completions(output):
        completions.update(line['completions'])
    assert len(completions) == 9

    batches.clear()
    limit_memory(monkeypatch, room)
    assert both_ways() == expected
    assert len(batches) == batches_of_text + batches_of_prompts


@pytest.fixture(scope='module')
def rope_dir(tmp_path_factory):
    """A run without learned positions, whose four heads share one head of keys and values."""
    gpt = lively_gpt(**{**SHAPE, 'position': 'rope', 'n_head': 4, 'n_kv_head': 1})
    return save_run(tmp_path_factory.mktemp('rope'), gpt, tokenizer=TOKENIZER)


# What a row of rope_dir's model takes, as sample.py estimates it: for each position
# 8 n_layer n_kv_head hs + 40 n_embd bytes, and 20 for each token of the vocabulary.
POSITION_BYTES = 8 * 2 + 40 * 8
LOGITS_BYTES = 20 * 30


@pytest.mark.parametrize('keys, positions', [
    ({}, 8),  # block_size
    (dict(context_size=4), 4),
    (dict(context_size=30), 30),
    (dict(context_size=50), 41),  # the prompt and all new tokens
])
def test_a_batch_has_as_many_rows_as_fit_the_memory(
        rope_dir, monkeypatch, batches, keys, positions):
    row_bytes = positions * POSITION_BYTES + LOGITS_BYTES
    limit_memory(monkeypatch, 3 * row_bytes)
    samples(rope_dir, **keys)
    assert batches == [3]
    batches.clear()
    limit_memory(monkeypatch, 3 * row_bytes - 1)
    samples(rope_dir, **keys)
    assert batches == [2, 1]


# ---- context_size ----

def test_the_model_sees_no_more_than_context_size(out_dir):
    def completions(start, **keys):
        return [text.removeprefix(start) for text in samples(out_dir, start=start, **keys)]

    free = completions('abcdefgh', stride=1)
    assert completions('abcdefgh', stride=1, context_size=8) == free
    short = completions('abcdefgh', stride=1, context_size=2)
    assert short != free
    assert short == completions('aaaaaagh', stride=1, context_size=2)


def test_without_learned_positions_a_model_may_see_more_than_it_was_trained_with(rope_dir):
    by_default = samples(rope_dir)
    assert samples(rope_dir, context_size=8) == by_default
    everything = samples(rope_dir, context_size=41)
    assert everything != by_default
    assert samples(rope_dir, context_size=1000) == everything


# ---- refusals ----

@pytest.mark.parametrize('keys, sentence', [
    # Prompts.
    (dict(start='abcX'), "the character 'X' (U+0058) is not in this vocabulary of 10 "),
    (dict(start=''), 'the prompt has no tokens'),
    (dict(start='FILE:nowhere.txt'), "nowhere.txt' cannot be read"),
    (dict(prompts='p.jsonl'), 'prompts and output go together'),
    # How tokens are chosen.
    (dict(temperature=-1), 'temperature=-1.0: must be >= 0'),
    (dict(temperature='nan'), 'temperature=nan'),
    (dict(num_samples=0), 'num_samples=0: must be in [1, 1000000]'),
    (dict(top_p=2), 'top_p=2.0'),
    (dict(min_p=2), 'min_p=2.0: must be in [0, 1]'),
    (dict(repetition_penalty=0), 'repetition_penalty=0.0: must be > 0'),
    # The window.
    (dict(stride=0), 'stride=0: must be >= 1'),
    (dict(stride=9), 'stride=9 must be at least 1 and at most the context_size'),
    (dict(context_size=9), 'context_size=9 must be at least 1, and at most block_size=8'),
    (dict(context_size=0), 'context_size=0: must be >= 1'),
    (dict(context_size=4, stride=5), 'stride=5 must be at least 1 and at most the context_size'),
    # The model.
    (dict(out_dir='nowhere'), 'nowhere holds no checkpoint'),
    (dict(init_from='gtp2'), 'gtp2 cannot be loaded'),
    (dict(init_from='no/ckpt.pt'), 'no/ckpt.pt not found'),
    (dict(init_from=__file__), 'is not a checkpoint that can be read safely'),
    (dict(init_from=ROOT / 'docs'),
     'docs has neither the ckpt.pt or last.pt of a run nor the config.json'),
    (dict(adapter='nowhere'), 'nowhere/adapter_config.json not found'),
    (dict(device='tpu'), "device='tpu'"),
    # A checkpoint instead of text.
    (dict(merge=__file__), "test_sample.py' is a file: name a folder"),
    (dict(merge='\ud800'), r"merge='\ud800' cannot be the name of a folder"),
    (dict(merge='m', prompts='p', output='o'),
     'merge=m writes a checkpoint instead of text: leave out prompts'),
    (dict(merge=f'{__file__}/m'), 'out_dir cannot be written'),
])
def test_what_cannot_be_sampled_is_refused_in_one_sentence(out_dir, keys, sentence):
    assert sentence in refused(sample(out_dir, **keys))


def test_no_prompt_is_completed_if_one_of_them_cannot_be(out_dir, tmp_path, prompts_file):
    prompts = prompts_file('{"prompt": "a"}\n{"prompt": "\\ud800"}')
    ended = sample(out_dir, prompts=prompts, output=tmp_path / 'out.jsonl')
    assert '(U+D800) is not in this vocabulary of 10 ' in refused(ended)
    assert os.listdir(tmp_path) == ['prompts.jsonl']


@pytest.mark.parametrize('line', ['{"prompt": ""}', '{"prompt": 3}', '["prompt"]', 'prompt', '{}'])
def test_a_bad_line_of_prompts_is_named(out_dir, tmp_path, prompts_file, line):
    prompts = prompts_file('{"prompt": "a"}\n' + line)
    ended = sample(out_dir, prompts=prompts, output=tmp_path / 'out.jsonl')
    assert 'prompts.jsonl, line 2' in refused(ended)
    assert os.listdir(tmp_path) == ['prompts.jsonl']


def test_output_that_cannot_be_completed_leaves_the_old_file(
        out_dir, tmp_path, prompts_file, monkeypatch):
    output = tmp_path / 'out.jsonl'
    output.write_text('from before', encoding='utf-8')

    def failing_stream(*arguments, **keys):
        raise MemoryError

    monkeypatch.setattr(engine, 'stream', failing_stream)
    ended = sample(out_dir, prompts=prompts_file('{"prompt": "a"}'), output=output)
    assert 'not enough memory' in refused(ended)
    assert output.read_text(encoding='utf-8') == 'from before'
    assert sorted(os.listdir(tmp_path)) == ['out.jsonl', 'prompts.jsonl']


@pytest.mark.skipif(os.name != 'posix', reason='needs a Ctrl-C of POSIX')
def test_after_ctrl_c_no_unfinished_output_is_left(out_dir, tmp_path, prompts_file):
    prompts = prompts_file('{"prompt": "a"}')
    command = [sys.executable, ROOT / 'sample.py', f'--out_dir={out_dir}', '--device=cpu',
               '--num_samples=1', '--max_new_tokens=1000000', f'--prompts={prompts}',
               f'--output={tmp_path / "out.jsonl"}']
    # A shell's background job, as the tests may be, ignores Ctrl-C, and so do its children.
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=restore)
    while len(os.listdir(tmp_path)) < 2:  # until it writes
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert 'Traceback' not in stderr
    assert os.listdir(tmp_path) == ['prompts.jsonl']


def test_a_bug_in_the_engine_is_not_explained_as_a_mistake_of_the_user(out_dir, monkeypatch):
    def broken_stream(*arguments, **keys):
        raise ValueError('too many values to unpack')

    monkeypatch.setattr(engine, 'stream', broken_stream)
    with pytest.raises(ValueError, match='too many values to unpack'):
        sample(out_dir)


# ---- tokenizers of other programs ----

def test_a_hugging_face_model_writes_with_its_own_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models
    folder = tmp_path / 'gpt2'
    save_gpt2(folder, vocab_size=30)
    vocabulary = {chr(ord('A') + i): i for i in range(26)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.save(str(folder / 'tokenizer.json'))
    texts = samples(tmp_path, init_from=folder, start='AB')
    assert len(set(texts)) == 3
    for text in texts:
        assert text.startswith('A')
        assert set(text) <= set(vocabulary) | {' '}


def test_a_hugging_face_model_without_a_tokenizer_is_refused(tmp_path):
    save_gpt2(tmp_path / 'gpt2', vocab_size=30)
    ended = sample(tmp_path, init_from=tmp_path / 'gpt2')
    assert 'gpt2 has no tokenizer.json' in refused(ended)


def test_a_checkpoint_without_a_tokenizer_takes_that_of_its_data_set(
        tmp_path, named_data, text):
    chars = sorted(set(text))
    gpt = tiny_gpt(**{**SHAPE, 'vocab_size': len(chars)})
    save_run(tmp_path, gpt, config={'dataset': named_data})
    checkpoint = torch.load(tmp_path / 'ckpt.pt')
    del checkpoint['tokenizer']  # as nanoGPT has it
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    ended = sample(tmp_path, start='the')
    for sampled in split_samples(succeeded(ended)):
        assert sampled.startswith('the')
        assert set(sampled) <= set(chars)
    assert f'names no tokenizer: using that of {ROOT / "data" / named_data}' in ended.stderr


# ---- slow ----

@pytest.mark.slow
def test_compiled_samples_are_equal_to_the_eager_ones(out_dir):
    compiled = sample(out_dir, compile=True, temperature=0)
    assert split_samples(succeeded(compiled)) == samples(out_dir, temperature=0)
    assert 'torch.compile failed' not in compiled.stderr


@pytest.mark.slow
def test_without_a_network_a_published_model_is_refused_in_one_line(tmp_path):
    environment = {'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': 'http://127.0.0.1:9',
                   'HF_HOME': str(tmp_path)}
    ended = run('sample.py', init_from='gpt2', env=environment)
    assert refused(ended) == ended.stderr.strip()
    assert 'gpt2 cannot be loaded' in ended.stderr
