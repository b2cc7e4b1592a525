"""Steps of a batch of texts, without a thread: what is read when, and that texts don't mix."""
import math

import pytest
import torch
from batching import ask, make_engine, step_to_the_end, submit, text_of_stream, write
from conftest import tiny_gpt, tiny_ids
from generating import lively_gpt
from torch.nn import functional as F

from plaingpt.inference import decoding_kernels, slot_attention
from plaingpt.inference.quantization import place_to_generate
from plaingpt.system import large_pages
from plaingpt.system.cpu_kernels import has_onednn
from plaingpt.system.devices import place

KINDS = [
    dict(),
    dict(position='rope'),
    dict(position='alibi'),
    dict(position='none', norm='rmsnorm', bias=False),
    dict(n_head=4, n_kv_head=2, position='rope', qk_norm=True, mlp='swiglu'),
    dict(n_head=4, n_kv_head=1, position='alibi', logit_softcap=5.0, tied=False),
]
REQUESTS = [
    ask(tiny_ids(1, seed=1).tolist(), 30),
    ask(tiny_ids(13, seed=2).tolist(), 25, temperature=0.7, top_k=5, seed=1),
    ask(tiny_ids(30, seed=3).tolist(), 30, top_p=0.9, seed=2),
    ask(tiny_ids(8, seed=4).tolist(), 9, temperature=0, repetition_penalty=1.3),
    ask(tiny_ids(9, seed=5).tolist(), 40, temperature=1.4, min_p=0.05, seed=4),
    ask(tiny_ids(17, seed=6).tolist(), 20, top_k=3, top_p=0.8, repetition_penalty=2.0, seed=5),
]


def passes_of(gpt, monkeypatch):
    """A list that gets the ids (N,) of each pass of the model."""
    passes = []
    residuals = gpt.residuals

    def recorded(ids, positions, caches=None):
        passes.append(ids[:, 0].tolist())
        return residuals(ids, positions, caches)

    monkeypatch.setattr(gpt, 'residuals', recorded)
    return passes


# ---- texts ----

@pytest.mark.parametrize('in_cpp', [True, False])
@pytest.mark.parametrize('changes', KINDS)
def test_texts_are_those_of_the_plain_engine(changes, in_cpp, monkeypatch):
    if not in_cpp:
        monkeypatch.setattr(slot_attention, 'has_cpp_attention', lambda device: False)
    gpt = lively_gpt(block_size=64, **changes)
    engine = make_engine(gpt, max_rows=4)
    receivers = []
    for request in REQUESTS:
        receivers.append(submit(engine, request.prompt, request.max_tokens, seed=request.seed,
                                **vars(request.options))[0])
        engine.step()  # so they come while others are written
    step_to_the_end(engine)
    for request, receiver in zip(REQUESTS, receivers, strict=True):
        assert receiver.text == text_of_stream(gpt, request)
        assert receiver.finish_reason == 'length'
        assert receiver.new_tokens == request.max_tokens


@pytest.mark.skipif(not has_onednn(), reason='other products depend on the number of rows')
@pytest.mark.parametrize('in_cpp', [True, False])
@pytest.mark.parametrize('changes', KINDS)
def test_neighbours_do_not_change_a_bit(changes, in_cpp, monkeypatch):
    if not in_cpp:
        monkeypatch.setattr(slot_attention, 'has_cpp_attention', lambda device: False)
    # Wide enough that oneDNN multiplies one row otherwise than two.
    gpt = lively_gpt(block_size=64, n_embd=64, mlp_width=2048, **changes)
    if in_cpp:
        place_to_generate(gpt, torch.device('cpu'), 'float32', changing_rows=8)
    else:
        place(gpt, torch.device('cpu'), torch.float32)
    prompts = []
    for row in range(8):
        prompts.append([row, *tiny_ids(3 * row, seed=row).tolist()])  # none begins like another
    options = [dict(), dict(temperature=0), dict(top_k=4), dict(top_p=0.7),
               dict(temperature=0.5, repetition_penalty=1.5), dict(min_p=0.1), dict(), dict()]

    def request(engine, row):
        receiver, ticket = submit(engine, prompts[row], 12 + row, seed=row, top_logprobs=2,
                                  **options[row])
        return receiver

    alone = []
    for row in range(8):
        engine = make_engine(gpt, max_rows=8)
        alone.append(request(engine, row))
        step_to_the_end(engine)

    engine = make_engine(gpt, max_rows=8)
    among_others = []
    for row in range(8):
        among_others.append(request(engine, row))
        engine.step()
        engine.step()
    step_to_the_end(engine)
    for row in range(8):
        assert among_others[row].logprobs == alone[row].logprobs
        assert among_others[row].text == alone[row].text


