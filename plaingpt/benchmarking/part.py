"""
A part of experiments/gpu_suite.py: it runs scripts in a folder of its own, within a time limit, and
reads what they have written.
"""
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from json import loads
from pathlib import Path

from plaingpt.planning.units import short_time

ROOT = Path(__file__).resolve().parents[2]

# What a program warns of when it goes on in a slower way than the one that is to be measured.
FALL_BACKS = ('torch.compile failed', 'no CUDA graph can be recorded')

# Seconds that a program may take to end on SIGTERM; torchrun gives its ranks 30.
TIME_TO_END = 40


class PartFailed(Exception):
    """A program of a part has failed, or a check does not hold; the message says which."""


def check(condition, sentence):
    """PartFailed with this sentence unless the condition holds."""
    if not condition:
        raise PartFailed(sentence)


class PartRun:
    """One execution of a part: its folder, its time limit, and what bench.py has reported."""

    def __init__(self, folder, limit):
        """folder: a Path, which is emptied; limit: seconds."""
        self.folder = folder
        self.limit = limit
        self.deadline = time.monotonic() + limit
        self.figures = []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def python(self, *arguments, kill_when=None):
        """Runs Python with these arguments. PartFailed if it fails or the time limit ends.

        kill_when: a function, asked every 20 ms whether to kill the program now; PartFailed if the
        program ends before it says so."""
        log_path = self.folder / 'log.txt'
        with open(log_path, 'ab') as log:
            # A session of its own, so that the program and its children can be killed together.
            process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=log,
                                       stderr=log, cwd=self.folder, start_new_session=True)
        try:
            while process.poll() is None:
                if kill_when is not None and kill_when():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return
                check(time.monotonic() < self.deadline,
                      f'the time limit of {short_time(self.limit)} was over')
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                end(process)
        lines = log_path.read_text(encoding='utf-8', errors='replace').splitlines()
        check(process.returncode == 0,
              f'exit status {process.returncode}: {" / ".join(lines[-3:])[-500:]}')
        for line in lines:
            check(not any(words in line for words in FALL_BACKS), line)
        check(kill_when is None, 'the run ended before it could be killed')

    def bench(self, keys):
        """The figures of bench.py with these keys, a dict."""
        path = self.folder / f'bench-{len(self.figures)}.json'
        self.python(ROOT / 'bench.py', *flags(keys), f'--json={path}')
        figures = loads(path.read_text(encoding='utf-8'))
        self.figures.append(figures)
        return figures

    def train(self, name, config, keys, launcher=(), kill_when=None):
        """The records of a run of train.py with a file of config/ and these keys, in order.

        name: of its out_dir; launcher: what stands between python and train.py; kill_when: as in
        python()."""
        self.python(*launcher, ROOT / 'train.py', ROOT / 'config' / config, *flags(keys),
                    f'--out_dir={self.folder / name}', kill_when=kill_when)
        return self.records(name)

    def records(self, name):
        """The complete lines of metrics.jsonl in the out_dir of this name, a list of dicts."""
        path = self.folder / name / 'metrics.jsonl'
        if not path.exists():
            return []
        lines = path.read_text(encoding='utf-8').split('\n')[:-1]
        return [loads(line) for line in lines]


def end(process):
    """Ends a program that leads a session of its own, and its children."""
    # The ranks of torchrun have sessions of their own, so only torchrun itself can end them.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(TIME_TO_END)
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def flags(keys):
    """The keys of a dict as command-line flags."""
    return [f'--{key}={value}' for key, value in keys.items()]


# ---- records ----

def values(records, key):
    """{step: value} of those of the records that have this key."""
    return {record['step']: record[key] for record in records if key in record}


def largest_difference(a, b):
    """The largest relative difference of two {step: value}.

    PartFailed if they have different steps or a difference is not finite."""
    check(a and a.keys() == b.keys(), f'one run has steps {list(a)}, the other {list(b)}')
    differences = [abs(a[step] - b[step]) / max(abs(b[step]), 1e-6) for step in a]
    are_finite = all(math.isfinite(difference) for difference in differences)
    check(are_finite, f'not all differences are finite, between {list(a.values())} and '
                      f'{list(b.values())}')
    return max(differences)
