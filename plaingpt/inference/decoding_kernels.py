"""
Decoding on a CPU in C++: linear layers of a few rows, attention to the cache, and a whole block of
both in one call.

The code is in cpp/, which says how it is fast. Torch's own operations take its place where it can't
be compiled.
"""
import ctypes
import functools
import os
from typing import NamedTuple

import torch
from torch import nn

from plaingpt.system import native_code

SOURCE = os.path.join(os.path.dirname(__file__), 'cpp', 'decoding.cpp')
GROUP = 32      # numbers of an output that share a scale
STRETCH = 64    # numbers of a row that are looked at together, to find its largest
TILE = 16       # outputs of a quantised matrix that lie side by side

# The numbers of cpp/layer.h.
NORMS = {None: 0, 'layernorm': 1, 'rmsnorm': 2}
ACTIVATIONS = {None: 0, 'gelu': 1, 'exact gelu': 2, 'relu2': 3, 'swiglu': 4}

POINTER = ctypes.c_void_p
SIZE = ctypes.c_int64


class _LayerFields(ctypes.Structure):
    """The Layer of cpp/layer.h, field by field."""
    _fields_ = [
        ('x', POINTER), ('residual', POINTER), ('y', POINTER), ('rows', SIZE), ('threads', SIZE),
        ('weights', POINTER), ('bits', SIZE), ('inputs', SIZE), ('outputs', SIZE),
        ('bias', POINTER), ('norm', SIZE), ('norm_weight', POINTER), ('norm_bias', POINTER),
        ('norm_eps', ctypes.c_double), ('activation', SIZE),
    ]


class _BlockFields(ctypes.Structure):
    """The Block of cpp/block.h, field by field."""
    _fields_ = [
        ('x', POINTER), ('y', POINTER), ('rows', SIZE), ('threads', SIZE), ('keys', POINTER),
        ('values', POINTER), ('slots', POINTER), ('positions', POINTER), ('slopes', POINTER),
        ('room', SIZE), ('make_qkv', POINTER), ('mix_heads', POINTER), ('widen', POINTER),
        ('narrow', POINTER), ('heads', SIZE), ('kv_heads', SIZE), ('size', SIZE),
    ]


class _AttentionFields(ctypes.Structure):
    """The Attention of cpp/attention.h, field by field."""
    _fields_ = [
        ('q', POINTER), ('q_stride', SIZE), ('k', POINTER), ('k_stride', SIZE), ('v', POINTER),
        ('v_stride', SIZE), ('keys', POINTER), ('values', POINTER), ('slots', POINTER),
        ('positions', POINTER), ('slopes', POINTER), ('y', POINTER), ('rows', SIZE),
        ('heads', SIZE), ('kv_heads', SIZE), ('size', SIZE), ('room', SIZE), ('threads', SIZE),
    ]


ARGUMENTS = {
    'run_layer': [POINTER],
    'run_block': [POINTER],
    'dequantise_rows': [POINTER, SIZE, POINTER, POINTER, SIZE, SIZE, SIZE],
    'attend': [POINTER],
    'find_top_k': [POINTER, SIZE, SIZE, SIZE, SIZE, POINTER, POINTER, SIZE],
}
RESULTS = {'find_top_k': ctypes.c_int32}


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
        function.restype = RESULTS.get(name)
    return _Loaded(code, '')


def pointer(tensor):
    """The address of a tensor's first number, or None for None."""
    return None if tensor is None else tensor.data_ptr()


def in_float32(tensor):
    """A tensor in float32, itself if it is, without a gradient; None for None."""
    return None if tensor is None else tensor.detach().float()


class Layer:
    """A linear layer, and what a block computes before and after it:

        y = activation(norm(x) times the transposed weights, plus bias) + residual

    With one call for all of it, a token of GPT-2 takes 1 ms less: each operation of torch costs a
    few microseconds in Python, and more once the weights have driven Python out of the caches."""

    def __init__(self, weights, bits, inputs, outputs, bias=None, norm=None, activation=None):
        """weights: float32 or bfloat16 (outputs, inputs), contiguous; or uint8 tiles as
        cpp/quantized.h describes them; None: only the norm is computed. bits: of a weight, 32, 16,
        8 or 4. inputs: a multiple of GROUP.

        bias: (outputs,), or None. norm: an nn.LayerNorm or nn.RMSNorm of the inputs, or None.
        activation: a key of ACTIVATIONS."""
        norm_name = None
        if norm is not None:
            norm_name = 'layernorm' if isinstance(norm, nn.LayerNorm) else 'rmsnorm'
        bias = in_float32(bias)
        norm_weight = in_float32(getattr(norm, 'weight', None))
        norm_bias = in_float32(getattr(norm, 'bias', None))
        self._tensors = [weights, bias, norm_weight, norm_bias]  # the fields point into them
        self._width = outputs // 2 if activation == 'swiglu' else outputs
        self._fields = _LayerFields(
            weights=pointer(weights), bits=bits, inputs=inputs, outputs=outputs,
            bias=pointer(bias), norm=NORMS[norm_name], norm_weight=pointer(norm_weight),
            norm_bias=pointer(norm_bias), norm_eps=getattr(norm, 'eps', 0.0),
            activation=ACTIVATIONS[activation])
        self.address = ctypes.addressof(self._fields)
        self._run = library().run_layer

    def run(self, x, residual=None):
        """y for x, float32 (…, inputs): (…, outputs), or half of them after SwiGLU.

        residual: as y and contiguous, or None. Only one thread may call it at a time."""
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self._width)
        fields = self._fields
        fields.x = x.data_ptr()
        fields.residual = None if residual is None else residual.data_ptr()
        fields.y = y.data_ptr()
        fields.rows = y.numel() // self._width
        fields.threads = torch.get_num_threads()
        self._run(self.address)
        return y


