"""What a contender of bench.py measures."""
import pytest

from plaingpt.benchmarking import contender as module
from plaingpt.benchmarking.contender import Contender, Ratio


class Clock:
    """A clock that goes on only when a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, 'time', clock)
    return clock


def timed_contender(clock, seconds, steps_a_round=1):
    """A Contender whose rounds take these seconds, by their number; its trial takes 7 s."""
    def trial():
        clock.now += 7.0

    def work(number):
        clock.now += seconds[number]
        return 100

    return Contender('ours', trial, work, steps_a_round)


def test_the_first_trial_the_first_round_and_the_timed_rounds_are_kept_apart(clock):
    contender = timed_contender(clock, [5.0, 4.0, 1.0, 3.0, 2.0])
    contender.start_up()
    contender.warm_up(2)
    for number in 2, 3, 4:
        contender.time(number)
    assert contender.seconds == [1.0, 3.0, 2.0]
    assert contender.figures() == {
        'name': 'ours', 'start_s': 7.0, 'first_ms': 5000.0, 'ms_per_step': 2000.0,
        'ms_min': 1000.0, 'ms_max': 3000.0, 'tokens_per_s': 50.0}


def test_a_round_of_several_steps_is_reported_per_step(clock):
    contender = timed_contender(clock, [8.0], steps_a_round=4)
    contender.time(0)
    assert contender.median() == 2.0
    assert contender.speed() == 50.0


def test_the_start_may_be_work_that_contains_the_trial(clock):
    contender = timed_contender(clock, [])

    def compile_and_try():
        clock.now += 10.0
        contender.trial()
        return True

    assert contender.start_up(compile_and_try) is True
    assert contender.start_seconds == 17.0
    assert contender.first_seconds is None


def test_a_ratio_is_that_of_the_speeds_and_its_range_that_of_the_rounds(clock):
    ours = timed_contender(clock, [1.0, 2.0, 4.0])
    theirs = timed_contender(clock, [3.0, 4.0, 4.0])
    for number in range(3):
        ours.time(number)
        theirs.time(number)
    theirs.tokens = 50
    assert ours.ratio_to(theirs) == Ratio(4.0, least=2.0, largest=6.0)
