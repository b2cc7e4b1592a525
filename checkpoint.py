"""
An out_dir: saving, loading, verifying, and choosing what to resume.

    ckpt.pt        what sample.py reads: the best by validation loss, or the newest with always_save_checkpoint
    last.pt        the newest complete state, which init_from='resume' continues
    *.prev.pt      the one before each, used when the newer one turns out broken
    metrics.jsonl  one JSON object a step that was logged or evaluated
    replaced/N/    the runs that were here before a new one started

A checkpoint is a torch.save of a dict with nanoGPT's six keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and ours; nanoGPT's own files are read as they are.
"""
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import subprocess

import torch

from runtime import UserError, warn

FORMAT_VERSION = 1
DIGESTED = ('model', 'optimizer')
RUN = ('ckpt.pt', 'ckpt.prev.pt', 'last.pt', 'last.prev.pt', 'metrics.jsonl')  # the files of one
SHAPE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')  # what model_args must hold
NEEDED = {'model': dict, 'model_args': dict, 'iter_num': int, 'config': dict}


# ---- saving ----

def save(out_dir, checkpoint, names):
    """Writes checkpoint once, atomically, and puts it in place as NAME.pt for each of names ('last', 'ckpt').

    The file under each name before becomes NAME.prev.pt. A kill at any moment leaves a complete NAME.pt or
    NAME.prev.pt. OSError if the disk is full or the folder can't be written; what was there before stays whole."""
    checkpoint = {**checkpoint, **_provenance(), 'format_version': FORMAT_VERSION,
                  'digest': {part: digest(checkpoint[part]) for part in DIGESTED}}
    os.makedirs(out_dir, exist_ok=True)
    temporaries = [os.path.join(out_dir, f'.{name}.pt.tmp') for name in names]
    _remove(temporaries)  # left by a kill, they may be second names of last.pt
    try:
        with open(temporaries[0], 'wb') as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                raise OSError(f'torch.save: {error}') from error  # which it is: a write has failed
            file.flush()
            os.fsync(file.fileno())
        for other in temporaries[1:]:  # names of one file, which is only ever replaced, never written into
            try:
                os.link(temporaries[0], other)
            except OSError:  # a file system without hard links
                shutil.copyfile(temporaries[0], other)
        for name, temporary in zip(names, temporaries, strict=True):
            path = os.path.join(out_dir, f'{name}.pt')
            if os.path.exists(path):
                os.replace(path, os.path.join(out_dir, f'{name}.prev.pt'))
            os.replace(temporary, path)
        _sync_folder(out_dir)
    finally:
        _remove(temporaries)


def digest(tree):
    """sha256, as hex, of nested dicts and lists: keys, plain values, and the shapes, types and bytes of tensors."""
    sha256 = hashlib.sha256()

    def update(node):
        if isinstance(node, torch.Tensor):
            sha256.update(f'{tuple(node.shape)}{node.dtype}'.encode())
            sha256.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(node, dict):
            for key, value in node.items():
                sha256.update(repr(key).encode())
                update(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                update(value)
        else:
            sha256.update(repr(node).encode())

    update(tree)
    return sha256.hexdigest()


@functools.cache  # once: what is edited while a run goes on does not run
def _provenance():
    """What code made a checkpoint: the versions of the libraries, and the git revision of this folder if it has one."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], capture_output=True, text=True,
                             cwd=os.path.dirname(os.path.abspath(__file__)), timeout=10, check=False)
        revision = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None  # git is not installed, or hangs on a network disk: the revision stays unknown
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'numpy')}
    return {'versions': versions, 'git_revision': revision}


def _remove(paths):
    for path in paths:
        if os.path.exists(path):
            os.remove(path)


def _sync_folder(folder):
    if os.name == 'posix':  # elsewhere a folder can't be opened, and a rename is durable by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def set_aside(out_dir):
    """Moves the run that an out_dir holds into the next out_dir/replaced/N, so that a new one can't mix with it."""
    found = [name for name in RUN if os.path.exists(os.path.join(out_dir, name))]
    if found:
        numbers = (os.path.join(out_dir, 'replaced', str(n)) for n in itertools.count(1))
        replaced = next(folder for folder in numbers if not os.path.exists(folder))
        os.makedirs(replaced)
        for name in found:
            os.replace(os.path.join(out_dir, name), os.path.join(replaced, name))
        warn(f'{out_dir} held another run, which is now in {replaced}')


def cut_metrics(out_dir, step):
    """Drops from metrics.jsonl what it says of later steps than this one."""
    path = os.path.join(out_dir, 'metrics.jsonl')
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # it is no record: spoilt by a kill or a crash
                if line.endswith('\n') and json.loads(line)['step'] <= step:
                    kept.append(line)
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.writelines(kept)
    os.replace(path + '.tmp', path)


# ---- loading ----

def load(path, digested=DIGESTED):
    """The checkpoint at path, on the CPU: a dict in which the reference's peculiarities are evened out.

    digested: the parts whose digest is verified (one that has none, as nanoGPT's, passes). UserError in one sentence if
    the file is missing, broken, unsafe or of another kind."""
    if not os.path.isfile(path):
        raise UserError(f'{path} not found: train a model first, or name the folder of one with --out_dir')
    try:
        # Mapped, what is not used (sampling needs no moments) is not read, and ranks share what they read.
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # a broken file can fail anywhere in unpickling, and is refused whatever it raises
        unsafe = re.search(r'[Uu]nsupported [^\n]*?(GLOBAL \S+|class \S+)', str(error))
        reason = f'it asks to run {unsafe[1]}' if unsafe else 'it is cut short, or not a file of torch.save'
        if isinstance(error, PermissionError):
            reason = error.strerror
        raise UserError(f'{path} is not a checkpoint that can be read safely ({reason})') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__}, not the dict of a training run')
    for key, kind in NEEDED.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f'{path} has no usable {key!r}: it is not the checkpoint of a training run')
    if missing := [key for key in SHAPE if key not in checkpoint['model_args']]:
        raise UserError(f'{path} has no {" and ".join(missing)} in its model_args: it is not the checkpoint of a GPT')
    version, digests = checkpoint.get('format_version', FORMAT_VERSION), checkpoint.get('digest', {})
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f'{path} has format version {version!r}, not {FORMAT_VERSION}: update the program')
    if not isinstance(digests, dict):
        raise UserError(f"{path} has no usable 'digest': it is not the checkpoint of a training run")
    for part in digested:
        if part in digests and part in checkpoint and digest(checkpoint[part]) != digests[part]:
            raise UserError(f'{path} is damaged: the digest of its {part!r} does not match')
    # A compiled model's names carry a prefix, and nanoGPT on torch 1 kept its attention masks.
    checkpoint['model'] = {name.removeprefix('_orig_mod.'): tensor for name, tensor in checkpoint['model'].items()
                           if not name.endswith('.attn.bias')}
    checkpoint['model_args'].setdefault('gelu', 'exact')  # nanoGPT's only form; ours always name theirs
    sizes = (checkpoint['config'].get(key, 0) for key in ('gradient_accumulation_steps', 'batch_size', 'block_size'))
    checkpoint.setdefault('tokens_seen', checkpoint['iter_num'] * math.prod(sizes))
    return checkpoint


