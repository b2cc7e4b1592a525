"""
The folder of a run, its out_dir: which run may write into it, and what becomes of an earlier run.

    .lock          held by the run that writes here
    ckpt.pt …      checkpoints, which checkpoints.py writes
    metrics.jsonl  one JSON object for each step that was logged or evaluated; see metrics.py
    loss.png       its picture, drawn by plot.py
    find_lr.png    the picture of a learning-rate search
    adapter/       the LoRA adapter, in peft's format
    tensorboard/   the same figures for TensorBoard; see trackers.py
    replaced/N/    runs that were here before a new one started
"""
import itertools
import os
from typing import NamedTuple

from filelock import FileLock

from plaingpt.system.files import remove_unfinished
from plaingpt.system.folder_lock import NAME as LOCK
from plaingpt.system.folder_lock import lock_folder
from plaingpt.system.messages import UserError, complaints, explained, warn
from plaingpt.training import metrics

CHECKPOINTS = ('ckpt.pt', 'ckpt.prev.pt', 'last.pt', 'last.prev.pt')
OTHER_FILES = ('metrics.jsonl', 'loss.png', 'adapter', 'tensorboard')
# The files that are written beside their place first, and that a kill can leave unfinished.
REPLACED_FILES = ('ckpt.pt', 'last.pt', 'metrics.jsonl', 'loss.png', 'find_lr.png')


class Claim(NamedTuple):
    """The lock of an out_dir, and the status of its file at the time."""
    lock: FileLock
    status: os.stat_result


_claims = {}  # for each out_dir that this process writes into; held until the process ends


def problems(run):
    """Yields what is wrong with the keys of train.py about out_dir."""
    yield from complaints(check_name, run['out_dir'])


def check_name(folder, key='out_dir'):
    """UserError if this can't be the folder of a run; key: the one that names it."""
    is_utf8 = folder == folder.encode(errors='ignore').decode()  # torch reads no other names
    if not folder or '\0' in folder or not is_utf8:
        raise UserError(f'{key}={folder!r} cannot be the name of a folder: '
                        f'--{key}=. is the current one')
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f'{key}={folder!r} is a file: name a folder')


def claim(out_dir):
    """Makes out_dir, if missing, and locks it for this process until that ends, however it ends.

    Removes unfinished files of runs that were killed. Called again, it makes sure that the folder
    is still the locked one. UserError if another run holds it; OSError if it can't be written."""
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, LOCK)
    if _is_ours(out_dir, path):
        return
    lock = lock_folder(out_dir, 'run', 'out_dir')
    _claims[out_dir] = Claim(lock, os.stat(path))
    remove_unfinished(out_dir, REPLACED_FILES)


def _is_ours(out_dir, lock_path):
    if out_dir not in _claims or not os.path.exists(lock_path):
        return False
    return os.path.samestat(os.stat(lock_path), _claims[out_dir].status)


def enter(out_dir):
    """claim() at the start of a run, where a folder that can't be written is the user's mistake."""
    with explained(OSError, prefix='out_dir cannot be written: '):
        claim(out_dir)


def start_new(out_dir):
    """Prepares out_dir for a new run."""
    with explained(OSError, prefix='out_dir cannot be written: '):
        set_aside(out_dir)


def reopen(out_dir, step):
    """Prepares out_dir for a run that continues in it from this step."""
    with explained(OSError, prefix='out_dir cannot be written: '):
        metrics.cut(out_dir, step)


def set_aside(out_dir):
    """Moves the run that out_dir holds to the next replaced/N in it, to make room for a new one."""
    found = []
    for name in (*CHECKPOINTS, *OTHER_FILES):
        if os.path.exists(os.path.join(out_dir, name)):
            found.append(name)
    if not found:
        return
    for number in itertools.count(1):
        replaced = os.path.join(out_dir, 'replaced', str(number))
        if not os.path.exists(replaced):
            break
    os.makedirs(replaced)
    for name in found:
        os.replace(os.path.join(out_dir, name), os.path.join(replaced, name))
    warn(f'{out_dir} held another run, which is now in {replaced}')
