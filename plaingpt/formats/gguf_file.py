"""
The container GGUF: a file's metadata, and where each of its tensors lies.

A file may claim anything, so each size is checked against the file before it is used. The package
gguf has a reader too, but that one trusts the sizes, and takes 1.5 s for the vocabulary of SmolLM2
where this one takes 0.04 s (AMD EPYC). Its table of tensor types and its dequantization are used.

Format: github.com/ggml-org/ggml, docs/gguf.md.
"""
import importlib.util
import math
import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np
import torch

from plaingpt.system.messages import UserError

MAGIC = b'GGUF'
VERSIONS = (2, 3)  # they differ only in big-endian files, which version 2 does not have
ALIGNMENT = 32     # of tensors, in bytes, unless the metadata has another

# The metadata of the largest vocabularies takes 20 MB. Python's objects for it take some ten times
# as much, so what is far larger could fill the memory.
HEADER_LIMIT = 2 ** 26
DIMENSIONS_LIMIT = 4

# The types of values in the metadata, by their number.
NUMBERS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?',
           10: '<u8', 11: '<i8', 12: '<f8'}
STRING = 8
ARRAY = 9

# The types of tensors that are read: those of GGUF files as most people use them.
TENSOR_TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1',
                'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K')

# Numbers that are dequantised at a time. The package gguf needs about ten bytes for each meanwhile.
NUMBERS_AT_ONCE = 2 ** 21


class BadGguf(ValueError):
    """A GGUF file that can't be read. The message is a reason, for the middle of a sentence."""


class TensorInfo(NamedTuple):
    """Where a tensor lies in its file."""
    shape: tuple  # as torch has it: the last dimension is contiguous
    type: Any     # a gguf.GGMLQuantizationType
    begin: int    # in bytes from the begin of the file
    size: int     # in bytes


