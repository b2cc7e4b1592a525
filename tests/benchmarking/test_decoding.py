"""The programs that write texts for bench.py, and how their times are kept."""
import os

import pytest
import torch
from conftest import tiny_gpt, tiny_ids

from model import GPT, GPTConfig
from plaingpt.benchmarking import decoding
from plaingpt.benchmarking.decoding import Writer, Written
from plaingpt.benchmarking.llama_cpp_process import LlamaCppProcess
from plaingpt.system.messages import UserError

CPU = torch.device('cpu')
CONFIG = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32, bias=False)


def test_writers_return_how_many_texts_they_have_written():
    prompt = tiny_ids(1, 3)
    assert decoding.nanogpt_writer(CONFIG, CPU, 'float32')(prompt, 2) == Written(1)
    assert decoding.transformers_writer(CONFIG, 5, CPU, 'float32')(prompt, 2) == Written(5)


def test_our_writer_continues_each_prompt_and_tells_when_the_first_token_was_there(monkeypatch):
    now = []
    monkeypatch.setattr(decoding.time, 'perf_counter', lambda: sum(now))

    def stream(gpt, prompts, new_tokens, *arguments, num_samples, seeds):
        assert prompts.shape == (2, 3) and list(seeds) == list(range(2 * num_samples))
        for number in range(new_tokens):
            now.append(7.0 if number == 0 else 1.0)
            yield None

    monkeypatch.setattr(decoding.engine, 'stream', stream)
    write = decoding.our_writer(tiny_gpt(), samples=3)
    assert write(tiny_ids(2, 3), 5) == Written(6, reading=7.0, writing=4.0)


def test_the_parts_of_timed_texts_are_kept_and_those_of_others_are_not():
    seconds = iter([(50.0, 60.0), (2.0, 8.0), (4.0, 16.0), (3.0, 4.0)])
    asked = []

    def write(prompts, new_tokens):
        asked.append((tuple(prompts.shape), new_tokens))
        return Written(2, *next(seconds))

    writer = Writer('ours', write, tiny_ids(2, 6), 5)
    writer.warm_up(1)
    for number in 1, 2, 3:
        writer.time(number)
    assert asked == [((2, 6), 5)] * 4
    assert writer.tokens == 2 * 5
    assert writer.reading.seconds == [2.0, 4.0, 3.0]
    figures = writer.figures()
    assert figures['reading_tokens_per_s'] == 2 * 6 / 3.0
    assert figures['writing_tokens_per_s'] == 2 * 4 / 8.0


@pytest.mark.parametrize('new_tokens, tried', [(1, 1), (2, 2), (5, 2)])
def test_a_trial_is_no_longer_than_the_texts(new_tokens, tried):
    asked = []
    writer = Writer('ours', lambda *request: asked.append(request), tiny_ids(3, 6), new_tokens)
    writer.trial()
    (prompts, tokens), = asked
    assert prompts.shape == (3, 1) and tokens == tried


@pytest.mark.parametrize('written, new_tokens, parts', [
    (Written(1), 5, []), (Written(1, 2.0, 0.0), 1, ['reading'])])
def test_parts_that_a_program_does_not_tell_or_have_are_left_out(written, new_tokens, parts):
    writer = Writer('ours', lambda prompts, new_tokens: written, tiny_ids(1, 6), new_tokens)
    writer.time(0)
    assert list(writer.parts()) == parts
    assert [name for name in writer.figures() if name.startswith(('reading', 'writing'))] == [
        f'{part}_tokens_per_s' for part in parts]


# ---- llama.cpp ----

def test_llama_cpp_writes_all_texts_and_leaves_no_file(tmp_path, monkeypatch):
    pytest.importorskip('xllamacpp')
    monkeypatch.setattr(decoding.tempfile, 'tempdir', str(tmp_path))
    prompts = tiny_ids(3, 6)
    write = decoding.llama_cpp_writer(GPT(CONFIG), prompts, 10, 'q4_0')
    assert os.listdir(tmp_path) == []
    assert write(prompts, 10) == Written(3)
    alone = write(prompts[:1], 10)
    assert alone.texts == 1
    assert alone.reading > 0 and alone.writing > 0


def test_a_text_that_has_no_room_is_an_error_not_a_shorter_text():
    pytest.importorskip('xllamacpp')
    write = decoding.llama_cpp_writer(GPT(CONFIG), tiny_ids(1, 6), 10, 'f32')
    with pytest.raises(UserError, match='llama.cpp has read 6 and written 10 tokens'):
        write(tiny_ids(1, 6), 30)


@pytest.mark.parametrize('vocab_size', [1, 31, 100, 50257, 50304])
def test_a_stand_in_tokenizer_has_as_many_tokens_as_the_model(vocab_size):
    meta = decoding.stand_in_tokenizer(vocab_size)
    tokens = 50257 if meta == {'kind': 'gpt2'} else len(set(meta['chars']))
    assert tokens == min(vocab_size, 50257)


@pytest.mark.parametrize('vocab_size', [101, 50256])
def test_a_vocabulary_without_a_stand_in_is_refused(vocab_size):
    with pytest.raises(UserError, match='at most 100, or at least 50257'):
        decoding.stand_in_tokenizer(vocab_size)


def test_a_file_that_llama_cpp_refuses_is_an_error(tmp_path):
    pytest.importorskip('xllamacpp')
    path = tmp_path / 'model.gguf'
    path.write_bytes(b'no model')
    with pytest.raises(UserError, match='llama.cpp cannot open'):
        LlamaCppProcess(str(path), 8, slots=1, threads=1)
