"""The batching engine's thread and queue: how requests come and go, and how it all ends."""
import contextlib
import functools
import threading
import time

import pytest
from batching import Receiver, ask, make_engine, step_to_the_end, submit, text_of_stream, write
from conftest import tiny_ids
from generating import lively_gpt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from plaingpt.inference.engine import InvalidArguments
from plaingpt.inference.requests import Closed, QueueFull

PATIENCE = 20  # seconds after which a test fails; no text takes that long


@pytest.fixture
def running():
    """A function that makes an engine and starts it; all are stopped after the test."""
    started = []

    def start(*arguments, **options):
        engine = make_engine(*arguments, **options)
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.drain(0)


@functools.cache
def shared_gpt():
    return lively_gpt(block_size=64)


def before_each_pass(function):
    """A model that calls a function at the beginning of each pass, with the number of passes."""
    gpt = lively_gpt(block_size=64)
    residuals = gpt.residuals
    passes = []

    def changed(*arguments):
        passes.append(arguments)
        function(len(passes))
        return residuals(*arguments)

    gpt.residuals = changed
    return gpt


def ends(receiver):
    """The reason for which a text ends, which must be soon."""
    assert receiver.ended.wait(PATIENCE)
    return receiver.finish_reason


# ---- many at a time ----

def test_texts_from_many_threads_are_those_of_the_plain_engine(running):
    engine = running(shared_gpt(), max_rows=3, max_queue=100)
    requests = []
    for number in range(24):
        prompt = tiny_ids(1 + number % 9, seed=number % 5).tolist()
        requests.append(ask(prompt, 3 + number % 20, seed=number, temperature=number % 3 / 2))
    receivers = [Receiver() for _ in requests]

    def send(numbers):
        for number in numbers:
            engine.submit(requests[number], receivers[number])

    senders = [threading.Thread(target=send, args=[range(first, 24, 4)]) for first in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    for request, receiver in zip(requests, receivers, strict=True):
        assert ends(receiver) == 'length'
        assert receiver.text == text_of_stream(shared_gpt(), request)
    stats = engine.stats()
    assert stats.new_tokens == sum(request.max_tokens for request in requests)
    assert stats.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert 0 < stats.cache_positions <= stats.cache_room
    # Two layers have keys and values of 16 channels, in float32.
    assert engine.cache_bytes_at_most == 3 * 64 * 2 * 2 * 16 * 4


def test_a_sleeping_engine_wakes_for_each_request(running):
    engine = running(shared_gpt())
    for number in range(40):
        receiver, _ = submit(engine, 'abc', 2, seed=number)
        assert ends(receiver) == 'length'


def test_requests_from_before_the_start_are_taken():
    engine = make_engine(shared_gpt())
    receiver, _ = submit(engine, 'abc', 5)
    engine.start()
    assert ends(receiver) == 'length'
    engine.drain(PATIENCE)


# ---- the queue ----

def test_no_more_requests_wait_than_may():
    engine = make_engine(shared_gpt(), max_rows=2, max_queue=3)
    receivers = [submit(engine, 'abc', 4)[0] for _ in range(5)]
    with pytest.raises(QueueFull, match='3 requests wait'):
        submit(engine, 'abc')
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.active, stats.waiting) == (2, 3)
    with pytest.raises(QueueFull):
        submit(engine, 'abc')
    step_to_the_end(engine)
    assert all(receiver.finish_reason == 'length' for receiver in receivers)
    assert write(engine, 'abc').finish_reason == 'length'


def test_requests_come_in_turn():
    engine = make_engine(shared_gpt(), max_rows=1)
    order = []
    for number in range(4):
        engine.submit(ask([number], 2), lambda piece, number=number: order.append(number))
    step_to_the_end(engine)
    assert order == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- ends that come early ----

def test_a_cancelled_text_leaves_before_the_next_step():
    engine = make_engine(shared_gpt(), max_rows=2)
    writing, ticket_of_writing = submit(engine, 'a', 30)
    reading, ticket_of_reading = submit(engine, tiny_ids(40).tolist(), 20)
    waiting, ticket_of_waiting = submit(engine, 'c', 30)
    last, _ = submit(engine, 'd', 3)
    engine.step()
    assert (len(writing.pieces), reading.pieces, waiting.pieces) == (1, [], [])

    engine.cancel(ticket_of_waiting)
    engine.step()
    assert waiting.finish_reason == 'cancelled'
    assert engine.stats().waiting == 1
    engine.cancel(ticket_of_reading)
    engine.step()
    assert reading.finish_reason == 'cancelled'
    assert reading.new_tokens == 0
    engine.step()  # the last request has its row now
    assert last.new_tokens == 1
    engine.cancel(ticket_of_writing)
    engine.cancel(ticket_of_writing)
    tokens = writing.new_tokens
    step_to_the_end(engine)
    assert (writing.finish_reason, writing.new_tokens) == ('cancelled', tokens)
    assert last.finish_reason == 'length'
    engine.cancel(ticket_of_writing)  # it has ended long ago
    assert write(engine, 'abc', 2).finish_reason == 'length'


