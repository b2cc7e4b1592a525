"""
Checkpoints in an out_dir: saving, loading and verifying them, and finding the newest or the best.

    ckpt.pt     what sample.py reads: the best by validation loss, or with always_save_checkpoint
                the newest
    last.pt     the newest complete state, which a resumed run continues
    *.prev.pt   the file before each, used if the newer one turns out to be broken

A checkpoint is a torch.save of a dict with nanoGPT's six keys (model, optimizer, model_args,
iter_num, best_val_loss, config) and ours. It is read as data only, and verification.py checks it
before anything in it is believed.
"""
import contextlib
import errno
import functools
import math
import os
import re
import shutil
import subprocess
import zipfile

import numpy as np
import torch

from plaingpt.system.files import durable_file, remove, sync, temporary_path
from plaingpt.system.messages import UserError, warn
from plaingpt.training import older_checkpoints
from plaingpt.training.run_folder import CHECKPOINTS
from plaingpt.training.verification import (FORMAT_VERSION, VERIFIED, digest, find_not_finite,
                                            problem_of_bytes, problem_of_entries,
                                            problem_of_values, problem_of_weights)

# Errors after which the file may be whole, but can't be read at the moment.
UNREADABLE = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES,
              errno.EPERM)
ALTERED = 'it is cut short, altered, or not a file of torch.save'


class Unreadable(UserError):
    """A file that may be whole but can't be read now: no reason to fall back to an older one."""


class NotFinite(ValueError):
    """A checkpoint that must not be saved, because a number in it is infinite or not a number."""


# ---- saving ----

_written = set()  # the paths of the checkpoints that this process has saved


class SavedFile:
    """The paths of a checkpoint's file, of the one before it, and of the one being written."""

    def __init__(self, out_dir, name):
        self.current = os.path.join(out_dir, f'{name}.pt')
        self.previous = os.path.join(out_dir, f'{name}.prev.pt')
        self.temporary = temporary_path(self.current)


def save(out_dir, checkpoint, names):
    """Writes checkpoint once, and puts it in place as NAME.pt for each of names ('ckpt', 'last').

    The file that was NAME.pt becomes NAME.prev.pt. A kill at any moment leaves a complete NAME.pt
    or NAME.prev.pt. OSError if the disk is full or the folder can't be written, NotFinite if a
    number is infinite or not a number; after both, NAME.pt or NAME.prev.pt is still whole."""
    for part in VERIFIED:
        name = find_not_finite(checkpoint[part], part)
        if name is not None:
            raise NotFinite(f'{name} holds numbers that are not finite')
    digests = {part: digest(checkpoint[part]) for part in VERIFIED}
    checkpoint = {**checkpoint, **_provenance(), 'format_version': FORMAT_VERSION,
                  'digest': digests}

    os.makedirs(out_dir, exist_ok=True)
    files = [SavedFile(out_dir, name) for name in names]
    temporaries = [file.temporary for file in files]
    try:
        # Before anything is written: a file that a kill has left may be a second name of last.pt.
        remove(temporaries)
        # The file before the last goes first, so that a save needs room for one file more and not
        # for two, and writes into pages just freed (2.6 s in place of 6.1 on a virtual machine).
        # But only if the one after it is in place, and this process has written that and so knows
        # it to be whole: after a failed rename, the file before the last is all there is.
        for file in files:
            if file.current in _written and os.path.exists(file.current):
                remove([file.previous])
        # A resumed run cuts metrics.jsonl back to this state, so the record must not end before it.
        metrics = os.path.join(out_dir, 'metrics.jsonl')
        if os.path.exists(metrics):
            sync(metrics)

        first, *others = files
        with durable_file(first.temporary) as target:
            _write(checkpoint, target)
        for other in others:
            _give_second_name(first.temporary, other.temporary)
        for file in files:
            if os.path.exists(file.current):
                os.replace(file.current, file.previous)
            os.replace(file.temporary, file.current)
        sync(out_dir)
        _written.update(file.current for file in files)
    finally:
        remove(temporaries)


def _write(checkpoint, file):
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:  # torch's way to report a failed write
        raise OSError(f'torch.save: {error}') from error


def _give_second_name(path, name):
    """Makes name a second name of the file; its bytes are shared, but never written into again."""
    try:
        os.link(path, name)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, name)
        sync(name)