# ---- quantised weights ----

quantized = pytest.mark.skipif(decoding_kernels.library() is None,
                               reason='quantised matrices are multiplied in bfloat16')


def quantized_gpt(kind, **changes):
    gpt = lively_gpt(**{'block_size': 64, 'n_embd': 64, 'n_head': 4, **changes})
    place_to_generate(gpt, torch.device('cpu'), 'auto', kind)
    return gpt


@quantized
@pytest.mark.parametrize('changes', [
    dict(), dict(position='rope', n_kv_head=2, norm='rmsnorm', bias=False, tied=False)])
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_logprobs_of_quantised_weights_are_those_of_a_single_pass(kind, changes):
    # A last bit of an activation may move it to another whole number, so texts may differ.
    gpt = quantized_gpt(kind, **changes)
    engine = make_engine(gpt)
    receivers = []
    for request in REQUESTS:
        receivers.append(submit(engine, request.prompt, request.max_tokens, seed=request.seed,
                                top_logprobs=0, **vars(request.options))[0])
        engine.step()
    step_to_the_end(engine)
    for request, receiver in zip(REQUESTS, receivers, strict=True):
        written = torch.tensor([found.id for found in receiver.logprobs])
        logprobs = torch.tensor([found.logprob for found in receiver.logprobs])
        ids = torch.cat([torch.tensor(request.prompt), written])[None]
        logits, _ = gpt(ids[:, :-1], ids[:, 1:])
        expected = F.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).flatten()
        errors = (logprobs - expected[-len(logprobs):]).abs()
        assert errors.mean() < 0.05
        assert errors.max() < 0.5


@quantized
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_many_neighbours_do_not_change_a_bit_of_quantised_weights(kind, monkeypatch):
    gpt = quantized_gpt(kind)
    engine = make_engine(gpt, max_rows=20)
    prompts = [[row, *tiny_ids(row % 5, seed=row).tolist()] for row in range(20)]
    passes = passes_of(gpt, monkeypatch)
    together = [submit(engine, prompt, 12, top_logprobs=0)[0] for prompt in prompts]
    step_to_the_end(engine)
    assert max(len(ids) for ids in passes) == 20
    for prompt, receiver in zip(prompts, together, strict=True):
        alone = write(make_engine(gpt), prompt, 12, top_logprobs=0)
        assert receiver.logprobs == alone.logprobs


# ---- the context ----

def test_a_full_context_ends_a_text():
    engine = make_engine(context_size=20)
    receiver = write(engine, tiny_ids(15).tolist(), 50)
    assert (receiver.new_tokens, receiver.finish_reason) == (5, 'length')
    receiver = write(engine, tiny_ids(20).tolist(), 50)
    assert (receiver.text, receiver.new_tokens, receiver.finish_reason) == ('', 0, 'length')


def test_a_model_without_learned_positions_has_the_context_that_it_is_given():
    gpt = lively_gpt(block_size=8, position='rope')
    receiver = write(make_engine(gpt, context_size=40), tiny_ids(30).tolist(), 50)
    assert receiver.new_tokens == 10


def test_ids_that_the_tokenizer_lacks_are_never_chosen():
    gpt = lively_gpt(block_size=64, vocab_size=500)  # the tokenizer has 31
    for options in (dict(), dict(temperature=0), dict(top_k=50), dict(top_p=0.99),
                    dict(repetition_penalty=1.1)):
        receiver = write(make_engine(gpt), [5, 400], 30, top_logprobs=40, **options)
        assert len(receiver.text) == 30
        for logprobs in receiver.logprobs:
            assert max(id for id, _ in logprobs.top) < 31


