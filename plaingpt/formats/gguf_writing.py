"""
Writes models to GGUF files, which llama.cpp and the programs around it run.

One tensor at a time is converted and written, so that a large model needs no second copy.
"""
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from plaingpt.formats.families import NoTarget, family_for
from plaingpt.formats.foreign_weights import named_tensors
from plaingpt.formats.gguf_file import check_package
from plaingpt.formats.gguf_metadata import ROPE_FACTORS, metadata_of, rope_factors
from plaingpt.formats.gguf_tokenizer_writing import gguf_metadata_of
from plaingpt.system.messages import warn
from plaingpt.text.tokenizers import load_tokenizer

# The types of the matrices that a file may have: the number that names each in general.file_type,
# and the largest magnitude that it holds. The last three divide rows into blocks of 32 numbers,
# each with a factor in float16: q8_0 has steps from -127 to 127, q4_0 from -8 to 7, and q4_1 from 0
# to 15, above the least number of the block, which is in float16 too.
FILE_TYPES = {'f32': 0, 'f16': 1, 'bf16': 32, 'q8_0': 7, 'q4_0': 2, 'q4_1': 3}
LARGEST = {'F32': 3.4e38, 'F16': 65504, 'BF16': 3.38e38, 'Q8_0': 127 * 65504, 'Q4_0': 8 * 65504,
           'Q4_1': 65504}
IN_BLOCKS = ('q8_0', 'q4_0', 'q4_1')
BLOCK = 32
QUANTIZATION_VERSION = 2  # of the layout of blocks

# As llama.cpp's own converter has it, vectors stay in float32, and so does this matrix, which
# is added to the residual stream as it is.
ALWAYS_FLOAT32 = ('position_embd.weight',)


class _Tensor(NamedTuple):
    """A tensor to write."""
    name: str
    values: Any  # a float32 torch tensor
    type: str    # the name of a gguf.GGMLQuantizationType


def write_gguf(path, gpt, tokenizer_dict, type='f32', name='plainGPT'):
    """Writes a GPT in float32 and its tokenizer to a GGUF file; whatever path holds is lost.

    type: one of FILE_TYPES, for the matrices. name: of the model, for people.
    Rows of the vocabulary that the tokenizer has no token for are left out. Warns if llama.cpp
    computes another GELU than the GPT.
    NoTarget, a ValueError, if llama.cpp can't compute what the GPT does, or if a number is too
    large for the type; UserError if the tokenizer has no place in the file, or if the package gguf
    is missing; OSError if the file can't be written."""
    check_package()
    import gguf
    vocab_size = min(gpt.config.vocab_size, load_tokenizer(tokenizer_dict).vocab_size)
    config = replace(gpt.config, vocab_size=vocab_size)
    metadata = metadata_of(config) | gguf_metadata_of(tokenizer_dict, vocab_size)
    if config.mlp == 'gelu' and config.gelu == 'exact':
        # Of 12 random models, the log-probabilities of the likeliest tokens were up to 0.007 off,
        # and up to 0.005 where the form was the same, since llama.cpp rounds GELU to float16
        # (AMD EPYC).
        warn("llama.cpp has only the tanh form of GELU, and this model has gelu='exact': expect "
             'log-probabilities there that differ by up to 0.01')

    writer = gguf.GGUFWriter(path, family_for(config).name)
    writer.add_type('model')
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key, value in metadata.items():
        _add_value(writer, key, value)
    try:
        # Sizes come first in the file, so the tensors are made twice: few need any arithmetic.
        for tensor in _tensors(gpt, config, type):
            _add_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in _tensors(gpt, config, type):
            writer.write_tensor_data(_converted(tensor))
    finally:
        writer.close()


def _add_value(writer, key, value):
    """Adds an entry of metadata, with the type of value that llama.cpp expects."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tensors(gpt, config, type):
    """Yields each _Tensor of the file. config: the GPTConfig of the file, with its vocabulary."""
    for name, values in named_tensors(gpt, config.vocab_size, 'gguf'):
        in_float32 = values.dim() == 1 or name in ALWAYS_FLOAT32
        yield _Tensor(name, values, 'F32' if in_float32 else _matrix_type(values, type))
    if config.rope_scaling is not None:
        factors = rope_factors(config.rope_theta, config.head_size, config.rope_scaling)
        yield _Tensor(ROPE_FACTORS, factors, 'F32')


def _matrix_type(matrix, type):
    """The type of a matrix in a file: F16 where its rows are not whole blocks."""
    if type in IN_BLOCKS and matrix.shape[1] % BLOCK != 0:
        return 'F16'
    return type.upper()


def _add_info(writer, tensor):
    """Announces a tensor: its name, shape, type and size."""
    import gguf
    tensor_type = gguf.GGMLQuantizationType[tensor.type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    size = tensor.values.numel() // block * block_bytes
    writer.add_tensor_info(tensor.name, tensor.values.shape, np.dtype(np.float32), size,
                           raw_dtype=tensor_type)


def _converted(tensor):
    """The bytes of a tensor, as an array. NoTarget if its type can't hold its numbers."""
    import gguf
    largest = tensor.values.abs().max().item()
    if not largest <= LARGEST[tensor.type]:
        raise NoTarget(f'{tensor.name} has numbers up to {largest:g}, and {tensor.type} ends at '
                       f'{LARGEST[tensor.type]:g}: choose another type')
    values = tensor.values.contiguous().numpy()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.type])
