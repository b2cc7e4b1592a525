"""plaingpt/system/signals.py: a signal is noted, and does not interrupt."""
import os
import signal

import pytest

from plaingpt.system import signals
from plaingpt.system.signals import StopSignal

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='sends the signals of POSIX systems')


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; set clock.now to another time in seconds."""
    class Clock:
        now = 100.0

    monkeypatch.setattr(signals.time, 'monotonic', lambda: Clock.now)
    return Clock


@pytest.fixture
def exits(monkeypatch):
    """The statuses with which the process would have ended at once."""
    statuses = []
    monkeypatch.setattr(signals.os, '_exit', statuses.append)
    return statuses


def test_the_name_of_a_signal_is_noted():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        stop = StopSignal()
        assert stop.name is None
        signal.raise_signal(number)
        assert stop.name == number.name


def test_a_second_ctrl_c_ends_the_process_but_torchruns_copy_of_the_first_does_not(clock, exits):
    StopSignal()
    signal.raise_signal(signal.SIGINT)
    clock.now += 0.5
    signal.raise_signal(signal.SIGINT)
    assert exits == []
    clock.now += 1
    signal.raise_signal(signal.SIGINT)
    assert exits == [128 + signal.SIGINT]


def test_a_second_sigterm_does_not_end_the_process(clock, exits):
    StopSignal()
    signal.raise_signal(signal.SIGTERM)
    clock.now += 60
    signal.raise_signal(signal.SIGTERM)
    assert exits == []


def test_a_run_under_nohup_keeps_ignoring_the_end_of_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(signal.SIGHUP)
    assert stop.name is None


def test_output_is_dropped_only_where_it_went_to_the_terminal_that_closed(monkeypatch):
    dropped = []
    monkeypatch.setattr(signals.os, 'isatty', lambda descriptor: descriptor == signals.STDERR)
    monkeypatch.setattr(signals, 'discard_output', dropped.append)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    StopSignal()
    signal.raise_signal(signal.SIGHUP)
    assert dropped == [signals.STDERR]