@functools.cache  # later edits to the code do not affect a run that has started
def _provenance():
    """What code makes a checkpoint: the versions of libraries, and this folder's git revision."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'],
                             cwd=os.path.dirname(os.path.abspath(__file__)), timeout=10,
                             capture_output=True, text=True, check=False)
        revision = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None  # git is missing, or hangs on a network disk
    # torch's own word names the build too, as in 2.13.0+cu130.
    versions = {'torch': str(torch.__version__), 'numpy': np.__version__}
    return {'versions': versions, 'git_revision': revision}


# ---- loading ----

def load(path, verified=VERIFIED):
    """The checkpoint at path, as a dict of today's form with its tensors on the CPU.

    verified: the parts whose bytes are checked. UserError, in one sentence, if the file is missing,
    broken, unsafe or of another kind."""
    if not os.path.isfile(path):
        wrong = 'is not a file' if os.path.exists(path) else 'not found'
        raise UserError(f'{path} {wrong}: train a model first, or name another file or folder')
    checkpoint = _read(path)
    problem = problem_of_values(checkpoint) or problem_of_entries(checkpoint)
    if problem is None:
        older_checkpoints.modernize(checkpoint)
        problem = problem_of_weights(checkpoint) or problem_of_bytes(checkpoint, path, verified)
    if problem is not None:
        raise UserError(f'{path} {problem}')
    return checkpoint


def _read(path):
    """What torch.load makes of a file, mapped into memory. UserError if it can't be read safely."""
    with _refusing(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if not _is_written_by_torch(entries, os.path.getsize(path)):
        raise UserError(_refusal(path, ALTERED))
    with _refusing(path):
        _compare_checksums(path)
        # Mapped, the parts that nobody uses (sampling needs no moments) are not read, and ranks
        # share the rest.
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)


@contextlib.contextmanager
def _refusing(path):
    """Turns whatever a library raises for the bytes of a file into a UserError.

    It belongs around calls of libraries alone: bytes that a stranger chose can fail anywhere in
    them, but a bug of ours must keep its traceback."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, 'errno', None) in UNREADABLE:
            raise Unreadable(f'{path} cannot be read now ({error}): try again') from error
        unsafe = re.search(r'[Uu]nsupported [^\n]*?(GLOBAL \S+|class \S+)', str(error))
        reason = f'it asks to run {unsafe[1]}' if unsafe else ALTERED
        raise UserError(_refusal(path, reason)) from error


def _refusal(path, reason):
    return f'{path} is not a checkpoint that can be read safely ({reason})'


def _compare_checksums(path):
    """BadZipFile if an entry, other than a tensor, does not match the checksum beside it."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if '/data/' not in entry.filename:
                archive.read(entry)


def _is_written_by_torch(entries, size):
    """Whether an archive is one of torch.save's: uncompressed, and from the file's first byte on.

    From any other, torch might read something else than the zipfile module has checked."""
    if not entries:
        return False
    begins_late = min(entry.header_offset for entry in entries) > 0
    is_compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    content_size = sum(entry.file_size for entry in entries)
    return not begins_late and not is_compressed and content_size <= size


# ---- choosing ----

def present(out_dir, names=CHECKPOINTS):
    """Paths of the checkpoints in a folder."""
    paths = [os.path.join(out_dir, name) for name in names]
    return [path for path in paths if os.path.exists(path)]


def load_to_sample(out_dir):
    """(checkpoint, path) of ckpt.pt, or of the best substitute; only the weights are verified."""
    return _first_that_loads(present(out_dir), out_dir, verified=('model',))


def load_to_resume(out_dir):
    """(checkpoint, path) of the newest whole state, by its step; on a tie, last.pt."""
    def steps_to_go(path):
        try:
            return -load(path, verified=())['iter_num']
        except UserError:
            # A broken file goes first, so that a warning says it was passed over; a broken older
            # one goes last, since nothing newer is lost with it.
            return math.inf if path.endswith('.prev.pt') else -math.inf

    paths = present(out_dir, ('last.pt', 'ckpt.pt', 'last.prev.pt', 'ckpt.prev.pt'))
    return _first_that_loads(sorted(paths, key=steps_to_go), out_dir)


def _first_that_loads(paths, out_dir, verified=VERIFIED):
    """(checkpoint, path) of the first of these files that is whole; warns of those before it."""
    refusals = []
    for path in paths:
        try:
            checkpoint = load(path, verified)
        except Unreadable:
            raise
        except UserError as error:
            refusals.append(str(error))
            continue
        if refusals:
            step = checkpoint['iter_num']
            warn(f"{'; '.join(refusals)}: using {path} (step {step}) instead")
        return checkpoint, path
    if refusals:
        raise UserError('; '.join(refusals))
    raise UserError(f'{out_dir} holds no checkpoint (last.pt or ckpt.pt): train a model first, or '
                    'name the folder of one with --out_dir')
