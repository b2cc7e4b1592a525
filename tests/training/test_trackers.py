"""plaingpt/training/trackers.py: each step once and in order, whatever becomes of a run."""
import glob
import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, refused, run, succeeded
from runs import patched, train

from plaingpt.training import trackers

TRACKERS = ('wandb', 'tensorboard', 'trackio')


@pytest.fixture(params=TRACKERS)
def tracker(request, tmp_path, monkeypatch):
    """The name of a tracker, which keeps its record in tmp_path, without a network."""
    pytest.importorskip(request.param)
    keep_records_in(tmp_path, monkeypatch)
    return request.param


def keep_records_in(folder, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_DIR', str(folder))
    monkeypatch.setenv('TRACKIO_DIR', str(folder / 'trackio'))


# ---- what the trackers have recorded ----

def recorded(tracker, folder, key='loss'):
    """[(step, figure)] in the order in which the tracker shows them."""
    read = {'wandb': in_wandb, 'tensorboard': in_tensorboard, 'trackio': in_trackio}[tracker]
    return read(folder, key)


def in_wandb(folder, key):
    """The offline files of all sessions, one after another, as `wandb sync` sends them."""
    steps = []
    for path in sorted(glob.glob(str(folder / 'wandb' / 'offline-run-*' / '*.wandb'))):
        for history in trackers.wandb_histories(path):
            figures = {item.nested_key[0]: json.loads(item.value_json) for item in history.item}
            if key in figures:
                steps.append((history.step.num, figures[key]))
    return steps


def in_tensorboard(folder, key):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [path] = glob.glob(str(folder / '*' / 'tensorboard'))
    events = EventAccumulator(path, size_guidance={'scalars': 0})
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(key)]


def in_trackio(folder, key):
    [path] = (folder / 'trackio').glob('*.db')
    steps = []
    with sqlite3.connect(path) as database:
        for step, content in database.execute('SELECT step, metrics FROM metrics ORDER BY id'):
            figures = json.loads(content)
            if key in figures:
                steps.append((step, figures[key]))
        [[runs]] = database.execute('SELECT COUNT(DISTINCT run_id) FROM metrics')
    assert runs == 1
    return steps


def lines_of(folder, key='loss'):
    """The same of metrics.jsonl."""
    entries = map(json.loads, (folder / 'out' / 'metrics.jsonl').read_text().splitlines())
    return [(entry['step'], entry[key]) for entry in entries if key in entry]


# ---- sessions without training ----

# A session that resumes at a step, writes lines up to another, and ends well or is killed.
SESSION = """
import json, os, signal, sys, time
from plaingpt.training import metrics, trackers
name, out_dir, first, last, pause = sys.argv[1:]
os.makedirs(out_dir, exist_ok=True)
keys = dict(tracker=name, wandb_log=False, wandb_project='tests', wandb_run_name='run',
            out_dir=out_dir)
tracker = trackers.connect(keys, 'abcd1234') if name != 'none' else None
metrics.cut(out_dir, int(first))
if tracker:
    tracker.start(int(first), metrics.entries(out_dir))
record = metrics.Metrics(out_dir, tracker)
for step in range(int(first), int(last)):
    record.write({'step': step, 'loss': 1 / (step + 1), 'mfu': None})
if pause == 'end':
    record.close()
else:
    time.sleep(float(pause))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def session(tracker, folder, first, last, pause='end'):
    """pause: seconds before the kill; 'end': the session ends well."""
    arguments = (tracker, folder / 'out', first, last, pause)
    ended = subprocess.run([sys.executable, '-c', SESSION, *map(str, arguments)], cwd=ROOT,
                           capture_output=True, text=True)
    assert ended.returncode == (0 if pause == 'end' else -signal.SIGKILL), ended.stderr
    return ended


# trackio writes every half second, and wandb in blocks of 32 KiB, about 100 of these lines: a kill
# loses the last ones.
@pytest.mark.parametrize('pause', ['0', pytest.param('1.5', marks=pytest.mark.slow)])
def test_sessions_that_were_killed_leave_each_step_once(tracker, tmp_path, pause):
    session(tracker, tmp_path, 0, 400, pause)
    session(tracker, tmp_path, 150, 200, pause)  # ends before it is where the first one was
    session(tracker, tmp_path, 150, 450)
    expected = [(step, 1 / (step + 1)) for step in range(450)]
    assert recorded(tracker, tmp_path) == expected
    assert lines_of(tmp_path) == expected


def test_a_tracker_that_joins_later_gets_the_lines_from_before(tracker, tmp_path):
    session('none', tmp_path, 0, 5, '0')
    session(tracker, tmp_path, 3, 8)
    assert recorded(tracker, tmp_path) == lines_of(tmp_path)
    assert len(lines_of(tmp_path)) == 8


# ---- runs ----

KILL = """
import signal
from plaingpt.training.metrics import Metrics
def write(self, entry, original=Metrics.write):
    original(self, entry)
    if entry['step'] == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Metrics.write = write
