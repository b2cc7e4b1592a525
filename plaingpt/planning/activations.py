"""
What the blocks of a GPT keep for the backward pass, in bytes for each token.

Autograd decides it: these formulas say which tensors the operations of the eager model save, as
Korthikanti et al. 2022, arXiv 2205.05198, section 4, do for another model. On a CPU the tests
compare them with what autograd does save, to the byte (tests/planning/test_activations.py); on
GPUs nothing has been measured.

In the comments: T positions, C channels (n_embd), kv channels of the keys (or of the values).
"""
from dataclasses import dataclass

from model import GPTConfig

# How attention is computed, which decides what it keeps.
FLASH = 'flash'              # by a kernel of torch's that never holds T x T weights
WRITTEN_OUT = 'written out'  # by our CPU kernels, in the precision of the run
MATH = 'math'                # by torch's fall-back on GPUs, in float32


@dataclass(frozen=True)
class Activations:
    """The activations of a GPT in one precision on one type of device, in bytes a token."""
    config: GPTConfig
    precision: str    # 'float32', 'bfloat16' or 'float16'
    device_type: str  # 'cuda', 'mps' or 'cpu'

    @property
    def in_16_bits(self):
        return self.precision != 'float32'

    @property
    def number_size(self):
        """Bytes of each number that goes into a matrix product or comes out of it."""
        return 2 if self.in_16_bits else 4

    @property
    def kv_channels(self):
        return self.config.n_kv_head * self.config.head_size

    @property
    def attention_form(self):
        """FLASH, WRITTEN_OUT or MATH."""
        config = self.config
        if self.device_type == 'cpu':  # as in CpuKernels.causal_attention()
            short = self.precision == 'bfloat16' and config.block_size <= 512
            return WRITTEN_OUT if config.dropout > 0 or short else FLASH
        # On GPUs no kernel takes grouped heads with a bias, nor grouped heads in float32.
        grouped = config.n_kv_head < config.n_head
        has_bias = config.position == 'alibi'
        if grouped and (has_bias or not self.in_16_bits):
            return MATH
        return FLASH

    @property
    def attention_weight_size(self):
        """Bytes of each attention weight, if attention holds them."""
        return 4 if self.attention_form == MATH else self.number_size

    # ---- a block, part by part ----

    def norm(self):
        """Of one norm: its input, in float32, and the mean and deviation of the token.

        RMSNorm has no mean, but on a CPU it also keeps its result before the weights."""
        C = self.config.n_embd
        if self.config.norm == 'layernorm':
            return 4 * C + 4 + 4
        if self.device_type == 'cpu':
            return 4 * C + 4 * C + 4
        return 4 * C + 4

    def attention(self):
        """Of attention: the inputs of c_attn and c_proj, C numbers each, and all between them."""
        projection_inputs = 2 * self.number_size * self.config.n_embd
        return projection_inputs + self._weighted_sum() + self._qk_norm() + self._dropout_mask()

    def _weighted_sum(self):
        """Of attention proper, softmax(q k) v."""
        config = self.config
        C = config.n_embd
        kv = self.kv_channels
        if self.attention_form == FLASH:
            # The kernel keeps q, k and v. They are views of c_attn's output, which has C + 2 kv
            # numbers. If q and k are normalised or turned, they are C + kv numbers of their own,
            # and v still holds all of c_attn's output. For each head, the kernel also keeps the
            # logarithm of the softmax's denominator, in float32.
            numbers = C + 2 * kv
            if config.position == 'rope' or config.qk_norm:
                numbers += C + kv
            return self.number_size * numbers + 4 * config.n_head

        # Here q, k and v have been copied, repeated for all heads, and each head keeps T weights.
        # Dropout keeps the weights before it, its mask, and the product of the two.
        copies = 3 if config.dropout > 0 else 1
        return self.attention_weight_size * (3 * C + copies * config.n_head * config.block_size)

    def _qk_norm(self):
        """Of the norm of queries and keys: its input, in float32, and a deviation for each head."""
        if not self.config.qk_norm:
            return 0
        C = self.config.n_embd
        kv = self.kv_channels
        deviations = 4 * (self.config.n_head + self.config.n_kv_head)
        if self.in_16_bits:
            return 4 * (C + kv) + deviations  # autocast copies queries and keys to float32
        if self.attention_form == FLASH:
            return deviations  # the input is part of c_attn's output, which v holds anyway
        return 4 * (C + 2 * kv) + deviations  # c_attn's output

    def mlp(self):
        """Of the MLP: the inputs of its two layers, and what its activation function needs."""
        # GELU and squared ReLU: the hidden layer before and after. SwiGLU: the gates, their SiLU,
        # the values, and the product.
        hidden = 4 if self.config.mlp == 'swiglu' else 2
        numbers = self.config.n_embd + hidden * self.config.mlp_width
        return self.number_size * numbers + self._dropout_mask()

    def _dropout_mask(self):
        """Of dropout of C channels: a byte each; our CPU kernels keep the mask in x's precision."""
        if self.config.dropout == 0:
            return 0
        mask_size = self.number_size if self.device_type == 'cpu' else 1
        return mask_size * self.config.n_embd