# ---- reading prompts ----

@pytest.mark.parametrize('prefill_chunk', [1, 2, 7, 12, 100])
@pytest.mark.parametrize('changes', KINDS[:3])
def test_reading_in_pieces_changes_nothing(changes, prefill_chunk):
    gpt = lively_gpt(block_size=64, **changes)
    prompt = tiny_ids(37).tolist()
    whole = write(make_engine(gpt, prefill_chunk=64), prompt, 20, top_logprobs=0)
    pieces = write(make_engine(gpt, prefill_chunk=prefill_chunk), prompt, 20, top_logprobs=0)
    assert pieces.text == whole.text
    for a, b in zip(pieces.logprobs, whole.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_a_long_prompt_does_not_hold_up_the_text_of_others(monkeypatch):
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt, prefill_chunk=8)
    writing, _ = submit(engine, 'a', 30)
    engine.step()
    passes = passes_of(gpt, monkeypatch)
    first, _ = submit(engine, [1, *tiny_ids(29).tolist()], 2)
    second, _ = submit(engine, [2, *tiny_ids(10).tolist()], 2)
    received = []
    for _ in range(6):
        engine.step()
        received.append((len(writing.pieces), len(first.pieces), len(second.pieces)))
    # The last piece of the first prompt, 6 tokens, leaves too little for 8 of the second one.
    assert [len(ids) for ids in passes] == [1, 8, 1, 8, 1, 8, 1, 6, 2, 8, 1, 3]
    assert received == [(2, 0, 0), (3, 0, 0), (4, 0, 0), (5, 1, 0), (6, 2, 0), (7, 2, 1)]


def test_the_next_turn_of_a_conversation_reads_only_what_is_new():
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt)
    prompt = tiny_ids(20).tolist()
    first = write(engine, prompt, 8)
    answer = engine._tokenizer.encode(first.text)
    turn = prompt + answer + [3, 4, 5]
    again = write(engine, turn, 8, seed=3)
    # The last token of the answer was chosen, but not read.
    assert [piece.cached_tokens for piece in again.pieces] == [27] + [0] * 7
    assert again.text == text_of_stream(gpt, ask(turn, 8, seed=3))
    assert engine.stats().cached_tokens == 27
    assert engine.stats().prompt_tokens == 20 + 31


def test_samples_of_a_prompt_read_it_once(monkeypatch):
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt, max_rows=6)
    passes = passes_of(gpt, monkeypatch)
    prompt = tiny_ids(21).tolist()
    receivers = [submit(engine, prompt, 1, seed=seed)[0] for seed in range(6)]
    step_to_the_end(engine)
    # All of them once, and then the last one again for the logits of the five other samples.
    assert sum(len(ids) for ids in passes) == 21 + 5
    for seed, receiver in enumerate(receivers):
        assert receiver.text == text_of_stream(gpt, ask(prompt, 1, seed=seed))
        assert receiver.pieces[0].cached_tokens == (20 if seed > 0 else 0)


def test_a_prompt_waits_no_longer_for_another_that_is_cancelled():
    engine = make_engine(prefill_chunk=4)
    prompt = tiny_ids(40).tolist()
    _, ticket = submit(engine, prompt)
    engine.step()
    second, _ = submit(engine, prompt, 5)
    engine.step()
    assert engine.stats().waiting == 1
    engine.cancel(ticket)
    step_to_the_end(engine)
    assert second.finish_reason == 'length'
    assert second.pieces[0].cached_tokens >= 4


def test_no_tokens_are_written_if_none_are_asked_for():
    receiver = write(make_engine(), 'abc', 0)
    [piece] = receiver.pieces
    assert (piece.text, piece.new_tokens, piece.finish_reason) == ('', 0, 'length')


# ---- stops ----

