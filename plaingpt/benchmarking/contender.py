"""
A contender of bench.py: one of the programs that are timed in turns.
"""
import statistics
import time


class Contender:
    """A program in several rounds. A round is one step, or some between two waits for the device.

    Its times are in seconds; those of rounds are divided by the steps of a round."""

    def __init__(self, name, trial, work, steps_a_round=1):
        """trial: a function that does a little of the work; work: a function from a round's number
        to the tokens of a step. Both wait for the device at their end."""
        self.name = name
        self.trial = trial
        self.work = work
        self.steps_a_round = steps_a_round
        self.start = None   # how long the first trial took, in which torch.compile does its work
        self.first = None   # the first round
        self.seconds = []   # the timed rounds
        self.tokens = 0     # in a step

    def begin(self, start=None):
        """Times start(), which does the first trial; None: the trial itself. Returns its result."""
        begin = time.perf_counter()
        result = self.trial() if start is None else start()
        self.start = time.perf_counter() - begin
        return result

    def warm_up(self, rounds):
        """Does rounds that do not count, but for the first, whose time is kept by itself."""
        for number in range(rounds):
            seconds = self._seconds_of(number)
            if number == 0:
                self.first = seconds

    def time(self, number):
        """Does the round of this number, and keeps its time."""
        self.seconds.append(self._seconds_of(number))

    def _seconds_of(self, number):
        begin = time.perf_counter()
        self.tokens = self.work(number)
        return (time.perf_counter() - begin) / self.steps_a_round

    def median(self):
        return statistics.median(self.seconds)

    def speed(self):
        """Tokens/s at the median."""
        return self.tokens / self.median()

    def figures(self):
        """{name of a figure: value}, as they are written to a file; 'ms' are milliseconds."""
        return {
            'name': self.name,
            'ms_per_step': 1000 * self.median(),
            'ms_min': 1000 * min(self.seconds),
            'ms_max': 1000 * max(self.seconds),
            'first_ms': None if self.first is None else 1000 * self.first,
            'start_s': self.start,
            'tokens_per_s': self.speed(),
        }