class GgufFile(NamedTuple):
    """A GGUF file as read_gguf() returns it."""
    path: str
    metadata: dict   # {key: int, float, bool, str or list of them}
    tensors: dict    # {name: TensorInfo}

    def tensor(self, name):
        """The tensor of this name in float32. BadGguf if the file has become shorter meanwhile."""
        from gguf import quants
        info = self.tensors[name]
        # Read, not mapped: pages of a map would take as much memory as the file is long.
        raw = np.fromfile(self.path, np.uint8, info.size, offset=info.begin)
        if len(raw) < info.size:
            raise BadGguf(f'it has been truncated within the tensor {name}')
        columns = info.shape[-1]
        numbers = np.empty((math.prod(info.shape) // columns, columns), np.float32)
        raw = raw.reshape(len(numbers), -1)
        rows_at_once = max(1, NUMBERS_AT_ONCE // columns)
        for begin in range(0, len(numbers), rows_at_once):
            rows = slice(begin, begin + rows_at_once)
            with np.errstate(all='ignore'):  # damaged numbers may overflow
                numbers[rows] = quants.dequantize(raw[rows], info.type)
        return torch.from_numpy(numbers.reshape(info.shape))


def read_gguf(path):
    """The GgufFile at path.

    BadGguf if the file is damaged, or of a version or type that is not read. UserError if the
    package gguf is missing, OSError if the file can't be opened."""
    check_package()
    if not os.path.isfile(path):
        raise BadGguf('there is no such file')
    with open(path, 'rb') as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BadGguf('it does not begin with the letters GGUF')
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(content)
    header.at = len(MAGIC)
    _check_version(header.number('<u4'))
    tensor_count = header.number('<u8')
    metadata = _read_metadata(header)
    _check_split(metadata)
    tensors = _read_tensor_infos(header, tensor_count, metadata)
    return GgufFile(path, metadata, tensors)


def check_package():
    """UserError if the package gguf is missing."""
    if importlib.util.find_spec('gguf') is None:
        raise UserError('GGUF files need the package gguf: pip install gguf')


# ---- header ----

class _Header:
    """Reads the begin of a file value by value. BadGguf if it would end behind the file."""

    def __init__(self, content):
        self.content = content
        self.at = 0
        self.end = min(len(content), HEADER_LIMIT)

    def take(self, size):
        """The next bytes."""
        begin = self.at
        if size > self.end - begin:
            raise BadGguf('it is truncated, or its header claims sizes that it does not have')
        self.at = begin + size
        return self.content[begin:self.at]

    def number(self, dtype):
        return self.numbers(dtype, 1)[0]

    def numbers(self, dtype, count):
        dtype = np.dtype(dtype)
        return np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()

    def text(self):
        size, = struct.unpack('<Q', self.take(8))
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise BadGguf('its header holds text that is no UTF-8') from None

    def value(self, kind):
        """A value of the type with this number."""
        if kind == ARRAY:
            kind = self.number('<u4')
            count = self.number('<u8')
            if kind == STRING:
                return [self.text() for _ in range(count)]
            return self.numbers(_number_type(kind), count)
        if kind == STRING:
            return self.text()
        return self.number(_number_type(kind))


def _number_type(kind):
    if kind not in NUMBERS:
        raise BadGguf(f'its metadata has values of the unknown type {kind}')
    return NUMBERS[kind]


def _check_version(version):
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, 'big'), 'little')
    if swapped in VERSIONS:
        raise BadGguf('it is big-endian')
    raise BadGguf(f'its version is {version}, not {" or ".join(map(str, VERSIONS))}')


def _read_metadata(header):
    metadata = {}
    count = header.number('<u8')
    for _ in range(count):
        key = header.text()
        if key in metadata:
            raise BadGguf(f'it has two values of {key}')
        kind = header.number('<u4')
        metadata[key] = header.value(kind)
    return metadata


def _check_split(metadata):
    parts = metadata.get('split.count', 1)
    if parts not in (0, 1):
        raise BadGguf(f'it is one of {parts} parts, which llama-gguf-split --merge joins')


def _read_tensor_infos(header, count, metadata):
    """{name: TensorInfo} of the header's last part. BadGguf unless the file holds them all."""
    alignment = metadata.get('general.alignment', ALIGNMENT)
    is_power_of_two = isinstance(alignment, int) and alignment.bit_count() == 1 and alignment > 0
    if not is_power_of_two:
        raise BadGguf(f'its general.alignment is {alignment!r}')
    tensors = {}
    end = 0  # of the tensors so far, counted from the begin of the first
    for _ in range(count):
        name = header.text()
        if name in tensors:
            raise BadGguf(f'it has two tensors {name}')
        dimensions = header.number('<u4')
        if not 1 <= dimensions <= DIMENSIONS_LIMIT:
            raise BadGguf(f'its tensor {name} has {dimensions} dimensions')
        shape = tuple(reversed(header.numbers('<u8', dimensions)))
        tensor_type, size = _type_and_size(name, shape, header.number('<u4'))
        # One tensor follows another. If two could share bytes, a small file could hold a large
        # model.
        begin = _padded(end, alignment)
        if header.number('<u8') != begin:
            raise BadGguf(f'its tensor {name} does not follow the one before it')
        end = begin + size
        tensors[name] = TensorInfo(shape, tensor_type, begin, size)

    first = _padded(header.at, alignment)
    missing = first + end - len(header.content)
    if tensors and missing > 0:
        raise BadGguf(f'it is truncated: {missing:,} bytes of its tensors are missing')
    return {name: info._replace(begin=first + info.begin) for name, info in tensors.items()}


def _type_and_size(name, shape, number):
    """(gguf.GGMLQuantizationType, bytes) of a tensor whose type has this number."""
    import gguf
    try:
        tensor_type = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise BadGguf(f'its tensor {name} has the unknown type {number}') from None
    if tensor_type.name not in TENSOR_TYPES:
        raise BadGguf(f'its tensor {name} has the type {tensor_type.name}, '
                      f'not {", ".join(TENSOR_TYPES)}')
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    count = math.prod(shape)
    if count == 0 or shape[-1] % block != 0:
        raise BadGguf(f'its tensor {name} of type {tensor_type.name} has the shape {shape}')
    return tensor_type, count // block * block_bytes


def _padded(offset, alignment):
    return (offset + alignment - 1) // alignment * alignment