def test_a_stop_token_ends_a_text_and_is_no_part_of_it():
    gpt = lively_gpt(block_size=64)
    text = write(make_engine(gpt), 'abc', 30).text
    stop = text[12]
    begin = text.index(stop)
    receiver = write(make_engine(gpt), 'abc', 30, top_logprobs=1,
                     stop_tokens=frozenset(make_engine(gpt)._tokenizer.encode(stop)))
    assert (receiver.text, receiver.finish_reason) == (text[:begin], 'stop')
    assert receiver.new_tokens == begin + 1
    assert len(receiver.logprobs) == begin


def test_a_stop_text_ends_a_text_with_the_tokens_before_it():
    gpt = lively_gpt(block_size=64)
    text = write(make_engine(gpt), 'abc', 30).text
    stop = text[12:15]
    begin = text.index(stop)
    receiver = write(make_engine(gpt), 'abc', 30, top_logprobs=0, stops=(stop, 'no such text'))
    assert (receiver.text, receiver.finish_reason) == (text[:begin], 'stop')
    assert receiver.new_tokens == begin + 3
    assert len(receiver.logprobs) == begin


def test_what_was_held_back_comes_with_the_last_piece():
    gpt = lively_gpt(block_size=64)
    text = write(make_engine(gpt), 'abc', 10).text
    receiver = write(make_engine(gpt), 'abc', 10, stops=(text[-2:] + '!',), top_logprobs=0)
    assert receiver.text == text
    assert receiver.pieces[-1].text.endswith(text[-2:])
    assert len(receiver.logprobs) == 10


# ---- log-probabilities ----

def test_logprobs_are_those_of_a_plain_forward_pass():
    gpt = lively_gpt(block_size=64)
    prompt = tiny_ids(12).tolist()
    receiver = write(make_engine(gpt), prompt, 20, temperature=0.5, top_k=9,
                     repetition_penalty=1.2, top_logprobs=3)
    ids = [logprobs.id for logprobs in receiver.logprobs]
    assert make_engine(gpt)._tokenizer.decode(ids) == receiver.text
    with torch.no_grad():
        logits, _ = gpt(torch.tensor([prompt + ids]), torch.zeros(1, 32, dtype=torch.int64))
    expected = F.log_softmax(logits[0], dim=-1)
    for number, found in enumerate(receiver.logprobs):
        row = expected[len(prompt) + number - 1]
        assert found.logprob == pytest.approx(row[found.id].item(), abs=1e-4)
        best = row.topk(3)
        assert [id for id, _ in found.top] == best.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize('length', [1, 2, 9, 17, 30])
@pytest.mark.parametrize('max_tokens', [0, 4])
def test_logprobs_of_the_prompt_come_first(length, max_tokens, monkeypatch):
    monkeypatch.setattr('plaingpt.inference.text_batch.LOGITS_AT_ONCE', 100)  # 3 rows at a time
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt)
    prompt = tiny_ids(length).tolist()
    write(engine, prompt)  # whose keys and values do not help
    receiver = write(engine, prompt, max_tokens, top_logprobs=2, prompt_logprobs=True)
    first, *rest = receiver.pieces
    assert not any(piece.prompt_logprobs for piece in rest)
    assert [found.id for found in first.prompt_logprobs] == prompt
    assert first.prompt_logprobs[0].logprob is None
    assert first.cached_tokens == 0
    with torch.no_grad():
        logits, _ = gpt(torch.tensor([prompt]), torch.zeros(1, length, dtype=torch.int64))
    expected = F.log_softmax(logits[0], dim=-1)
    for number, found in enumerate(first.prompt_logprobs[1:]):
        assert found.logprob == pytest.approx(expected[number, found.id].item(), abs=1e-4)
        best = expected[number].topk(2)
        assert [id for id, _ in found.top] == best.indices.tolist()


# ---- what goes wrong in one text ----

