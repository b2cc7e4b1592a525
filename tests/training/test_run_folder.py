"""plaingpt/training/run_folder.py: one writer at a time, and room for the next run."""
import errno
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT
from filelock import FileLock

from plaingpt.system.messages import UserError
from plaingpt.training import run_folder

HOLDER = """
import sys, time
from plaingpt.training import run_folder
run_folder.claim(sys.argv[1])
print('held', flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def release_locks():
    yield
    run_folder._claims.clear()


# ---- one writer at a time ----

def test_a_folder_in_use_is_refused_until_its_run_is_dead(tmp_path):
    out_dir = tmp_path / 'new' / 'out'
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, out_dir], cwd=ROOT,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b'held\n'
    with pytest.raises(UserError, match='another run is writing into'):
        run_folder.claim(str(out_dir))
    holder.kill()
    holder.communicate()
    run_folder.claim(str(out_dir))
    run_folder.claim(str(out_dir))  # again, by the process that holds it


def test_unfinished_files_go_when_a_run_starts_and_others_stay(tmp_path):
    unfinished = [f'.{name}.12345.tmp' for name in run_folder.REPLACED_FILES]
    for name in *unfinished, '.last.pt.tmp', 'last.pt', 'notes.tmp':
        (tmp_path / name).write_text('', encoding='utf-8')
    run_folder.claim(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'last.pt', 'notes.tmp']


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    out_dir = tmp_path / 'out'
    run_folder.claim(str(out_dir))
    (out_dir / '.lock').unlink()
    out_dir.rmdir()
    run_folder.claim(str(out_dir))
    assert os.listdir(out_dir) == ['.lock']


def test_a_folder_that_another_run_has_made_again_is_refused(tmp_path):
    out_dir = tmp_path / 'out'
    run_folder.claim(str(out_dir))
    (out_dir / '.lock').unlink()
    other = FileLock(out_dir / '.lock')
    other.acquire(blocking=False)
    with pytest.raises(UserError, match='another run'):
        run_folder.claim(str(out_dir))


def test_a_file_system_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip('fcntl')
    no_locks = OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', Mock(side_effect=no_locks))
    run_folder.claim(str(tmp_path))
    assert 'does not support locks' in capsys.readouterr().err


def test_a_lock_does_not_overwrite_the_file_that_a_link_points_to(tmp_path):
    other = tmp_path / 'other'
    other.write_text('kept', encoding='utf-8')
    out_dir = tmp_path / 'out'
    out_dir.mkdir()
    (out_dir / '.lock').symlink_to(other)
    with pytest.raises(OSError):
        run_folder.claim(str(out_dir))
    assert other.read_text(encoding='utf-8') == 'kept'


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'makedirs', Mock(side_effect=PermissionError(13, 'Permission denied')))
    with pytest.raises(UserError, match='out_dir cannot be written: '):
        run_folder.enter(str(tmp_path / 'out'))


@pytest.mark.parametrize('out_dir', ['', 'a\0b', 'a\udcffb'])
def test_names_that_no_folder_can_have_are_refused(out_dir):
    with pytest.raises(UserError, match='cannot be the name of a folder'):
        run_folder.check_name(out_dir)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / 'out'
    path.write_text('', encoding='utf-8')
    with pytest.raises(UserError, match='is a file'):
        run_folder.check_name(str(path))


# ---- an earlier run in the folder ----

def write_all(folder, names, content):
    for name in names:
        (folder / name).write_text(content, encoding='utf-8')


def test_an_empty_folder_is_left_alone(tmp_path, capsys):
    run_folder.set_aside(str(tmp_path))
    assert capsys.readouterr().err == ''
    assert os.listdir(tmp_path) == []


def test_an_earlier_run_is_set_aside_and_nothing_else(tmp_path, capsys):
    first = [*run_folder.CHECKPOINTS, 'metrics.jsonl']
    second = ['last.pt', 'metrics.jsonl']
    for number, names in ('1', first), ('2', second):
        write_all(tmp_path, [*names, 'notes.txt'], f'run {number}')
        run_folder.start_new(str(tmp_path))
        replaced = tmp_path / 'replaced' / number
        assert str(replaced) in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == ['notes.txt', 'replaced']
        assert sorted(os.listdir(replaced)) == sorted(names)
        for path in replaced.iterdir():
            assert path.read_text(encoding='utf-8') == f'run {number}'


def test_a_run_that_continues_keeps_its_files_and_its_record_up_to_its_step(tmp_path, capsys):
    write_all(tmp_path, run_folder.CHECKPOINTS, 'a checkpoint')
    write_all(tmp_path, ['metrics.jsonl'], '{"step": 3}\n{"step": 4}\n{"step": 5}\n')
    run_folder.reopen(str(tmp_path), 4)
    assert capsys.readouterr().err == ''
    assert sorted(os.listdir(tmp_path)) == sorted([*run_folder.CHECKPOINTS, 'metrics.jsonl'])
    assert (tmp_path / 'metrics.jsonl').read_text(encoding='utf-8') == '{"step": 3}\n'
