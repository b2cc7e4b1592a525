"""
What must hold of a checkpoint before anything in it is believed, and the digests that prove it.

Whoever made the file may have put anything into it. The checks come in an order in which each may
rely on those before: plain values, entries of the right type, weights that fit their sizes, bytes
that are the saved ones. Each returns what is wrong as the end of a sentence, or None.
"""
import hashlib
import json
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor

import torch

from plaingpt.training import older_checkpoints

FORMAT_VERSION = 2  # version 1 had another digest
VERIFIED = ('model', 'optimizer')  # the parts that have a digest

# What a checkpoint must hold, and may hold, with the types.
REQUIRED_ENTRIES = {'model': dict, 'model_args': dict, 'iter_num': int, 'config': dict}
OPTIONAL_ENTRIES = {
    'best_val_loss': (int, float, torch.Tensor), 'best_step': int, 'tokens_seen': int,
    'elapsed': (int, float), 'unlogged': int, 'clipped': int, 'skipped': int, 'figures': dict,
    'run_id': str, 'job': (str, type(None)), 'tokenizer': dict, 'lora': (dict, type(None)),
    'scaler': dict, 'moments': int, 'digest': dict, 'format_version': int,
    **older_checkpoints.OPTIONAL_ENTRIES,
}
COUNTS = ('iter_num', 'best_step', 'tokens_seen', 'elapsed', 'unlogged', 'clipped', 'skipped')
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')  # of model_args
OPTIONAL_SIZES = ('n_kv_head', 'head_size', 'mlp_width')
MOST_VALUES = 300_000  # values in a checkpoint; a tensor counts as one
DEEPEST = 30  # levels of dicts and lists in it


# ---- digests and finite numbers ----

def digest(tree):
    """sha256, as hex, of nested dicts and lists: of names, plain values, and tensors.

    Of a tensor the shape, type and bytes count. Tensors are hashed in parallel."""
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        described = []
        for name, leaf in _leaves(tree):
            if isinstance(leaf, torch.Tensor):
                described.append((name, pool.submit(_describe_tensor, leaf)))
            else:
                described.append((name, pool.submit(repr, leaf)))
        for name, description in described:
            whole.update(f'{name}: {description.result()}\n'.encode())
    return whole.hexdigest()


def _describe_tensor(tensor):
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f'{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}'


def _leaves(tree, name=''):
    """(dotted name, value) of each value in nested dicts and lists; empty ones count as values."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, (list, tuple)) and tree:
        items = enumerate(tree)
    else:
        yield name, tree
        return
    for key, value in items:
        yield from _leaves(value, f'{name}.{key}' if name else str(key))


def find_not_finite(tree, tree_name):
    """The dotted name of a tensor in nested dicts and lists that is not all finite, or None."""
    for name, leaf in _leaves(tree, tree_name):
        if not isinstance(leaf, torch.Tensor):
            continue
        # A sum is quick (0.05 s for GPT-2 124M with its moments, where isfinite takes 1.4 s). If
        # it is not finite, it may have overflowed: then look at each number.
        if not torch.isfinite(leaf.sum()) and not torch.isfinite(leaf).all():
            return name
    return None


# ---- checks ----

def problem_of_values(checkpoint):
    """What is wrong unless the file holds plain values and tensors, not too many nor too deep.

    A few bytes can name the same list many times, or a list that holds itself."""
    unsafe = 'is not a checkpoint that can be read safely (it is altered: it holds other values)'
    pending = [(checkpoint, 0)]
    values = 0
    while pending:
        value, depth = pending.pop()
        values += 1
        if values > MOST_VALUES or depth > DEEPEST:
            return unsafe
        if isinstance(value, dict):
            if not all(_is_plain(key) for key in value):
                return unsafe
            pending.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend((item, depth + 1) for item in value)
        elif not isinstance(value, torch.Tensor) and not _is_plain(value):
            return unsafe
    return None


def _is_plain(value):
    """Whether a value is text, a number of usual size, a truth value or None."""
    if isinstance(value, int):
        return abs(value) < 2 ** 64
    return value is None or isinstance(value, (str, float))


def problem_of_entries(checkpoint):
    """What is wrong with the entries that describe the run and the model's sizes, or None."""
    if not isinstance(checkpoint, dict):
        return f'holds a {type(checkpoint).__name__}, not the dict of a training run'
    for key, kind in {**REQUIRED_ENTRIES, **OPTIONAL_ENTRIES}.items():
        is_expected = key in checkpoint or key in REQUIRED_ENTRIES
        if is_expected and not isinstance(checkpoint.get(key), kind):
            return f'has no usable {key!r}: it is not the checkpoint of a training run'
    if not all(0 <= checkpoint.get(key, 0) < 2**53 for key in COUNTS):
        return 'has a step or a time that is impossible'
    version = checkpoint.get('format_version', 1)
    if version > FORMAT_VERSION:
        return f'has format version {version}, not {FORMAT_VERSION}: update the program'
    if not _is_number(checkpoint.get('best_val_loss', math.inf)):
        return 'has a best_val_loss that is not a number'
    return _problem_of_sizes(checkpoint) or _problem_of_plainness(checkpoint)