def test_logits_that_are_not_finite_end_one_text_alone():
    gpt = lively_gpt(block_size=64, tied=False)
    with torch.no_grad():
        gpt.transformer.wte.weight[30] = math.nan
    engine = make_engine(gpt, max_rows=2)
    good, _ = submit(engine, 'abc', 20)
    bad, _ = submit(engine, [1, 30, 2], 20, prompt_logprobs=True)
    step_to_the_end(engine)
    assert (bad.text, bad.finish_reason) == ('', 'error')
    assert bad.pieces[0].prompt_logprobs == ()
    assert good.finish_reason == 'length'
    assert good.text == text_of_stream(gpt, ask('abc', 20))
    # What stands in its slot is not used again.
    after = write(engine, [1, 3, 2], 20)
    assert after.text == text_of_stream(gpt, ask([1, 3, 2], 20))
    assert engine.is_healthy


def limit_passes(gpt, tokens, monkeypatch):
    """Makes memory too short for passes of more tokens."""
    residuals = gpt.residuals

    def limited(ids, positions, caches=None):
        if len(ids) > tokens:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return residuals(ids, positions, caches)

    monkeypatch.setattr(gpt, 'residuals', limited)


def test_memory_that_is_short_for_a_prompt_ends_this_request_alone(monkeypatch, capsys):
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt, prefill_chunk=32)
    writing, _ = submit(engine, 'abc', 20)
    engine.step()
    limit_passes(gpt, 10, monkeypatch)
    reading, _ = submit(engine, tiny_ids(30).tolist(), 20)
    step_to_the_end(engine)
    assert reading.finish_reason == 'error'
    assert writing.text == text_of_stream(gpt, ask('abc', 20))
    assert 'a request ends early: the GPU is out of memory' in capsys.readouterr().err


def test_memory_that_is_short_for_a_longer_cache_ends_what_needs_it(monkeypatch, capsys):
    monkeypatch.setattr('plaingpt.inference.slots.SMALLEST_ROOM', 16)
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt, max_rows=2, prefill_chunk=64)
    long, _ = submit(engine, tiny_ids(10, seed=1).tolist(), 30)
    short, _ = submit(engine, tiny_ids(3, seed=2).tolist(), 13)
    engine.step()

    def fail(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(large_pages, 'zeros', fail)
    step_to_the_end(engine)
    assert (long.finish_reason, long.new_tokens) == ('error', 7)
    assert (short.finish_reason, short.new_tokens) == ('length', 13)
    assert engine.is_healthy


def test_memory_that_is_short_for_a_token_of_each_ends_the_longest_text(monkeypatch, capsys):
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt)
    short, _ = submit(engine, tiny_ids(3, seed=1).tolist(), 20)
    long, _ = submit(engine, tiny_ids(5, seed=2).tolist(), 20)
    engine.step()
    limit_passes(gpt, 1, monkeypatch)
    step_to_the_end(engine)
    assert (long.finish_reason, long.new_tokens) == ('error', 1)
    assert short.finish_reason == 'length'
    assert short.text == text_of_stream(gpt, ask(tiny_ids(3, seed=1).tolist(), 20))
    assert capsys.readouterr().err.count('a request ends early') == 1


def test_texts_wait_where_memory_is_too_short_for_more_of_them(monkeypatch, capsys):
    gpt = lively_gpt(block_size=64)
    engine = make_engine(gpt)
    receivers = [submit(engine, [first, 1, 2], 5)[0] for first in range(2)]
    engine.step()

    def fail(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory')

    receivers += [submit(engine, [first, 1, 2], 5)[0] for first in range(2, 6)]
    with monkeypatch.context() as patched:
        patched.setattr(large_pages, 'zeros', fail)
        engine.step()
        assert (engine.stats().active, engine.stats().waiting) == (2, 4)
        step_to_the_end(engine)
    for first, receiver in enumerate(receivers):
        assert receiver.text == text_of_stream(gpt, ask([first, 1, 2], 5))


def test_a_tiny_model_in_bfloat16_writes_too():
    gpt = place(tiny_gpt(block_size=64), torch.device('cpu'), torch.bfloat16)
    receiver = write(make_engine(gpt), 'abc', 30, top_logprobs=1, prompt_logprobs=True)
    assert receiver.new_tokens == 30
