"""
Decoding on a CPU in C++: linear layers of a few rows, and attention to the key-value cache.

decoding_kernels.cpp has the code, and says how it is fast. Torch's own operations take its place
where it can't be compiled.
"""
import ctypes
import functools
import os
from typing import NamedTuple

import torch

from plaingpt.system import native_code

SOURCE = os.path.join(os.path.dirname(__file__), 'decoding_kernels.cpp')
GROUP = 32  # numbers of an output that share a scale
TILE = 4    # outputs of a quantised matrix that lie side by side
# More rows are faster as torch's products of large matrices.
MOST_ROWS = 16

POINTER = ctypes.c_void_p
SIZE = ctypes.c_int64
LINEAR = [POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, ctypes.c_int]
DEQUANTISE = [POINTER, POINTER, POINTER, SIZE, SIZE, ctypes.c_int]
ATTENTION = [POINTER, SIZE, POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER, POINTER,
             POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, SIZE, ctypes.c_int]
ARGUMENTS = {
    'linear_int8': LINEAR, 'linear_int4': LINEAR,
    'dequantise_int8': DEQUANTISE, 'dequantise_int4': DEQUANTISE,
    'decode_attention': ATTENTION,
}


def library():
    """The compiled code, a ctypes.CDLL; None where it can't be compiled."""
    return _loaded().code


def why_missing():
    """A sentence that says why library() is None."""
    return _loaded().problem


class _Loaded(NamedTuple):
    code: ctypes.CDLL | None
    problem: str


@functools.cache
def _loaded():
    """The _Loaded of this process; the first call compiles the code unless it is kept."""
    try:
        code = native_code.load(SOURCE)
    except native_code.CannotCompile as error:
        return _Loaded(None, str(error))
    for name, argtypes in ARGUMENTS.items():
        function = getattr(code, name)
        function.argtypes = argtypes
        function.restype = None
    return _Loaded(code, '')


def linear(function, x, weights, bias, outputs):
    """x (…, inputs) float32 times the transposed weights, plus the bias or None: (…, outputs).

    function: one of the library's, for these weights: a contiguous tensor on the CPU."""
    x = x.contiguous()
    inputs = x.size(-1)
    y = torch.empty(*x.shape[:-1], outputs)
    function(x.data_ptr(), weights.data_ptr(), bias.data_ptr() if bias is not None else None,
             y.data_ptr(), x.numel() // inputs, inputs, outputs, torch.get_num_threads())
    return y


def dequantise(function, tiles, idx, floats):
    """Fills floats, float32 (…, inputs), with what quantised tiles stand for.

    idx: the outputs, int64 (…), or None for all."""
    inputs = floats.size(-1)
    function(tiles.data_ptr(), idx.data_ptr() if idx is not None else None, floats.data_ptr(),
             floats.numel() // inputs, inputs, torch.get_num_threads())
    return floats


def attention(q, k, v, keys, values, slots, positions, slopes=None):
    """Attention of one new position of each row to its cache, (R, nh, 1, hs) as q; all float32.

    q: (R, nh, 1, hs); k and v: (R, nkv, 1, hs), which are stored in the cache first.
    keys, values: the cache, (slots, room, nkv, hs), contiguous.
    slots, positions: int64 (R,), where the new position of each row stands.
    slopes: ALiBi's, (nh,), or None."""
    rows, heads, _, size = q.shape
    room, kv_heads = keys.shape[1:3]
    y = torch.empty(rows, heads, 1, size)
    library().decode_attention(
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        keys.data_ptr(), values.data_ptr(), slots.data_ptr(), positions.data_ptr(),
        slopes.data_ptr() if slopes is not None else None, y.data_ptr(),
        rows, heads, kv_heads, size, room, torch.get_num_threads())
    return y
