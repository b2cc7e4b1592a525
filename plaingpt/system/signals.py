"""
How the scripts speak and end: one sentence for a user's mistake, lines and warnings from one process of many, and the
signals that ask a run to stop. It imports no torch, so that what needs none starts at once.
"""
import math
import os
import signal
import time

from plaingpt.system.messages import _silence

RESUMABLE = 75  # exit status of a run that a signal has stopped and that has saved all (EX_TEMPFAIL in sysexits.h)
HANGUP = getattr(signal, 'SIGHUP', None)  # Windows has none


class StopSignal:
    """SIGTERM, SIGINT (Ctrl-C) or SIGHUP (the terminal has gone), noted for a loop to end by itself. name: which, or
    None as long as none has come. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.name, self.asked = None, math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        if HANGUP and signal.getsignal(HANGUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(HANGUP, self._note)

    def _note(self, number, frame):
        if number == signal.SIGINT and time.monotonic() - self.asked > 1:  # torchrun's echo of the first comes sooner
            os._exit(128 + number)
        for stream in (1, 2) if number == HANGUP else ():
            if os.isatty(stream):
                _silence(stream)
        self.name, self.asked = signal.Signals(number).name, min(self.asked, time.monotonic())
