"""
Getting a GPT ready to generate: its device, its precision and, if asked for, quantised matrices.

These have 8 or 4 bits a number. On a CPU, quantized_weights.py has them; on a GPU, the package
torchao.
"""
import importlib.util

import torch
from torch import nn

from model import Linear
from plaingpt.inference import decoding_kernels
from plaingpt.inference.decoding_block import decode_in_cpp
from plaingpt.inference.decoding_kernels import GROUP
from plaingpt.inference.quantized_weights import TiledMatrix, TorchMatrix, quantize_matrix
from plaingpt.system import large_pages
from plaingpt.system.devices import default_dtype, place
from plaingpt.system.messages import UserError, counted, warn

# What all else is in, beside quantised matrices.
PRECISION_OF_DEVICE = {'cpu': 'float32', 'cuda': 'bfloat16'}
# For more rows of matrices that are not quantised, oneDNN is as fast as C++ of our own.
MOST_ROWS = 16
# A batch that texts join and leave has fewer rows most of the time.
MOST_CHANGING_ROWS = 32


def place_to_generate(gpt, device, dtype, kind='', changing_rows=0):
    """Gets a GPT ready to generate on a torch.device; returns the name of its precision.

    dtype: the config key, 'auto' or a name. kind: 'int8' or 'int4' for quantised matrices, or ''.
    changing_rows: most rows of a batch that texts join and leave, where a row must be computed
    alone as among others; 0: the number of rows stays.
    The gpt, in float32 on the CPU, is changed in place. UserError if it can't be quantised so."""
    if kind:
        check(device, dtype, kind)
        precision_name = PRECISION_OF_DEVICE[device.type]
    elif dtype == 'auto':
        precision_name = default_dtype(device, gpt.config.n_embd, training=False)
    else:
        precision_name = dtype

    on_cpu = device.type == 'cpu'
    if kind and on_cpu:
        quantize_for_cpu(gpt, kind)  # before place(), so that less is moved
    place(gpt, device, getattr(torch, precision_name)).eval()
    if kind and not on_cpu:
        _quantize_for_cuda(gpt, kind)
    if on_cpu and not kind and decoding_kernels.library() is not None:
        large_pages.move(gpt.parameters())
        # Where rows come and go, all numbers of them are computed by the same code.
        if changing_rows <= MOST_CHANGING_ROWS:
            decode_in_cpp(gpt, max(MOST_ROWS, changing_rows))
    return precision_name


def check(device, dtype, kind):
    """UserError unless a torch.device can have quantised matrices, in the precision of the key."""
    if device.type not in PRECISION_OF_DEVICE:
        raise UserError(f'quantize={kind} works on a CPU or a CUDA GPU, not on {device.type}')
    precision_name = PRECISION_OF_DEVICE[device.type]
    if dtype not in ('auto', precision_name):
        where = 'CPU' if device.type == 'cpu' else 'GPU'
        raise UserError(f'dtype={dtype}: with quantize={kind}, a {where} computes in '
                        f'{precision_name}; leave dtype out')
    if device.type == 'cuda' and importlib.util.find_spec('torchao') is None:
        raise UserError(f'quantize={kind} on a GPU needs the package torchao: pip install torchao')


class QuantizedLinear(nn.Module):
    """A linear layer, float32 (…, inputs) to (…, outputs), with a quantised matrix."""

    def __init__(self, matrix, bias):
        """matrix: a TiledMatrix or TorchMatrix; bias: a parameter (outputs,) or None."""
        super().__init__()
        self.matrix = matrix
        self.bias = bias

    def forward(self, x):
        return self.matrix.product(x, self.bias)


class QuantizedEmbedding(nn.Module):
    """The token embedding of a tied GPT: the rows of its quantised head."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, idx):
        return self.matrix.rows(idx)


def quantize_for_cpu(gpt, kind):
    """Quantises the linear layers of a GPT in place, with the embedding if it is tied to the head.

    kind: 'int8' or 'int4'. Layers whose width is no multiple of GROUP stay as they are, which a
    warning says. UserError if no layer can be quantised."""
    layers = _linear_layers(gpt)
    fitting = {name: layer for name, layer in layers.items() if layer.in_features % GROUP == 0}
    if not fitting:
        raise UserError(f'quantize={kind} needs layers with a multiple of {GROUP} channels, and '
                        f'this model has none (n_embd={gpt.config.n_embd}): leave it out')
    if len(fitting) < len(layers):
        warn(f'{counted(len(layers) - len(fitting), "layer")} of {len(layers)} keep their '
             f'precision: their width is no multiple of {GROUP}')
    make_matrix = TiledMatrix
    if decoding_kernels.library() is None:
        make_matrix = TorchMatrix
        warn(f"{decoding_kernels.why_missing()}, so torch's own kernel multiplies quantised "
             'matrices: in bfloat16, and slower')
    gpt.float()
    for name, layer in fitting.items():
        matrix = make_matrix(quantize_matrix(layer.weight, kind))
        gpt.set_submodule(name, QuantizedLinear(matrix, layer.bias))
        if name == 'lm_head' and gpt.config.tied:
            gpt.transformer.wte = QuantizedEmbedding(matrix)
    if make_matrix is TiledMatrix:
        large_pages.move(gpt.get_submodule(name).matrix.tiles for name in fitting)
        decode_in_cpp(gpt, None)


def _linear_layers(gpt):
    """{name: the linear layer of a GPT}."""
    return {name: layer for name, layer in gpt.named_modules() if isinstance(layer, Linear)}


def weight_bytes(gpt):
    """Bytes of the weights of a GPT, quantised or not."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in gpt.parameters())
    for layer in gpt.modules():
        if isinstance(layer, QuantizedLinear):
            total += layer.matrix.bytes
    return total


def _quantize_for_cuda(gpt, kind):
    """Quantises the linear layers of a GPT on a GPU, in bfloat16; the embedding stays as it is."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    def is_linear(layer, name):
        return isinstance(layer, Linear)

    config = Int8WeightOnlyConfig()  # a scale for each output
    if kind == 'int4':
        config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format='tile_packed_to_4d')
    if gpt.config.tied:
        # The head becomes a tensor of its own, and the embedding keeps the shared one.
        gpt.lm_head.weight = nn.Parameter(gpt.lm_head.weight.detach().clone())
    quantize_(gpt, config, filter_fn=is_linear)