class BlockOfLayers:
    """A block of a GPT while it decodes: its four Layers, and attention between them, in one call.

    The queries and keys of its heads must need nothing between the first layer and attention."""

    def __init__(self, make_qkv, mix_heads, widen, narrow, config):
        """The Layers, of which mix_heads and narrow have a residual. config: the GPTConfig."""
        self._layers = (make_qkv, mix_heads, widen, narrow)  # the fields point into them
        self._fields = _BlockFields(
            make_qkv=make_qkv.address, mix_heads=mix_heads.address, widen=widen.address,
            narrow=narrow.address, heads=config.n_head, kv_heads=config.n_kv_head,
            size=config.head_size)
        self._address = ctypes.addressof(self._fields)
        self._run = library().run_block

    def run(self, x, keys, values, slots, positions, slopes=None):
        """The block's outputs for x, float32 (R, 1, C), as x; the others as for attention().

        Only one thread may call it at a time."""
        x = x.contiguous()
        y = torch.empty_like(x)
        fields = self._fields
        fields.x = x.data_ptr()
        fields.y = y.data_ptr()
        fields.rows = len(x)
        fields.threads = torch.get_num_threads()
        fields.keys = keys.data_ptr()
        fields.values = values.data_ptr()
        fields.slots = slots.data_ptr()
        fields.positions = positions.data_ptr()
        fields.slopes = pointer(slopes)
        fields.room = keys.size(1)
        self._run(self._address)
        return y


def dequantise(tiles, bits, idx, floats):
    """Fills floats, float32 (…, inputs), with what quantised tiles stand for.

    idx: the outputs, int64 (…), contiguous; or None for all."""
    inputs = floats.size(-1)
    library().dequantise_rows(tiles.data_ptr(), bits, pointer(idx), floats.data_ptr(),
                              floats.numel() // inputs, inputs, torch.get_num_threads())
    return floats


def attention(q, k, v, keys, values, slots, positions, slopes=None):
    """Attention of one new position of each row to its cache, float32 (R, nh, 1, hs).

    q: float32 (R, nh, 1, hs). k, v: the same with nkv heads; they are stored in the cache first.
    Of each, the heads of a row lie together.
    keys, values: the cache, float32 (slots, room, nkv, hs), contiguous.
    slots, positions: int64, R of them: where the new position of each row stands.
    slopes: ALiBi's, (nh,), or None."""
    rows, heads, _, size = q.shape
    room, kv_heads = keys.shape[1:3]
    y = torch.empty(rows, heads, 1, size)
    fields = _AttentionFields(
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        keys.data_ptr(), values.data_ptr(), slots.data_ptr(), positions.data_ptr(),
        pointer(slopes), y.data_ptr(), rows, heads, kv_heads, size, room, torch.get_num_threads())
    library().attend(ctypes.addressof(fields))
    return y


def top_k(numbers, k):
    """As numbers.topk(k), for (rows, columns): (largest, places), each (rows, k).

    200 numbers of 50,257 take a fifth of torch's time. C++ takes the first of equal ones."""
    in_floats = numbers.device.type == 'cpu' and numbers.dtype == torch.float32
    rows, columns = numbers.shape
    # C++ looks at stretches of the row first, and leaves out those with small numbers.
    is_selective = k * STRETCH <= columns and numbers.stride(1) == 1
    if not (in_floats and is_selective) or library() is None:
        return numbers.topk(k, dim=-1)
    largest = torch.empty(rows, k)
    places = torch.empty(rows, k, dtype=torch.int64)
    have_order = library().find_top_k(
        numbers.data_ptr(), rows, numbers.stride(0), columns, k, largest.data_ptr(),
        places.data_ptr(), torch.get_num_threads())
    if not have_order:  # one of them is NaN
        return numbers.topk(k, dim=-1)
    return largest, places
