"""
Checkpoints in an out_dir: saving, loading, verifying, and choosing what to resume.

    ckpt.pt     what sample.py reads: the best by validation loss, or the newest with always_save_checkpoint
    last.pt     the newest complete state, which init_from='resume' continues
    *.prev.pt   the one before each, used when the newer one turns out broken

A checkpoint is a torch.save of a dict with nanoGPT's six keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and ours; nanoGPT's own files are read as they are. It is read as data only, and nothing in it is believed
before it has been checked.
"""
import errno
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
import zipfile
from concurrent.futures import ThreadPoolExecutor

import torch

from plaingpt.system.files import remove, sync
from plaingpt.system.messages import UserError, warn
from plaingpt.training.run_folder import CHECKPOINTS

FORMAT_VERSION = 2  # 1 had another digest
VERIFIED = ('model', 'optimizer')  # the parts that have a digest
JOB = os.environ.get('TORCHELASTIC_RUN_ID')  # torchrun's name for the job, unless it is none
JOB = None if JOB == 'none' else JOB
SHAPE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')  # what model_args must hold
MOST_VALUES = 300_000  # in a checkpoint, where a tensor counts as one
NEEDED = {'model': dict, 'model_args': dict, 'iter_num': int, 'config': dict}
OPTIONAL = {'best_val_loss': (int, float), 'tokens_seen': int, 'elapsed': (int, float), 'scaler': dict, 'digest': dict,
            'tokenizer': dict, 'record': (dict, type(None)), 'run_id': str, 'job': (str, type(None)), 'stale': int,
            'lora': (dict, type(None)), 'moments': int, 'clipped': int, 'unlogged': int}
COUNTS = ('iter_num', 'elapsed', 'clipped', 'unlogged')
UNREADABLE = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)


class Unreadable(UserError):
    """A file that may be whole, but can't be read now: no reason to go on from an older one."""


_written = set()  # the paths of checkpoints that this process has saved


def save(out_dir, checkpoint, names):
    """Writes checkpoint once, atomically, and puts it in place as NAME.pt for each of names ('last', 'ckpt').

    The file under each name before becomes NAME.prev.pt; the one before that goes first, if this process has written
    the one after it, so that a save needs room for one file more and not for two (writing into pages just freed took
    2.6 s in place of 6.1 on a virtual machine). A kill at any moment leaves a complete NAME.pt or NAME.prev.pt. OSError
    if the disk is full or the folder can't be written, ValueError if a number is not finite; NAME.pt stays whole."""
    if unfit := _unfit({part: checkpoint[part] for part in VERIFIED}, finite=True):
        raise ValueError(unfit)
    checkpoint = {**checkpoint, **_provenance(), 'format_version': FORMAT_VERSION,
                  'digest': {part: digest(checkpoint[part]) for part in VERIFIED}}
    os.makedirs(out_dir, exist_ok=True)
    paths, older, temporaries = ([os.path.join(out_dir, form.format(name)) for name in names]
                                 for form in ('{}.pt', '{}.prev.pt', '.{}.pt.tmp'))
    metrics = os.path.join(out_dir, 'metrics.jsonl')
    try:
        remove(temporaries)  # left by a kill, they may be second names of last.pt
        remove(old for path, old in zip(paths, older, strict=True) if path in _written and os.path.exists(path))
        if os.path.exists(metrics):
            sync(metrics)  # which a resumed run cuts back to this state, so it must not end before it
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
                sync(other)
        for path, old, temporary in zip(paths, older, temporaries, strict=True):
            if os.path.exists(path):
                os.replace(path, old)
            os.replace(temporary, path)
        sync(out_dir)
        _written.update(paths)
    finally:
        remove(temporaries)


def digest(tree):
    """sha256, as hex, of nested dicts and lists: names, plain values, and the shapes, types and bytes of tensors, which
    are hashed in parallel."""
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        leaves = [(name, pool.submit(_tensor_digest, leaf).result if isinstance(leaf, torch.Tensor) else
                   functools.partial(repr, leaf)) for name, leaf in _leaves(tree)]
        for name, describe in leaves:
            whole.update(f'{name}: {describe()}\n'.encode())
    return whole.hexdigest()


