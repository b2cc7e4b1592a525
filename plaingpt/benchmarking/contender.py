"""
A contender of bench.py: one of the programs that are timed in turns.
"""
import statistics
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another program one is, in the same rounds."""
    of_medians: float
    least: float    # of all rounds
    largest: float


class Rounds:
    """The times of a work that is done again and again, all in seconds a step."""

    def __init__(self):
        self.seconds = []
        self.tokens = 0  # in a step

    def median(self):
        return statistics.median(self.seconds)

    def speed(self):
        """Tokens/s at the median."""
        return self.tokens / self.median()

    def ratio_to(self, other):
        """The Ratio of the speeds, to those of the Rounds of another program."""
        ratios = []
        for our_seconds, their_seconds in zip(self.seconds, other.seconds, strict=True):
            ratios.append((self.tokens / our_seconds) / (other.tokens / their_seconds))
        return Ratio(self.speed() / other.speed(), min(ratios), max(ratios))


class Contender(Rounds):
    """A program that is timed in rounds.

    A round is one step, or several steps between two waits for the device."""

    def __init__(self, name, trial, work, steps_a_round=1):
        """trial: a function that does a little of the work; work: a function from a round's number
        to the tokens of a step. Both wait for the device at their end."""
        super().__init__()
        self.name = name
        self.trial = trial
        self.work = work
        self.steps_a_round = steps_a_round
        self.start_seconds = None  # the first trial, in which torch.compile does its work
        self.first_seconds = None  # the first round

    def start_up(self, first_call=None):
        """Times first_call(), which does the first trial, and returns its result.

        None: the trial itself is the first call."""
        if first_call is None:
            first_call = self.trial
        begin = time.perf_counter()
        result = first_call()
        self.start_seconds = time.perf_counter() - begin
        return result

    def warm_up(self, rounds):
        """Does rounds that do not count, but for the first, whose time is kept by itself."""
        for number in range(rounds):
            seconds = self._seconds_of(number)
            if number == 0:
                self.first_seconds = seconds

    def time(self, number):
        """Does the round of this number, and keeps its time."""
        self.seconds.append(self._seconds_of(number))

    def _seconds_of(self, number):
        begin = time.perf_counter()
        self.tokens = self.work(number)
        return (time.perf_counter() - begin) / self.steps_a_round

    def figures(self):
        """{name of a figure: value}, as they are written to a file; 'ms' are milliseconds."""
        first_ms = None
        if self.first_seconds is not None:
            first_ms = 1000 * self.first_seconds
        return {
            'name': self.name,
            'ms_per_step': 1000 * self.median(),
            'ms_min': 1000 * min(self.seconds),
            'ms_max': 1000 * max(self.seconds),
            'first_ms': first_ms,
            'start_s': self.start_seconds,
            'tokens_per_s': self.speed(),
        }

