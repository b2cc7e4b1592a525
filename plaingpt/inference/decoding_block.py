"""
The blocks and the head of a GPT on a CPU, where they decode with a few calls of C++.
"""
import torch
from torch import nn

from plaingpt.inference.cache import DecodeInCpp
from plaingpt.inference.decoding_kernels import GROUP, Layer
from plaingpt.inference.quantized_weights import TiledMatrix

BITS = {torch.float32: 32, torch.bfloat16: 16}


class DecodingBlock(nn.Module):
    """A Block as model.py has it. While texts are written, its four linear layers also compute the
    norms, the activation and the sums around them.

    Where prompts are read, or more rows than most_rows, it is the Block itself."""

    def __init__(self, block, config, most_rows):
        super().__init__()
        self.block = block
        self.config = config
        self.most_rows = most_rows
        # Whether nothing happens to queries and keys before attention.
        self.heads_are_ready = config.position != 'rope' and not config.qk_norm
        activation = config.mlp
        if config.mlp == 'gelu' and config.gelu == 'exact':
            activation = 'exact gelu'
        attn, mlp = block.attn, block.mlp
        self.make_qkv = layer_of(attn.c_attn, norm=block.ln_1)
        self.mix_heads = layer_of(attn.c_proj)
        self.widen = layer_of(mlp.c_fc, norm=block.ln_2, activation=activation)
        self.narrow = layer_of(mlp.c_proj)

    def forward(self, x, angles=None, mask=None, cache=None):
        """The arguments as those of the Block."""
        if not isinstance(cache, DecodeInCpp) or x.size(0) > self.most_rows:
            return self.block(x, angles, mask, cache)
        dtype = x.dtype
        x = x.float()
        qkv = self.make_qkv.run(x)
        if self.heads_are_ready:
            y = cache.attention_together(qkv, self.config)
        else:
            y = self.block.attn.attend(qkv, angles, mask, cache)
        x = self.mix_heads.run(y, residual=x)
        y = self.widen.run(x)
        return self.narrow.run(y, residual=x).to(dtype)


class DecodingHead(nn.Module):
    """The head of a GPT, which C++ computes for as many rows as most_rows."""

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
        if x.numel() > self.most_rows * x.size(-1) or torch.compiler.is_compiling():
            return self.linear(x)
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
    """Makes a GPT on the CPU decode up to so many rows in C++, in place, as far as possible."""
    for i, block in enumerate(gpt.transformer.h):
        layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        if all(can_be_layer(layer) for layer in layers):
            gpt.transformer.h[i] = DecodingBlock(block, gpt.config, most_rows)
    if can_be_layer(gpt.lm_head):
        gpt.lm_head = DecodingHead(gpt.lm_head, most_rows)


def decodes_in_cpp(gpt, rows):
    """Whether C++ computes all linear layers of a GPT, where it decodes so many rows."""
    for layer in (*gpt.transformer.h, gpt.lm_head):
        if not isinstance(layer, DecodingBlock | DecodingHead) or rows > layer.most_rows:
            return False
    return True
