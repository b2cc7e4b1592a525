"""
The signals that ask a run to stop: SIGTERM, Ctrl-C (SIGINT), and SIGHUP when the terminal closes.

A signal does not interrupt a step. StopSignal takes note of it; the training loop finishes the
step, saves, and exits with RESUMABLE.
"""
import math
import os
import signal
import time

from plaingpt.system.messages import STDERR, STDOUT, discard_output

RESUMABLE = 75  # exit status after a signal, with the state saved; EX_TEMPFAIL in sysexits.h
HANGUP = getattr(signal, 'SIGHUP', None)  # None on Windows, which has no such signal


class StopSignal:
    """Takes note of signals that ask this process to stop; a second Ctrl-C ends it at once.

    name: the latest such signal, e.g. 'SIGTERM', or None if there was none."""

    def __init__(self):
        self.name = None
        self.first_at = math.inf  # time.monotonic() of the first signal
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        # nohup starts a process that ignores SIGHUP, and it must keep ignoring it.
        if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
            signal.signal(HANGUP, self._note)

    def _note(self, number, frame):
        now = time.monotonic()
        # Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun, well within
        # a second. Whoever presses it again later means it.
        if number == signal.SIGINT and now - self.first_at > 1:
            os._exit(128 + number)
        if number == HANGUP:
            _discard_output_to_terminal()
        self.name = signal.Signals(number).name
        self.first_at = min(self.first_at, now)


def _discard_output_to_terminal():
    """Drops further output to the terminal that has closed; a log file or a pipe still gets it."""
    for descriptor in (STDOUT, STDERR):
        if os.isatty(descriptor):
            discard_output(descriptor)
