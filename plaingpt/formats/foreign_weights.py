"""
The weights of a GPT in the files of other programs: builds a GPT from their tensors, and gives its
parameters as the tensors that they expect. families.py says which tensor holds what.
"""
from dataclasses import replace

import torch

from model import GPT
from plaingpt.formats.families import constants_of, family_for, tensors_of

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class BadTensor(ValueError):
    """A tensor of a file that no GPT can have. The message names it."""


# ---- in ----

def without_neutral(config, read, form):
    """The GPTConfig without the options whose tensors all hold a Constant's value.

    They are those that the export of a GPT without these options has added.
    config: the GPTConfig that the file describes; read, form: as in build()."""
    for option in ('bias', 'qk_norm_weight'):
        without = replace(config, **{option: False})
        constants = constants_of(family_for(without), without)
        if getattr(config, option) and constants and _all_hold(constants, read, form):
            config = without
    return config


def _all_hold(constants, read, form):
    for constant in constants:
        tensor = read(getattr(constant, form))
        if tuple(tensor.shape) != constant.shape or (tensor != constant.value).any():
            return False
    return True


def build(config, read, form):
    """The GPT of a GPTConfig, in float32, with the tensors of a file.

    read: a function from a tensor's name in the file to the tensor, of any float dtype.
    form: 'hugging_face' or 'gguf', which decides on names, and on the order of rows.
    Takes 4 bytes a parameter, and no more than the largest tensor besides what read() takes.
    BadTensor if a tensor has the wrong shape, holds no floats, or is not finite."""
    with torch.device('meta'):  # no memory yet: the sizes are only claimed
        gpt = GPT(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in gpt.named_parameters()}
    state = {}
    for mapping in tensors_of(family_for(config), config):
        state[mapping.ours] = _joined(mapping, read, form, shapes[mapping.ours])
    if config.tied:
        state['lm_head.weight'] = state['transformer.wte.weight']
    gpt.load_state_dict(state, assign=True)
    if config.tied:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    return gpt


def _joined(mapping, read, form, shape):
    """One of our parameters, float32 of this shape, from its parts in a file."""
    parts = []
    for part in mapping.parts:
        name = getattr(part, form)
        tensor = read(name)
        if tensor.dtype not in FLOATS:
            raise BadTensor(f'{name} is {tensor.dtype}, not a float tensor')
        if mapping.transposed and form == 'hugging_face':
            tensor = tensor.t()
        expected = (part.rows, *shape[1:])
        if tuple(tensor.shape) != expected:
            raise BadTensor(f'{name} has the shape {tuple(tensor.shape)}, expected {expected}')
        if part.heads is not None and form == 'gguf':
            tensor = unpermuted(tensor, part.heads)
        parts.append(tensor)
    # All parts are as large as claimed, so the memory for the whole can be taken.
    joined = torch.empty(shape)
    for rows, tensor in zip(joined.split([part.rows for part in mapping.parts]), parts,
                            strict=True):
        rows.copy_(tensor)
    if not torch.isfinite(joined).all():
        raise BadTensor(f'{getattr(mapping.parts[0], form)} holds numbers that are not finite')
    return joined


# ---- out ----

@torch.no_grad()
def named_tensors(gpt, vocab_size, form):
    """Yields (name, float32 tensor) of all tensors that a file in this form needs.

    They are views of the parameters where possible, so they may not be contiguous.
    vocab_size: rows of embedding and head to keep: without those that only pad the vocabulary.
    NoTarget if no family computes what the GPT does."""
    config = replace(gpt.config, vocab_size=vocab_size)
    family = family_for(config)
    state = gpt.state_dict()
    for mapping in tensors_of(family, config):
        tensor = state[mapping.ours]
        if mapping.ours in ('transformer.wte.weight', 'lm_head.weight'):
            tensor = tensor[:vocab_size]
        rows = [part.rows for part in mapping.parts]
        for part, piece in zip(mapping.parts, tensor.split(rows), strict=True):
            if mapping.transposed and form == 'hugging_face':
                piece = piece.t()
            if part.heads is not None and form == 'gguf':
                piece = permuted(piece, part.heads)
            yield getattr(part, form), piece
    for constant in constants_of(family, config):
        yield getattr(constant, form), torch.full(constant.shape, constant.value)


# ---- the order of rows in GGUF ----

def permuted(rows, heads):
    """The rows of queries or keys as GGUF's llama has them; (heads hs,) or (heads hs, C).

    Rope turns channels i and i + hs/2 of a head together; in GGUF's llama they are neighbours."""
    halves = rows.view(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def unpermuted(rows, heads):
    """The reverse of permuted()."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
