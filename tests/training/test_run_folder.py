"""The folder of a run: one writer at a time, metrics that outlive a full disk, and room for the next run."""
import errno
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT
from filelock import FileLock

from plaingpt.system.messages import UserError
from plaingpt.training import metrics as metrics_module
from plaingpt.training import run_folder
from plaingpt.training.metrics import Metrics, cut_metrics

HOLDER = 'import sys, time; from plaingpt.training import run_folder; run_folder.claim(sys.argv[1]); print("held", flush=True); time.sleep(60)'


@pytest.fixture(autouse=True)
def _let_go():
    yield
    run_folder._claims.clear()


# ---- whose it is ----

def test_a_folder_in_use_is_refused_until_its_run_is_dead(tmp_path):
    out_dir = tmp_path / 'new' / 'out'
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, out_dir], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b'held\n'
    with pytest.raises(UserError, match='another run is writing into'):
        run_folder.claim(str(out_dir))
    holder.kill(), holder.communicate()
    run_folder.claim(str(out_dir))
    run_folder.claim(str(out_dir))  # our own is no stranger


def test_unfinished_files_go_when_a_run_starts_and_others_stay(tmp_path):
    for name in *run_folder.TEMPORARY, 'last.pt', 'notes.tmp':
        (tmp_path / name).write_text('')
    run_folder.claim(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'last.pt', 'notes.tmp']


def test_a_folder_that_was_removed_is_made_anew_unless_another_run_has_taken_its_place(tmp_path):
    out_dir = tmp_path / 'out'
    for replaced in False, True:
        run_folder.claim(str(out_dir))
        (out_dir / '.lock').unlink(), out_dir.rmdir()
        if replaced:
            out_dir.mkdir()
            other = FileLock(out_dir / '.lock')
            other.acquire(blocking=False)
            with pytest.raises(UserError, match='another run'):
                run_folder.claim(str(out_dir))
        else:
            run_folder.claim(str(out_dir))
            assert os.listdir(out_dir) == ['.lock']


def test_a_disk_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip('fcntl')
    monkeypatch.setattr(fcntl, 'flock', Mock(side_effect=OSError(errno.ENOLCK, 'No locks available')))
    run_folder.claim(str(tmp_path))
    assert 'knows no locks' in capsys.readouterr().err


def test_a_lock_is_not_a_way_to_overwrite_what_a_link_points_to(tmp_path):
    (tmp_path / 'other').write_text('kept')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / '.lock').symlink_to(tmp_path / 'other')
    with pytest.raises(OSError):
        run_folder.claim(str(tmp_path / 'out'))
    assert (tmp_path / 'other').read_text() == 'kept'


# ---- metrics.jsonl ----

def test_lines_that_the_disk_refuses_are_written_when_it_takes_them(tmp_path, monkeypatch, capsys):
    metrics, path = Metrics(str(tmp_path)), tmp_path / 'metrics.jsonl'
    metrics.write({'step': 1})
    with monkeypatch.context() as patch:
        patch.setattr(metrics_module, 'open', lambda *_, **keys: open('/dev/full', 'ab', buffering=0), raising=False)
        metrics.write({'step': 2}), metrics.write({'step': 3})
    assert path.read_text() == '{"step": 1}\n' and len(metrics.unwritten) == 2
    assert capsys.readouterr().err.count('cannot be written (No space left on device)') == 1
    metrics.write({'step': 4})
    assert path.read_text() == ''.join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) and not metrics.unwritten


def test_half_a_line_is_taken_back(tmp_path):
    code = ('from plaingpt.training.metrics import Metrics; import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
            'resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30)); m = Metrics(sys.argv[1]); '
            '[m.write({"step": step}) for step in range(4)]; print(len(m.unwritten))')
    ended = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == '2\n' and 'No space left' in ended.stderr
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 0}\n{"step": 1}\n'


def test_metrics_follow_a_folder_that_is_removed_and_comes_back(tmp_path):
    metrics = Metrics(str(tmp_path / 'out'))
    metrics.write({'step': 1})
    (tmp_path / 'out').mkdir()
    metrics.write({'step': 2})
    assert (tmp_path / 'out' / 'metrics.jsonl').read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_json_does_not_know_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        Metrics(str(tmp_path)).write({'loss': float('nan')})


def test_a_run_in_the_way_is_set_aside_and_nothing_else(tmp_path, capsys):
    run_folder.set_aside(str(tmp_path))
    assert capsys.readouterr().err == '' and not os.listdir(tmp_path)
    run = [*run_folder.CHECKPOINTS, 'metrics.jsonl']
    for number, content, names in ('1', 'one', run), ('2', 'two', run[2:]):
        for name in *names, 'notes.txt':
            (tmp_path / name).write_text(content)
        run_folder.set_aside(str(tmp_path))
        assert str(tmp_path / 'replaced') in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == ['notes.txt', 'replaced']
        assert [path.read_text() for path in (tmp_path / 'replaced' / number).iterdir()] == [content] * len(names)


@pytest.mark.parametrize('rest', ['', '{"step": 2', '{"step": 5, "loss": 0.', '\0\0\0\n', '[1]\n', '{"loss": 1}\n'])
def test_metrics_are_cut_back_to_a_step_and_to_whole_lines(tmp_path, rest):
    cut_metrics(str(tmp_path), 3)
    lines = [json.dumps({'step': step, 'loss': 0.5}) + '\n' for step in (0, 1, 3, 4, 10)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(lines) + rest)
    cut_metrics(str(tmp_path), 3)
    assert (tmp_path / 'metrics.jsonl').read_text() == ''.join(lines[:3]) and len(os.listdir(tmp_path)) == 1