def _tensor_digest(tensor):
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f'{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}'


def _leaves(tree, name=''):
    """(dotted name, value) of each value in nested dicts and lists, of which empty ones count as values."""
    if isinstance(tree, (dict, list, tuple)) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f'{name}.{key}' if name else str(key))
    else:
        yield name, tree


def _unfit(tree, finite):
    """What is wrong with the tensors of nested dicts and lists, or None: one that is no plain array, or claims more
    than its file holds, or, where finite is asked for, holds a number that is not."""
    for name, leaf in _leaves(tree):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_meta or leaf.is_complex() \
                or leaf.nbytes > leaf.untyped_storage().nbytes():
            return f'{name} is no array of numbers'
        # A sum is quick (0.05 s for GPT-2 124M with its moments, 1.4 s for isfinite); if it overflows, look closer.
        if finite and not torch.isfinite(leaf.sum()) and not torch.isfinite(leaf).all():
            return f'{name} holds numbers that are not finite'
    return None


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


def load(path, verified=VERIFIED):
    """The checkpoint at path, on the CPU: a dict in which the reference's peculiarities are evened out.

    verified: the parts whose bytes are checked. UserError in one sentence if the file is missing, broken, unsafe or of
    another kind."""
    if not os.path.isfile(path):
        wrong = 'is not a file' if os.path.exists(path) else 'not found'
        raise UserError(f'{path} {wrong}: train a model first, or name the folder of one with --out_dir')
    try:
        _check_archive(path)
        # Mapped, what is not used (sampling needs no moments) is not read, and ranks share what they read.
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if any(itertools.islice(_leaves(checkpoint), MOST_VALUES, None)):  # few bytes can name the same list many times
            raise ValueError('it holds too many values')
        complaint = _even_out(checkpoint) or _unverified(checkpoint, path, verified)
    except Exception as error:  # a broken file can fail anywhere in unpickling, and is refused whatever it raises
        unsafe = re.search(r'[Uu]nsupported [^\n]*?(GLOBAL \S+|class \S+)', str(error))
        reason = f'it asks to run {unsafe[1]}' if unsafe else 'it is cut short, altered, or not a file of torch.save'
        if isinstance(error, MemoryError) or getattr(error, 'errno', None) in UNREADABLE:
            raise Unreadable(f'{path} cannot be read now ({error}): try again') from error
        raise UserError(f'{path} is not a checkpoint that can be read safely ({reason})') from error
    if complaint:
        raise UserError(f'{path} {complaint}')
    return checkpoint


