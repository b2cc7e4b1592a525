"""
A part of experiments/gpu_suite.py: it runs scripts in a folder of its own, within a time limit, and
reads what they have written.
"""
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
        """Runs Python with these arguments; PartFailed unless that ends well and in time.

        kill_when: a function that is asked again and again whether to kill it now. Then PartFailed
        means that it ended before."""
        log_path = self.folder / 'log.txt'
        with open(log_path, 'ab') as log:
            # A session of its own, so that torchrun and its ranks can be killed together.
            process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=log,
                                       stderr=log, cwd=self.folder, start_new_session=True)
        try:
            while process.poll() is None:
                if kill_when is not None and kill_when():
                    return
                check(time.monotonic() < self.deadline,
                      f'the time limit of {short_time(self.limit)} was over')
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        last_lines = log_path.read_text(encoding='utf-8', errors='replace').splitlines()[-3:]
        check(process.returncode == 0,
              f'exit status {process.returncode}: {" / ".join(last_lines)[-500:]}')
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


def flags(keys):
    """The keys of a dict as command-line flags."""
    return [f'--{key}={value}' for key, value in keys.items()]


# ---- records ----

def values(records, key):
    """{step: value} of those of the records that have this key."""
    return {record['step']: record[key] for record in records if key in record}


def largest_difference(a, b):
    """The largest relative difference of two {step: value}, which must have the same steps."""
    check(a and a.keys() == b.keys(), f'one run has steps {list(a)}, the other {list(b)}')
    return max(abs(a[step] - b[step]) / max(abs(b[step]), 1e-6) for step in a)