def test_a_text_may_be_cancelled_while_the_engine_delivers(running):
    engine = running(shared_gpt())
    receiver = Receiver()
    tickets = []

    def cancel(piece):
        receiver(piece)
        if len(receiver.pieces) == 3:
            engine.cancel(tickets[0])

    slow_start = threading.Event()

    def deliver(piece):
        slow_start.wait(PATIENCE)
        cancel(piece)

    tickets.append(engine.submit(ask('abc', 50), deliver))
    slow_start.set()
    assert ends(receiver) == 'cancelled'
    assert receiver.new_tokens == 3


def test_a_deadline_ends_a_text_as_it_is(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    engine = make_engine(shared_gpt(), max_rows=1)
    writing, _ = submit(engine, 'a', 30, deadline=1010)
    waiting, _ = submit(engine, 'b', 30, deadline=1005)
    for _ in range(3):
        engine.step()
    now[0] = 1006
    engine.step()
    assert (waiting.finish_reason, waiting.text) == ('timeout', '')
    now[0] = 1010
    engine.step()
    assert (writing.finish_reason, writing.new_tokens) == ('timeout', 4)
    assert writing.text == text_of_stream(shared_gpt(), ask('a', 4))
    assert engine.stats().active == 0


def test_text_that_is_held_back_comes_with_an_early_end():
    engine = make_engine(shared_gpt())
    whole = write(engine, 'a', 10).text
    receiver, ticket = submit(engine, 'a', 10, stops=(whole[:5],), top_logprobs=0)
    for _ in range(4):
        engine.step()
    assert receiver.text == ''
    engine.cancel(ticket)
    engine.step()
    assert (receiver.text, receiver.finish_reason) == (whole[:4], 'cancelled')
    assert len(receiver.logprobs) == 4


# ---- the end of the engine ----

def test_a_drained_engine_lets_texts_end(running):
    gate = threading.Event()
    engine = running(before_each_pass(lambda _: gate.wait(PATIENCE)), max_rows=1)
    receivers = [submit(engine, 'abc', 10)[0] for _ in range(3)]
    drain = threading.Thread(target=engine.drain, args=[PATIENCE])
    drain.start()
    with pytest.raises(Closed):
        while True:  # until the other thread has begun
            with contextlib.suppress(QueueFull):
                submit(engine, 'abc', 1)
    gate.set()
    drain.join()
    assert [receiver.finish_reason for receiver in receivers] == ['length'] * 3
    assert engine.is_healthy
    assert not engine._thread.is_alive()


def test_a_drained_engine_cancels_what_does_not_end_in_time(running):
    third_pass = threading.Event()

    def be_slow(passes):
        if passes == 3:
            third_pass.set()
        time.sleep(0.05)

    engine = running(before_each_pass(be_slow), max_rows=1)
    writing, _ = submit(engine, 'abc', 60)
    waiting, _ = submit(engine, 'abc', 60)
    assert third_pass.wait(PATIENCE)
    engine.drain(0.1)
    assert (writing.finish_reason, waiting.finish_reason) == ('cancelled', 'cancelled')
    assert 0 < writing.new_tokens < 60
    assert engine.stats().active == engine.stats().waiting == 0


def test_an_idle_engine_and_one_that_never_started_end_at_once(running):
    engine = running(shared_gpt())
    engine.drain(PATIENCE)
    assert not engine._thread.is_alive()
    engine.drain(PATIENCE)  # once more changes nothing

    engine = make_engine(shared_gpt())
    receiver, _ = submit(engine, 'abc')
    engine.drain(PATIENCE)
    assert receiver.finish_reason == 'cancelled'
    with pytest.raises(Closed):
        submit(engine, 'abc')


def test_an_exception_ends_all_texts_and_is_logged_once(capsys):
    def fail(passes):
        if passes == 5:
            raise ZeroDivisionError('as the test wants it')

    engine = make_engine(before_each_pass(fail), max_rows=1)
    receivers = [submit(engine, 'abc', 60)[0] for _ in range(3)]
    engine.start()
    assert [ends(receiver) for receiver in receivers] == ['error'] * 3
    assert receivers[0].new_tokens == 4
    engine._thread.join(PATIENCE)
    assert not engine.is_healthy
    with pytest.raises(Closed):
        submit(engine, 'abc')
    stderr = capsys.readouterr().err
    assert stderr.count('ZeroDivisionError: as the test wants it') == 1
    assert stderr.count('Traceback') == 1
    engine.drain(PATIENCE)
    assert engine.stats().active == engine.stats().waiting == 0


def test_a_tokenizer_that_fails_ends_all_texts_too(monkeypatch, capsys):
    def fail(tokenizer, ids):
        raise ZeroDivisionError('as the test wants it')

    engine = make_engine(shared_gpt())
    receivers = [submit(engine, [first, 1, 2], 3)[0] for first in range(3)]
    monkeypatch.setattr(type(engine._tokenizer), 'decode', fail)
    engine.start()
    assert [ends(receiver) for receiver in receivers] == ['error'] * 3
    engine._thread.join(PATIENCE)
    assert capsys.readouterr().err.count('Traceback') == 1


def test_a_receiver_that_fails_loses_its_own_text_alone(capsys):
    engine = make_engine(shared_gpt())
    calls = []

    def fail(piece):
        calls.append(piece)
        raise RuntimeError('the event loop is closed')

    other, _ = submit(engine, 'abc', 10)
    engine.submit(ask('abd', 10), fail)
    step_to_the_end(engine)
    assert other.text == text_of_stream(shared_gpt(), ask('abc', 10))
    assert [piece.finish_reason for piece in calls] == [None, 'cancelled']
    assert 'the event loop is closed' in capsys.readouterr().err


# ---- what is refused ----

@pytest.mark.parametrize('options, named', [
    (dict(max_rows=0), 'max_rows=0'),
    (dict(max_queue=-1), 'max_queue=-1'),
    (dict(prefill_chunk=0), 'prefill_chunk=0'),
    (dict(context_size=0), 'context_size=0'),
    (dict(context_size=65), 'context_size=65'),
])
def test_an_engine_out_of_range_is_refused(options, named):
    with pytest.raises(InvalidArguments, match=f'^{named} must be at least'):
        make_engine(shared_gpt(), **options)


@pytest.mark.parametrize('request_fields, message', [
    (dict(prompt=[]), 'the prompt has 0 tokens'),
    (dict(prompt=[1] * 65), 'the prompt has 65 tokens'),
    (dict(prompt=[1, 31]), 'below 31'),
    (dict(prompt=[-1]), 'at least 0'),
    (dict(prompt='a', max_tokens=-1), 'max_tokens=-1'),
    (dict(prompt='a', seed=2 ** 64), '64 bits'),
    (dict(prompt='a', stops=('b', '')), "''"),
    (dict(prompt='a', top_logprobs=-1), 'top_logprobs=-1'),
    (dict(prompt='a', temperature=-1.0), 'temperature=-1.0'),
])
def test_a_request_out_of_range_is_refused(request_fields, message):
    engine = make_engine(shared_gpt())
    with pytest.raises(InvalidArguments, match=message):
        submit(engine, **request_fields)
    assert engine.stats().waiting == 0


@pytest.mark.parametrize('seed', [-2 ** 63, 2 ** 64 - 1])
def test_all_seeds_of_64_bits_are_taken(seed):
    assert write(make_engine(shared_gpt()), 'a', 3, seed=seed).finish_reason == 'length'


# ---- any order of events ----

@functools.cache
def expected_text(prompt, max_tokens, seed):
    return text_of_stream(shared_gpt(), ask(prompt, max_tokens, seed=seed))


class Events(RuleBasedStateMachine):
    """Submits, cancels and does steps in any order; an engine must keep its promises."""

    def __init__(self):
        super().__init__()
        self.engine = make_engine(shared_gpt(), max_rows=2, max_queue=3, prefill_chunk=4)
        self.sent = []  # (request, receiver, ticket)

    @rule(first=st.integers(0, 2), length=st.sampled_from([1, 2, 5, 11, 20]),
          max_tokens=st.integers(1, 6), seed=st.integers(0, 2))
    def submit(self, first, length, max_tokens, seed):
        prompt = (first, *range(length - 1))  # many have a beginning in common
        request = ask(prompt, max_tokens, seed=seed)
        receiver = Receiver()
        unfinished = [sent for sent in self.sent if not sent[1].ended.is_set()]
        if len(unfinished) >= 5:
            with pytest.raises(QueueFull):
                self.engine.submit(request, receiver)
        else:
            ticket = self.engine.submit(request, receiver)
            self.sent.append((request, receiver, ticket))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data):
        _, _, ticket = data.draw(st.sampled_from(self.sent))
        self.engine.cancel(ticket)

    @rule(steps=st.integers(1, 4))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()
        for _, receiver, ticket in self.sent:
            assert receiver.ended.is_set() or not ticket.is_cancelled

    @invariant()
    def never_more_rows_than_may(self):
        stats = self.engine.stats()
        in_use = [slot for slot in self.engine._batch.slots.slots if slot.in_use]
        assert stats.active == len(in_use) <= 2
        unfinished = [sent for sent in self.sent if not sent[1].ended.is_set()]
        assert stats.active + stats.waiting == len(unfinished)

    def teardown(self):
        step_to_the_end(self.engine)
        for request, receiver, ticket in self.sent:
            expected = expected_text(request.prompt, request.max_tokens, request.seed)
            if ticket.is_cancelled:
                assert receiver.finish_reason in ('cancelled', 'length')
                assert expected.startswith(receiver.text)
            else:
                assert receiver.finish_reason == 'length'
                assert receiver.text == expected


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
