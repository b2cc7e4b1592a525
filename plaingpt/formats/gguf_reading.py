"""
Loads models from GGUF files, the format of llama.cpp: architecture, weights and tokenizer.

Quantised weights become float32 numbers, so that the model trains and generates like any other.
"""
from dataclasses import replace

import torch

from model import GPT
from plaingpt.formats import foreign_weights
from plaingpt.formats.families import FAMILIES, tensors_of
from plaingpt.formats.foreign_weights import BadTensor
from plaingpt.formats.gguf_file import BadGguf, read_gguf
from plaingpt.formats.gguf_metadata import ROPE_FACTORS, config_from, family_of
from plaingpt.formats.gguf_tokenizer_reading import tokenizer_from_gguf
from plaingpt.formats.hugging_face import CannotLoad


def load_gguf(path, overrides=None, weights=True):
    """GPT in float32 with the weights of a GGUF file.

    overrides: {'dropout': float} or None.
    weights=False: random weights in the same shape.
    Takes 4 bytes a parameter besides the file, which is mapped into memory, and those of its
    largest tensor once more. CannotLoad, a ValueError, if the model can't be loaded; UserError if
    the package gguf is missing."""
    dropout = (overrides or {}).get('dropout', 0.0)
    try:
        gguf = read_gguf(path)
        config = replace(_checked_config(gguf), dropout=dropout)
        config = foreign_weights.without_neutral(config, gguf.tensor, 'gguf')
        if weights:
            return foreign_weights.build(config, gguf.tensor, 'gguf')
        return GPT(config)
    except (BadGguf, BadTensor, OSError) as error:
        raise refusal(path, error) from error


def gguf_tokenizer_of(path):
    """The tokenizer dict of a GGUF file.

    CannotLoad if the file can't be read; UserError if its tokenizer is damaged or unsupported, or
    if the package gguf is missing."""
    try:
        gguf = read_gguf(path)
    except (BadGguf, OSError) as error:
        raise refusal(path, error) from error
    return tokenizer_from_gguf(gguf.metadata)


def _checked_config(gguf):
    """The GPTConfig of a GgufFile. BadGguf unless its tensors are those that the model needs.

    Only then are the sizes in the metadata more than claims."""
    config = config_from(gguf)
    family = family_of(gguf.metadata)
    mappings = tensors_of(family, config)
    unknown = set(gguf.tensors) - {ROPE_FACTORS}
    for mapping in mappings:
        for part in mapping.parts:
            if part.gguf not in gguf.tensors:
                raise BadGguf(f'its tensor {part.gguf} is missing')
            unknown.discard(part.gguf)
    if unknown:
        raise BadGguf(f'it has the tensor {min(unknown)}, which no {family.name} has here')

    with torch.device('meta'):  # shapes without memory
        shapes = {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
    for mapping in mappings:
        for part in mapping.parts:
            expected = (part.rows, *shapes[mapping.ours][1:])
            found = gguf.tensors[part.gguf].shape
            if found != expected:
                raise BadGguf(f'its tensor {part.gguf} has the shape {found}, not {expected}')
    return config


def refusal(path, reason):
    """The CannotLoad that says why a GGUF file can't be loaded, and which can."""
    reason = ' '.join(str(reason).split())[:300]  # one line
    return CannotLoad(f'{path} cannot be loaded as a GGUF file ({reason}): give a complete one '
                      f'whose architecture is one of {", ".join(FAMILIES)}')
