"""
The folder of a run, its out_dir: who may write into it, its metrics.jsonl, and what becomes of a run that was there
before.

    .lock          held by the run that writes here
    metrics.jsonl  one JSON object a step that was logged or evaluated
    loss.png       what plot.py has drawn of it
    find_lr.png    what the search for a learning rate has found
    adapter/       what LoRA has learnt, which finetuning.py writes
    replaced/N/    the runs that were here before a new one started

checkpoint.py owns the rest of what is in it.
"""
import errno
import itertools
import os
from importlib.util import find_spec

from filelock import FileLock, Timeout

from plaingpt.system.files import remove
from plaingpt.system.messages import UserError, complaints, explained, warn
from plaingpt.training.metrics import Metrics, cut_metrics

CHECKPOINTS = ('ckpt.pt', 'ckpt.prev.pt', 'last.pt', 'last.prev.pt')
TEMPORARY = ('.ckpt.pt.tmp', '.last.pt.tmp', '.metrics.jsonl.tmp', '.loss.png.tmp', '.find_lr.png.tmp')


def problems(run):
    """Yields what is wrong with a run's out_dir or wandb_log."""
    if run['wandb_log'] and not find_spec('wandb'):
        yield 'wandb_log=True needs the package: pip install wandb'
    yield from complaints(check_name, run['out_dir'])


def check_name(out_dir):
    """UserError if this can't be the folder of a run."""
    if not out_dir or '\0' in out_dir or out_dir != out_dir.encode(errors='ignore').decode():  # torch reads UTF-8 names
        raise UserError(f'out_dir={out_dir!r} cannot be the name of a folder: --out_dir=. is the one where you are')
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise UserError(f'out_dir={out_dir!r} is a file: name a folder')


_claims = {}  # the lock of each out_dir that this process writes into, and its file's status: kept until the end


def claim(out_dir):
    """Makes out_dir, if missing, and makes it this process's own until it ends, however it ends.

    Clears away the unfinished files of one that was killed. Called again, it sees to it that the folder still is the
    claimed one. UserError if another run has it; OSError if it can't be written."""
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, '.lock')
    if out_dir in _claims and os.path.exists(path) and os.path.samestat(os.stat(path), _claims[out_dir][1]):
        return
    lock = FileLock(path, fallback_to_soft=False)  # whose file outlives a kill, and would shut out the next start
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f'another run is writing into {out_dir}: wait for its end, stop it, or choose another '
                        '--out_dir') from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warn(f'the disk of {out_dir} knows no locks: see to it that no other run writes there')
    _claims[out_dir] = lock, os.stat(path)
    remove(os.path.join(out_dir, name) for name in TEMPORARY)


def enter(out_dir):
    """claim() for the start of a run, where a folder that can't be written is the user's mistake."""
    with explained(OSError, prefix='out_dir cannot be written: '):
        claim(out_dir)


def begin(out_dir, step, wandb_options=None):
    """Metrics of a run that goes on in out_dir after this step; None: of a new one, for which it makes room there.

    wandb_options: what wandb.init takes, to log there too. UserError if it refuses, or the disk does."""
    enter(out_dir)
    wandb = None
    if wandb_options:
        import wandb
        with explained(wandb.errors.Error, prefix='wandb_log=True, but Weights & Biases refuses: '):
            wandb.init(resume='allow', **wandb_options)
    with explained(OSError, prefix='out_dir cannot be written: '):
        set_aside(out_dir) if step is None else cut_metrics(out_dir, step)
    return Metrics(out_dir, wandb)


def set_aside(out_dir):
    """Moves the run that an out_dir holds into the next out_dir/replaced/N, so that a new one can't mix with it."""
    names = *CHECKPOINTS, 'metrics.jsonl', 'loss.png', 'adapter'
    found = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
    if found:
        numbers = (os.path.join(out_dir, 'replaced', str(n)) for n in itertools.count(1))
        replaced = next(folder for folder in numbers if not os.path.exists(folder))
        os.makedirs(replaced)
        for name in found:
            os.replace(os.path.join(out_dir, name), os.path.join(replaced, name))
        warn(f'{out_dir} held another run, which is now in {replaced}')
