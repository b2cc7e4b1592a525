"""plaingpt/system/files.py: a file on disk is whole, or as it was before."""
import errno
import os
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT

from plaingpt.system import files

FULL = OSError(errno.ENOSPC, 'No space left on device')


@pytest.fixture
def path(tmp_path):
    """A file with the content 'old'."""
    path = tmp_path / 'file.txt'
    path.write_bytes(b'old')
    return path


def names(folder):
    return sorted(os.listdir(folder))


# ---- all ----

def test_a_file_is_replaced(path):
    files.write_atomically(str(path), b'new')
    assert path.read_bytes() == b'new'
    assert names(path.parent) == ['file.txt']


def test_a_file_is_created(tmp_path):
    with files.replacing(str(tmp_path / 'file.txt')) as file:
        file.write(b'first, ')
        assert not (tmp_path / 'file.txt').exists()
        file.write(b'second')
    assert (tmp_path / 'file.txt').read_bytes() == b'first, second'


def test_a_name_without_a_folder_is_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_atomically('file.txt', b'new')
    assert (tmp_path / 'file.txt').read_bytes() == b'new'


def test_the_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(path, monkeypatch):
    events = []
    fsync = os.fsync
    replace = os.replace

    def noted_fsync(descriptor):
        is_folder = os.fstat(descriptor).st_ino == path.parent.stat().st_ino
        events.append('folder' if is_folder else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def noted_replace(source, target):
        events.append('replace')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', noted_fsync)
    monkeypatch.setattr(os, 'replace', noted_replace)
    files.write_atomically(str(path), b'12345')
    expected = [5, 'replace']
    if os.name == 'posix':  # Windows can't sync a folder
        expected.append('folder')
    assert events == expected


def test_processes_that_write_the_same_file_do_not_meet(path):
    """Their temporary files have different names, in the folder of the file."""
    code = f'from plaingpt.system import files; print(files.temporary_path({str(path)!r}))'
    other = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    ours = files.temporary_path(str(path))
    assert other.stdout.strip() != ours
    assert os.path.dirname(other.stdout.strip()) == os.path.dirname(ours) == str(path.parent)


# ---- or nothing ----

def fail_to_open(path, mode):
    raise FULL


def open_full_disk(path, mode):
    open(path, mode).close()  # the file can be made, but has no room
    return open('/dev/full', mode)


@pytest.mark.parametrize('name, replacement', [
    ('plaingpt.system.files.open', fail_to_open),
    ('plaingpt.system.files.open', open_full_disk),
    ('os.fsync', Mock(side_effect=FULL)),
    ('os.replace', Mock(side_effect=FULL)),
], ids=['open', 'write', 'fsync', 'replace'])
def test_a_write_that_fails_changes_nothing(path, monkeypatch, name, replacement):
    if replacement is open_full_disk and not os.path.exists('/dev/full'):
        pytest.skip('only Linux has /dev/full')
    with monkeypatch.context() as patch, pytest.raises(OSError) as failure:
        patch.setattr(name, replacement, raising=False)
        files.write_atomically(str(path), b'new')
    assert failure.value.errno == errno.ENOSPC
    assert path.read_bytes() == b'old'
    assert names(path.parent) == ['file.txt']


def test_a_block_that_raises_changes_nothing(path):
    with pytest.raises(ZeroDivisionError), files.replacing(str(path)) as file:
        file.write(b'half of the new')
        _ = 1 / 0
    assert path.read_bytes() == b'old'
    assert names(path.parent) == ['file.txt']


def test_a_durable_file_that_is_not_finished_is_removed(path):
    with pytest.raises(KeyboardInterrupt), files.durable_file(str(path)) as file:
        file.write(b'half of the new')
        raise KeyboardInterrupt
    assert names(path.parent) == []


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_atomically(str(tmp_path / 'missing' / 'file.txt'), b'new')


WRITE_AND_DIE = """
import os, signal, sys
from plaingpt.system import files
with files.replacing(sys.argv[1]) as file:
    file.write(b'half of the new')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != 'posix', reason='kills as POSIX systems do')
def test_a_kill_changes_nothing_and_its_unfinished_file_is_removed_later(path):
    ended = subprocess.run([sys.executable, '-c', WRITE_AND_DIE, path], cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b'old'
    assert len(names(path.parent)) == 2
    files.remove_unfinished(str(path.parent), ['file.txt'])
    assert names(path.parent) == ['file.txt']


# ---- removing ----

def test_unfinished_files_are_removed_and_nothing_else(tmp_path):
    unfinished = ['.last.pt.123.tmp', '.last.pt.tmp', '.a[b].pt.7.tmp']
    others = ['last.pt', 'last.pt.tmp', '.ckpt.pt.123.tmp', '.last.pt', '.ab.pt.7.tmp', 'notes.tmp']
    for name in (*unfinished, *others):
        (tmp_path / name).write_bytes(b'')
    files.remove_unfinished(str(tmp_path), ['last.pt', 'a[b].pt'])
    assert names(tmp_path) == sorted(others)


def test_unfinished_files_are_found_in_a_folder_with_a_strange_name(tmp_path):
    folder = tmp_path / 'out[1]*?'
    folder.mkdir()
    (folder / '.last.pt.123.tmp').write_bytes(b'')
    files.remove_unfinished(str(folder), ['last.pt'])
    assert names(folder) == []


def test_removing_a_file_that_is_missing_is_no_error(path):
    files.remove([str(path.parent / 'missing'), str(path)])
    assert names(path.parent) == []


# ---- forcing to the disk ----

def test_a_file_and_a_folder_can_be_forced_to_the_disk(path):
    files.sync(str(path))
    files.sync(str(path.parent))
    with pytest.raises(FileNotFoundError):
        files.sync(str(path.parent / 'missing'))


@pytest.mark.skipif(os.name != 'posix', reason='Windows syncs no folder')
def test_a_network_folder_that_cannot_be_synced_is_no_error_but_a_failing_disk_is(path,
                                                                                  monkeypatch):
    monkeypatch.setattr(os, 'fsync', Mock(side_effect=OSError(errno.EINVAL, 'Invalid argument')))
    files.sync(str(path.parent))
    with pytest.raises(OSError):
        files.sync(str(path))
    monkeypatch.setattr(os, 'fsync', Mock(side_effect=OSError(errno.EIO, 'Input/output error')))
    with pytest.raises(OSError):
        files.sync(str(path.parent))