def _check_archive(path):
    """Raises if the file is no zip archive as torch.save writes them, from its first byte on and uncompressed, or if
    anything but its tensors does not have the checksum that is stored with it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > os.path.getsize(path) or min(
                entry.header_offset for entry in entries) or any(entry.compress_type for entry in entries):
            raise zipfile.BadZipFile('torch would read something else from it')
        for entry in entries:
            if '/data/' not in entry.filename:
                archive.read(entry)  # which checks


def _even_out(checkpoint):
    """Gives what a checkpoint holds its present form, in place. Returns what is wrong with it, or None."""
    if not isinstance(checkpoint, dict):
        return f'holds a {type(checkpoint).__name__}, not the dict of a training run'
    best = checkpoint.get('best_val_loss')
    if isinstance(best, torch.Tensor) and best.numel() == 1:  # nanoGPT's
        checkpoint['best_val_loss'] = best.item()
    for key, kind in (NEEDED | OPTIONAL).items():
        if (key in checkpoint or key in NEEDED) and not isinstance(checkpoint.get(key), kind):
            return f'has no usable {key!r}: it is not the checkpoint of a training run'
    if not all(0 <= checkpoint.get(key, 0) < 2**53 for key in COUNTS) or math.isnan(checkpoint.get('best_val_loss', 0)):
        return 'has a step, a time or a best_val_loss that cannot be'
    version, weights, args = checkpoint.get('format_version', 1), checkpoint['model'], checkpoint['model_args']
    if not isinstance(version, int) or version > FORMAT_VERSION:
        return f'has format version {version!r}, not {FORMAT_VERSION}: update the program'
    if missing := [key for key in SHAPE if key not in args]:
        return f'has no {" and ".join(missing)} in its model_args: it is not the checkpoint of a GPT'
    batch = [checkpoint['config'].get(key, 0) for key in ('gradient_accumulation_steps', 'batch_size', 'block_size')]
    if not all(type(key) is str for key in args):
        return 'has model_args without names'
    numbers = [*batch, *(args[key] for key in SHAPE if key != 'bias'), args.get('n_kv_head', 1)]
    if not all(type(number) is int for number in numbers):
        return 'has sizes that are no whole numbers'
    json.dumps({key: value for key, value in checkpoint.items() if key not in (*VERIFIED, 'best_val_loss')},
               allow_nan=False)  # raises if anything in them is not plain; no loss is known yet where the best is inf
    if unfit := _unfit({part: checkpoint.get(part) for part in VERIFIED}, finite=False):
        return f'is damaged: {unfit}'
    # A compiled model's names carry a prefix, and nanoGPT on torch 1 kept its attention masks.
    weights = {name.removeprefix('_orig_mod.'): tensor for name, tensor in weights.items()
               if not name.endswith('.attn.bias')}
    positions = [args['block_size'], args['n_embd']] if args.get('position', 'learned') == 'learned' else []
    sizes = {'transformer.wte.weight': [args['vocab_size'], args['n_embd']], 'transformer.wpe.weight': positions}
    layers = sum(name.endswith('.attn.c_attn.weight') for name in weights)
    if not checkpoint.get('lora') and (layers != args['n_layer'] or any(  # an adapter's shapes are its base's
            list(getattr(weights.get(name), 'shape', [])) != size for name, size in sizes.items())):
        return 'holds weights that do not fit the model_args beside them'  # by which memory would be taken for a model
    args.setdefault('gelu', 'exact')  # nanoGPT's only form; ours always name theirs
    checkpoint['model'] = weights
    checkpoint.setdefault('tokens_seen', checkpoint['iter_num'] * math.prod(batch))
    return None


def _unverified(checkpoint, path, verified):
    """Which of these parts is not what was saved, or None if all are: by our digests, or where there are none, as in
    nanoGPT's files and ours of version 1, by the archive's checksums."""
    parts = {part: checkpoint[part] for part in verified if part in checkpoint}
    if unfit := _unfit(parts, finite=True):
        return f'is damaged: {unfit}'
    if checkpoint.get('format_version') == FORMAT_VERSION:
        wrong = [part for part in parts if digest(parts[part]) != checkpoint['digest'][part]]
        return f'is damaged: the digest of its {wrong[0]!r} does not match' if wrong else None
    with zipfile.ZipFile(path) as archive:
        return 'is damaged: its checksums do not match' if parts and archive.testzip() else None


def present(out_dir, names=CHECKPOINTS):
    """Paths of the checkpoints in a folder."""
    return [path for name in names if os.path.exists(path := os.path.join(out_dir, name))]


def _first_that_loads(paths, out_dir, verified=VERIFIED):
    """(checkpoint, path) of the first of these files of out_dir that is whole; broken ones before it are warned of."""
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
            warn(f"{'; '.join(refusals)}: using {path} (step {checkpoint['iter_num']}) instead")
        return checkpoint, path
    raise UserError('; '.join(refusals) or f'{out_dir} holds no checkpoint (last.pt or ckpt.pt): train a model first, '
                    'or name the folder of one with --out_dir')


def load_to_sample(out_dir):
    """(checkpoint, path) of ckpt.pt, else of what stands in for it; only the weights are verified."""
    return _first_that_loads(present(out_dir), out_dir, ('model',))


def load_to_resume(out_dir):
    """(checkpoint, path) of the newest whole state, by the steps done, and of last.pt where two have done as many."""
    def steps_to_go(path):
        try:
            return -load(path, verified=())['iter_num']
        except UserError:  # to be warned of, where something newer can be missed by it
            return math.inf if path.endswith('.prev.pt') else -math.inf

    paths = present(out_dir, ('last.pt', 'ckpt.pt', 'last.prev.pt', 'ckpt.prev.pt'))
    return _first_that_loads(sorted(paths, key=steps_to_go), out_dir)


def to_continue(out_dir, init_from, restarted):
    """(init_from, checkpoint, path) with which a run starts; the checkpoint is {} where nothing is resumed.

    'auto' is 'resume' if out_dir holds a run, and 'scratch' if not. A job that torchrun has restarted (--max-restarts)
    continues what it has saved, whatever it first started from."""
    if init_from == 'resume' or (init_from == 'auto' or restarted and JOB) and present(out_dir):
        checkpoint, path = load_to_resume(out_dir)
        if init_from in ('resume', 'auto') or checkpoint.get('job') == JOB:
            return 'resume', checkpoint, path
    return 'scratch' if init_from == 'auto' else init_from, {}, None


def in_words(checkpoint, path, config, unsaid):
    """What is resumed, and which keys of config, but those unsaid, have changed since it was saved."""
    saved = checkpoint['config']
    changes = [f'{key} {saved[key]!r} -> {value!r}' for key, value in config.items()
               if saved.get(key, value) != value and key not in unsaid]
    return f"resuming {path} at step {checkpoint['iter_num']}" + '; now ' * bool(changes) + ', '.join(changes)


def fingerprint(checkpoint):
    """24 bits by which processes find out whether they have loaded the same state."""
    state = repr([checkpoint.get(key) for key in ('iter_num', 'digest')])
    return int(hashlib.sha256(state.encode()).hexdigest()[:6], 16)


def data_set(checkpoint, path, given=None):
    """Name of the data set that a checkpoint was trained on. UserError if it leads out of data/, where whoever made the
    file may have put anything, unless it is the one that the user has given as well."""
    name = checkpoint['config'].get('dataset', given)
    if name == given is not None or isinstance(name, str) and re.fullmatch(r'\w[\w.-]*', name):
        return name
    raise UserError(f'{path} was trained on the data set {str(name)[:200]!r}, which is not a folder in data/: if you '
                    'trust it, name it yourself with --dataset')


def restore_model(model, checkpoint, path):
    """Copies the checkpoint's weights into model; UserError if they are not those of this shape."""
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as error:
        details = ' '.join(str(error).split())[:300]
        raise UserError(f'the weights in {path} do not fit the model_args beside them ({details})') from error