def _is_number(value):
    """Whether a value is a number, or a tensor that holds one, as nanoGPT's best_val_loss is."""
    if isinstance(value, torch.Tensor):
        if not _is_plain_array(value) or value.numel() != 1:
            return False
        value = value.item()
    return not math.isnan(value)


def _problem_of_sizes(checkpoint):
    args = checkpoint['model_args']
    missing = [key for key in (*SIZES, 'bias') if key not in args]
    if missing:
        names = ' and '.join(missing)
        return f'has no {names} in its model_args: it is not the checkpoint of a GPT'
    if not all(isinstance(key, str) for key in args):
        return 'has model_args without names'
    sizes = [args[key] for key in SIZES]
    for key in OPTIONAL_SIZES:
        if args.get(key) is not None:
            sizes.append(args[key])
    for key in older_checkpoints.BATCH_KEYS:
        sizes.append(checkpoint['config'].get(key, 0))
    if not all(type(size) is int for size in sizes):
        return 'has sizes that are not whole numbers'
    scaling = args.get('rope_scaling')
    if scaling is not None and not _are_factors(scaling):
        return 'has a rope_scaling that is not a dict of numbers above 0'
    return None


def _are_factors(value):
    if not isinstance(value, dict):
        return False
    return all(type(number) in (int, float) and 0 < number < 1e30 for number in value.values())


def _problem_of_plainness(checkpoint):
    described = {}
    for key, value in checkpoint.items():
        if key not in (*VERIFIED, 'best_val_loss'):  # which is infinite before it is known
            described[key] = value
    try:
        json.dumps(described, allow_nan=False)
    except (TypeError, ValueError):
        return 'has entries that are not plain values'
    return None


def problem_of_weights(checkpoint):
    """What is wrong with the form of weights and moments, or None; their bytes are not read."""
    for part in VERIFIED:
        for name, leaf in _leaves(checkpoint.get(part), part):
            if isinstance(leaf, torch.Tensor) and not _is_plain_array(leaf):
                return f'is damaged: {name} is not an array of numbers'
    weights = checkpoint['model']
    if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        return 'is damaged: its weights are not tensors'
    if checkpoint.get('lora'):
        return None  # an adapter is checked against its base

    # A model of this size is allocated next, so the file must hold that many weights.
    args = checkpoint['model_args']
    layers = sum(name.endswith('.attn.c_attn.weight') for name in weights)
    fits = layers == args['n_layer'] and _has_shape(
        weights, 'transformer.wte.weight', args['vocab_size'], args['n_embd'])
    if args.get('position', 'learned') == 'learned':
        fits = fits and _has_shape(
            weights, 'transformer.wpe.weight', args['block_size'], args['n_embd'])
    else:
        fits = fits and 'transformer.wpe.weight' not in weights
    if not fits:
        return 'holds weights that do not fit the model_args beside them'
    return None


def _is_plain_array(tensor):
    """Whether a tensor is a plain array, and claims no more bytes than its file has for it."""
    is_special = tensor.is_quantized or tensor.is_meta or tensor.is_complex()
    if tensor.layout is not torch.strided or is_special:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _has_shape(weights, name, *shape):
    return name in weights and tuple(weights[name].shape) == shape


def problem_of_bytes(checkpoint, path, verified):
    """What is wrong with the bytes of these parts, or None.

    Our digests tell; nanoGPT's files and ours of version 1 only have the archive's checksums."""
    parts = {part: checkpoint[part] for part in verified if part in checkpoint}
    for part, content in parts.items():
        name = find_not_finite(content, part)
        if name is not None:
            return f'is damaged: {name} holds numbers that are not finite'
    if checkpoint.get('format_version') == FORMAT_VERSION:
        saved_digests = checkpoint.get('digest', {})
        for part, content in parts.items():
            if digest(content) != saved_digests.get(part):
                return f'is damaged: the digest of its {part!r} does not match'
    elif parts:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            return f'cannot be checked ({error})'
        if damaged is not None:
            return 'is damaged: its checksums do not match'
    return None
