"""
A block of a quantised GPT on a CPU, which decodes with a few calls of C++.
"""
from torch import nn

from plaingpt.inference.cache import DecodeInCpp
from plaingpt.inference.decoding_kernels import MOST_ROWS
from plaingpt.inference.quantized_weights import TiledMatrix


class DecodingBlock(nn.Module):
    """A Block as model.py has it. While texts are written, its four linear layers also compute the
    norms, the activation and the sums around them.

    Wherever more than a few positions are read, it is the Block itself."""

    def __init__(self, block, config):
        """block: its linear layers are QuantizedLinear, all with a TiledMatrix."""
        super().__init__()
        self.block = block
        self.config = config
        # Whether nothing happens to queries and keys before attention.
        self.heads_are_ready = config.position != 'rope' and not config.qk_norm
        attn, mlp = block.attn, block.mlp
        activation = config.mlp
        if config.mlp == 'gelu' and config.gelu == 'exact':
            activation = 'exact gelu'
        self.make_qkv = _layer(attn.c_attn, norm=block.ln_1)
        self.mix_heads = _layer(attn.c_proj)
        self.widen = _layer(mlp.c_fc, norm=block.ln_2, activation=activation)
        self.narrow = _layer(mlp.c_proj)

    def forward(self, x, angles=None, mask=None, cache=None):
        """The arguments as those of the Block."""
        decodes = cache is not None and cache.decoding and x.size(0) <= MOST_ROWS
        if not decodes or x.size(1) > 1:
            return self.block(x, angles, mask, cache)
        qkv = self.make_qkv.run(x)
        if self.heads_are_ready and isinstance(cache, DecodeInCpp):
            y = cache.attention_together(qkv, self.config)
        else:
            y = self.block.attn.attend(qkv, angles, mask, cache)
        x = self.mix_heads.run(y, residual=x)
        y = self.widen.run(x)
        return self.narrow.run(y, residual=x)


def _layer(linear, norm=None, activation=None):
    """The Layer of a QuantizedLinear."""
    return linear.matrix.layer(linear.bias, norm, activation)


def use_decoding_blocks(gpt):
    """Puts a DecodingBlock in place of each Block of a quantised GPT that can be one."""
    for i, block in enumerate(gpt.transformer.h):
        layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        if all(isinstance(getattr(layer, 'matrix', None), TiledMatrix) for layer in layers):
            gpt.transformer.h[i] = DecodingBlock(block, gpt.config)