def restore_optimizer(optimizer, scaler, checkpoint, path):
    """Copies the checkpoint's moments into optimizer, whose own learning rate, betas and decay stay in force, and its
    loss scale into scaler."""
    groups = optimizer.state_dict()['param_groups']
    saved = checkpoint.get('optimizer')
    state = saved.get('state') if isinstance(saved, dict) else None
    needed = [{'momentum_buffer': parameter.shape} if 'ns_steps' in group else  # Muon's
              {'step': torch.Size(), 'exp_avg': parameter.shape, 'exp_avg_sq': parameter.shape}
              for group in optimizer.param_groups for parameter in group['params']]
    # What has been frozen until now has no moments: of how many parameters there are some is saved beside them. Before
    # that was so, the config alone told that something was frozen.
    run = checkpoint.get('config', {})
    frozen = 'moments' not in checkpoint and (run.get('trainable', 'all') != 'all' or run.get('unfreeze'))
    fits = isinstance(state, dict) and (frozen or len(state) == checkpoint.get('moments', len(needed))) and all(
        isinstance(moments, dict) and {name: getattr(value, 'shape', None) for name, value in moments.items()}
        == dict(enumerate(needed)).get(i) for i, moments in state.items())
    if not fits:
        raise UserError(f'the optimizer state in {path} is missing, or of another model or optimizer: resume with the '
                        f'optimizer that it was saved by, or begin a new run with --init_from={path}')
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
    for moments in optimizer.state.values():  # on a CPU they are still the file's memory map
        moments.update({name: tensor.clone() for name, tensor in moments.items() if tensor.device.type == 'cpu'})
    scale = checkpoint.get('scaler') or scaler.state_dict()  # a run in another precision has none
    if scaler.is_enabled() and not all(isinstance(scale.get(key), (int, float)) for key in scaler.state_dict()):
        raise UserError(f'the scaler state in {path} is incomplete')
    scaler.load_state_dict(scale)
