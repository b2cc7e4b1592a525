"""
The blocks and the head of a GPT on a CPU, where they decode with a few calls of C++.
"""
import torch
from torch import nn

from plaingpt.inference.cache import DecodeInCpp
from plaingpt.inference.decoding_kernels import GROUP, BlockOfLayers, Layer
from plaingpt.inference.quantized_weights import TiledMatrix

BITS = {torch.float32: 32, torch.bfloat16: 16}


class DecodingBlock(nn.Module):
    """A Block as model.py has it, whose four linear layers also compute the norms, the activation
    and the sums around them. Where it decodes, attention joins them in one call.

    Where prompts are read, or more rows than most_rows, it is the Block itself; with most_rows None
    it never is."""

    def __init__(self, block, config, most_rows):
        super().__init__()
        self.block = block
        self.most_rows = most_rows
        activation = config.mlp
        if config.mlp == 'gelu' and config.gelu == 'exact':
            activation = 'exact gelu'
        attn, mlp = block.attn, block.mlp
        self.make_qkv = layer_of(attn.c_attn, norm=block.ln_1)
        self.mix_heads = layer_of(attn.c_proj)
        self.widen = layer_of(mlp.c_fc, norm=block.ln_2, activation=activation)
        self.narrow = layer_of(mlp.c_proj)
        self.whole = None
        if config.position != 'rope' and not config.qk_norm:
            self.whole = BlockOfLayers(self.make_qkv, self.mix_heads, self.widen, self.narrow,
                                       config)

    def forward(self, x, angles=None, mask=None, cache=None):
        """The arguments as those of the Block."""
        decodes_in_cpp = isinstance(cache, DecodeInCpp)
        if not self._takes(x, decodes_in_cpp):
            return self.block(x, angles, mask, cache)
        dtype = x.dtype
        x = x.float()
        if self.whole is not None and decodes_in_cpp:
            return self.whole.run(x, cache.keys, cache.values, cache.slots, cache.positions,
                                  cache.slopes).to(dtype)
        y = self.block.attn.attend(self.make_qkv.run(x), angles, mask, cache)
        x = self.mix_heads.run(y, residual=x)
        y = self.widen.run(x)
        return self.narrow.run(y, residual=x).to(dtype)

    def _takes(self, x, decodes_in_cpp):
        """Whether this pass is computed here."""
        if torch.compiler.is_compiling():
            return False
        if self.most_rows is None:
            return True
        return decodes_in_cpp and len(x) <= self.most_rows


class DecodingHead(nn.Module):
    """The head of a GPT, which C++ computes for as many rows as most_rows; None: for all."""

    def __init__(self, linear, most_rows):
        super().__init__()
        self.linear = linear
        self.most_rows = most_rows
        self.layer = layer_of(linear)

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        """x: (…, C); returns (…, V)."""
        too_many = self.most_rows is not None and x.numel() > self.most_rows * x.size(-1)
        if too_many or torch.compiler.is_compiling():
            return self.linear(x)
        return self.layer.run(x.float()).to(x.dtype)


class DecodingNorm(nn.Module):
    """The last norm of a GPT in C++, for any number of rows.

    Torch shares out even a single row among the threads of OpenMP. These then go on waiting for
    work for a while, on the cores that those of C++ need."""

    def __init__(self, norm, channels):
        super().__init__()
        self.norm = norm
        self.layer = Layer(None, 0, channels, channels, norm=norm)

    @property
    def weight(self):
        return self.norm.weight

    def forward(self, x):
        """x: (…, C); returns the same."""
        if torch.compiler.is_compiling():
            return self.norm(x)
        return self.layer.run(x.float()).to(x.dtype)


def layer_of(linear, norm=None, activation=None):
    """The Layer of a linear layer that can_be_layer()."""
    if hasattr(linear, 'matrix'):
        return linear.matrix.layer(linear.bias, norm, activation)
    weight = linear.weight.detach()
    return Layer(weight, BITS[weight.dtype], linear.in_features, linear.out_features, linear.bias,
                 norm, activation)


def can_be_layer(linear):
    """Whether C++ can multiply by the matrix of a linear layer, quantised or not."""
    if hasattr(linear, 'matrix'):
        return isinstance(linear.matrix, TiledMatrix)
    fits = linear.in_features % GROUP == 0 and linear.weight.is_contiguous()
    return fits and linear.weight.dtype in BITS


def decode_in_cpp(gpt, most_rows):
    """Makes a GPT on the CPU decode up to so many rows in C++, in place, as far as possible.

    most_rows: None for quantised matrices, which C++ multiplies in any case."""
    for i, block in enumerate(gpt.transformer.h):
        layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        if all(can_be_layer(layer) for layer in layers):
            gpt.transformer.h[i] = DecodingBlock(block, gpt.config, most_rows)
    if can_be_layer(gpt.lm_head):
        gpt.lm_head = DecodingHead(gpt.lm_head, most_rows)
        gpt.transformer.ln_f = DecodingNorm(gpt.transformer.ln_f, gpt.config.n_embd)


def decodes_in_cpp(gpt, rows):
    """Whether C++ computes all linear layers of a GPT, where it decodes so many rows."""
    for layer in (*gpt.transformer.h, gpt.lm_head):
        if not isinstance(layer, DecodingBlock | DecodingHead):
            return False
        if layer.most_rows is not None and rows > layer.most_rows:
            return False
    return True