def _first_that_loads(out_dir, names, digested=DIGESTED):
    """(checkpoint, path) of the first of these files that is there and whole; broken ones before it are warned of."""
    refusals = []
    for path in [path for name in names if os.path.exists(path := os.path.join(out_dir, name))]:
        try:
            checkpoint = load(path, digested)
        except UserError as error:
            refusals.append(str(error))
            continue
        if refusals:
            warn(f"{'; '.join(refusals)}: using {path} (step {checkpoint['iter_num']}) instead")
        return checkpoint, path
    raise UserError('; '.join(refusals) or f'{out_dir} holds no checkpoint ({" or ".join(names[::2])}): train a model '
                    'first, or name the folder of one with --out_dir')


def load_to_sample(out_dir):
    """(checkpoint, path) of ckpt.pt, else of what stands in for it; only the weights are verified."""
    return _first_that_loads(out_dir, ('ckpt.pt', 'ckpt.prev.pt', 'last.pt', 'last.prev.pt'), ('model',))


def load_to_resume(out_dir):
    """(checkpoint, path) of the newest state: last.pt, or ckpt.pt when that is further or alone, or the ones before."""
    checkpoint, path = _first_that_loads(out_dir, ('last.pt', 'last.prev.pt', 'ckpt.pt', 'ckpt.prev.pt'))
    best = os.path.join(out_dir, 'ckpt.pt')
    if os.path.exists(best) and not os.path.samefile(path, best):
        try:
            if load(best, digested=())['iter_num'] > checkpoint['iter_num']:
                return load(best), best
        except UserError as error:
            warn(str(error))
    return checkpoint, path


# ---- into a model ----

def restore_model(model, checkpoint, path):
    """Copies the checkpoint's weights into model; UserError if they are not those of this shape."""
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as error:
        details = ' '.join(str(error).split())[:300]
        raise UserError(f'the weights in {path} do not fit the model_args beside them ({details})') from error


def restore_optimizer(optimizer, checkpoint, path):
    """Copies the checkpoint's moments into optimizer, whose own learning rate, betas and decay stay in force."""
    groups = optimizer.state_dict()['param_groups']
    saved = checkpoint.get('optimizer')
    state = saved.get('state') if isinstance(saved, dict) else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    fits = isinstance(state, dict) and all(
        i in range(len(parameters)) and all(
            name in moments and moments[name].shape == parameters[i].shape for name in ('exp_avg', 'exp_avg_sq'))
        for i, moments in state.items())
    if not fits:
        raise UserError(f'the optimizer state in {path} is missing or of another model')
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
    for moments in optimizer.state.values():  # on a CPU they are still the file's memory map
        moments.update({name: tensor.clone() for name, tensor in moments.items() if tensor.device.type == 'cpu'})