"""


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_shows_each_step_once(tracker, tmp_path, char_data):
    keys = {**TINY, 'n_layer': 1, 'dataset': char_data, 'out_dir': tmp_path / 'out',
            'tracker': tracker, 'eval_interval': 4, 'max_iters': 10, 'resume': 'auto'}
    killed = run(patched(tmp_path, KILL, step=7), **keys)
    assert killed.returncode == -signal.SIGKILL
    succeeded(run('train.py', **keys))
    assert [step for step, _ in lines_of(tmp_path)] == list(range(1, 11))
    assert recorded(tracker, tmp_path) == lines_of(tmp_path)
    assert recorded(tracker, tmp_path, 'val_loss') == lines_of(tmp_path, 'val_loss')
    assert len(lines_of(tmp_path, 'val_loss')) == 4


def test_a_new_run_in_the_same_folder_has_a_record_of_its_own(tmp_path, char_data):
    pytest.importorskip('tensorboard')
    for max_iters in 6, 3:
        succeeded(train(tmp_path / 'out', char_data, tracker='tensorboard', max_iters=max_iters))
    assert recorded('tensorboard', tmp_path) == lines_of(tmp_path)
    assert len(lines_of(tmp_path)) == 3
    assert os.listdir(tmp_path / 'out' / 'replaced' / '1' / 'tensorboard')


# ---- failures ----

class Failing:
    """A tracker's record that fails in one of its methods."""

    def __init__(self, failing):
        if failing == 'connect':
            raise ConnectionError('no answer')
        self.failing = failing
        self.steps = []

    def open(self, step):
        if self.failing == 'open':
            raise ConnectionError('no answer')
        return 0

    def log(self, step, figures):
        if self.failing == 'log' and step == 3:
            raise ConnectionError('no answer')
        self.steps.append(step)

    def close(self):
        if self.failing == 'close':
            raise ConnectionError('no answer')


@pytest.mark.parametrize('failing', ['connect', 'open', 'log', 'close'])
def test_a_tracker_that_fails_is_one_warning_and_training_continues(tmp_path, char_data,
                                                                    monkeypatch, failing):
    def connect(run, run_id):
        return Failing(failing)

    monkeypatch.setitem(trackers.RECORDS, 'wandb', connect)
    ended = train(tmp_path / 'out', char_data, tracker='wandb')
    assert 'done' in succeeded(ended)
    [warning] = [line for line in ended.stderr.splitlines() if line.startswith('warning: ')]
    assert "tracker='wandb' has failed (no answer)" in warning
    assert len(lines_of(tmp_path)) == 6


@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='limits the size of files as POSIX systems do')
def test_a_full_disk_ends_no_tensorboard_run(tmp_path, char_data):
    pytest.importorskip('tensorboard')
    patch = ('import resource, signal\n'
             'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
             'from torch.utils.tensorboard import SummaryWriter\n'
             'def flush(self, original=SummaryWriter.flush):\n'
             '    limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n'
             '    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))\n'
             '    try:\n'
             '        original(self)\n'
             '    finally:\n'
             '        resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n'
             'SummaryWriter.flush = flush\n')
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out', 'tracker': 'tensorboard'}
    ended = run(patched(tmp_path, patch), **keys)
    assert 'done' in succeeded(ended)
    assert ended.stderr.count("tracker='tensorboard' has failed") == 1
    # With room on the disk, the next session completes the record.
    succeeded(run('train.py', **{**keys, 'max_iters': 8, 'resume': 'auto'}))
    assert recorded('tensorboard', tmp_path) == lines_of(tmp_path)


# ---- keys ----

@pytest.mark.parametrize('name', TRACKERS)
def test_a_tracker_without_its_package_is_refused_first(tmp_path, char_data, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    ended = train(tmp_path / 'out', char_data, tracker=name)
    assert f'pip install {name}' in refused(ended)
    assert not (tmp_path / 'out').exists()


def test_wandb_log_means_wandb_and_nothing_else(tmp_path, char_data):
    assert trackers.chosen({'wandb_log': True, 'tracker': 'none'}) == 'wandb'
    assert trackers.chosen({'wandb_log': True, 'tracker': 'wandb'}) == 'wandb'
    assert trackers.chosen({'wandb_log': False, 'tracker': 'trackio'}) == 'trackio'
    ended = train(tmp_path / 'out', char_data, wandb_log=True, tracker='tensorboard')
    assert 'wandb_log=True means' in refused(ended)


def test_a_project_that_trackio_refuses_is_refused(tmp_path, char_data, monkeypatch):
    pytest.importorskip('trackio')
    keep_records_in(tmp_path, monkeypatch)
    ended = train(tmp_path / 'out', char_data, tracker='trackio', wandb_project='registry-x')
    assert 'trackio refuses' in refused(ended)


NO_TRACKER = """
import os, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
finally:
    loaded = {'wandb', 'tensorboard', 'trackio'} & set(sys.modules)
    assert not loaded, loaded
"""


def test_without_a_tracker_no_package_is_imported(tmp_path, char_data):
    script = tmp_path / 'watched.py'
    script.write_text(NO_TRACKER, encoding='utf-8')
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out'}
    succeeded(run(script, ROOT / 'train.py', env={'PYTHONPATH': str(ROOT)}, **keys))


def test_trackers_get_plain_numbers():
    entry = {'step': 3, 'tokens': 12, 'loss': 0.5, 'mfu': None, 'weight_norm': {'mlp': 2.0}}
    assert trackers.figures_of(entry) == {'tokens': 12, 'loss': 0.5, 'weight_norm/mlp': 2.0}


def test_the_reason_of_an_end_is_no_step_of_its_own():
    tracker = trackers.Tracker.__new__(trackers.Tracker)
    tracker.record = Failing('nowhere')
    tracker.next_step = 0
    tracker.send({'step': 1, 'loss': 0.5})
    tracker.send({'step': 1, 'tokens': 12, 'error': 'not finite'})
    assert tracker.record.steps == [1]
