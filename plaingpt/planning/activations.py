"""
What the blocks of a GPT keep for the backward pass, in bytes for each token.

In the eager model autograd decides it: these formulas say which tensors its operations save, as
Korthikanti et al. 2022, arXiv 2205.05198, section 4, do for another model. On a CPU the tests
compare them with what autograd does save, to the byte (tests/planning/test_activations.py). In a
model that torch.compile has compiled, its partitioner decides: it computes again what costs no
matrix product, where that takes less memory. docs/planning.md compares the sums on CUDA.

In the comments: T positions, C channels (n_embd), W channels of the queries of all heads (C in most
models), kv channels of the keys (or of the values).
"""
from dataclasses import dataclass

from model import GPTConfig
from plaingpt.planning.counts import heads_width
from plaingpt.system.cpu_kernels import LONGEST_WRITTEN_OUT

# How attention is computed, which decides what it keeps.
FLASH = 'flash'              # by a kernel of torch's that never holds T x T weights
WRITTEN_OUT = 'written out'  # by our CPU kernels, in the precision of the run
MATH = 'math'                # by torch's fall-back on Apple's GPUs, in float32


@dataclass(frozen=True)
class Activations:
    """The activations of a GPT in one precision on one type of device, in bytes a token."""
    config: GPTConfig
    precision: str               # 'float32', 'bfloat16' or 'float16'
    device_type: str             # 'cuda', 'mps' or 'cpu'
    compiled: bool = False       # by torch.compile, on CUDA
    bf16_residual: bool = False  # whether the residual stream is in bfloat16, not in float32
    has_flash: bool = True       # whether the device has FlashAttention: CUDA from Ampere on

    @property
    def in_16_bits(self):
        return self.precision != 'float32'

    @property
    def number_size(self):
        """Bytes of each number that goes into a matrix product or comes out of it."""
        return 2 if self.in_16_bits else 4

    @property
    def residual_size(self):
        """Bytes of each number of the residual stream."""
        return 2 if self.bf16_residual else 4

    @property
    def q_channels(self):
        return heads_width(self.config)

    @property
    def kv_channels(self):
        return self.config.n_kv_head * self.config.head_size

    @property
    def attention_form(self):
        """FLASH, WRITTEN_OUT or MATH."""
        config = self.config
        if self.device_type == 'cpu':  # as in CpuKernels.causal_attention()
            short = config.block_size <= LONGEST_WRITTEN_OUT
            fast = short and self.precision == 'bfloat16'
            return WRITTEN_OUT if config.dropout > 0 or fast else FLASH
        if self.device_type == 'mps' and self._flash_lacks_grouped_heads():
            return MATH
        return FLASH

    def _flash_lacks_grouped_heads(self):
        """Whether heads are grouped, and no kernel without T x T weights takes them as they are."""
        grouped = self.config.n_kv_head < self.config.n_head
        has_bias = self.config.position == 'alibi'
        takes_groups = self.has_flash and self.in_16_bits and not has_bias
        return grouped and not takes_groups

    @property
    def attention_weight_size(self):
        """Bytes of each attention weight, if attention holds them."""
        return 4 if self.attention_form == MATH else self.number_size

    # ---- a block, part by part ----

    def norm(self):
        """Of one norm: its input and, in float32, the mean and deviation of the token.

        RMSNorm has no mean. On a CPU it also keeps its result before the weights."""
        C = self.config.n_embd
        if self.config.norm == 'layernorm':
            # GPUs' autocast copies an input in bfloat16 to float32.
            copies_input = self.device_type != 'cpu' and not self.compiled
            input_size = 4 if copies_input else self.residual_size
            return input_size * C + 4 + 4
        if self.device_type == 'cpu':
            return 4 * C + 4 * C + 4
        return self.residual_size * C + 4

    def attention(self):
        """Of attention: the inputs of c_attn, C numbers, and of c_proj, W, and all between them."""
        projection_inputs = self.number_size * (self.config.n_embd + self.q_channels)
        qk_norm = self._qk_norm() + self._qk_norm_weight()
        return projection_inputs + self._weighted_sum() + qk_norm + self._dropout_mask()

    def _weighted_sum(self):
        """Of attention proper, softmax(q k) v."""
        config = self.config
        W = self.q_channels
        kv = self.kv_channels
        if self.attention_form == FLASH:
            # The kernel keeps q, k and v. They are views of c_attn's output, which has W + 2 kv
            # numbers. If q and k are normalised or turned, they are W + kv numbers of their own,
            # and v still holds all of c_attn's output. For each head, the kernel also keeps the
            # logarithm of the softmax's denominator, in float32.
            numbers = W + 2 * kv
            separate = config.position == 'rope' or config.qk_norm
            if separate:
                numbers += W + kv
            if self.device_type == 'cuda' and self._flash_lacks_grouped_heads():
                # CudaKernels repeats k and v for all heads. Then nothing holds c_attn's output,
                # unless it is q, or the input of the norm of queries and keys.
                numbers += 2 * W
                if separate and not config.qk_norm:
                    numbers -= W + 2 * kv
            return self.number_size * numbers + 4 * config.n_head

        # Here q, k and v have been copied, repeated for all heads, and each head keeps T weights.
        # With dropout, our CPU kernels keep the weights before it and its mask; torch also keeps
        # their product.
        copies = 1
        if config.dropout > 0:
            copies = 2 if self.attention_form == WRITTEN_OUT else 3
        return self.attention_weight_size * (3 * W + copies * config.n_head * config.block_size)

    def _qk_norm(self):
        """Of the norm of queries and keys: its input, in float32, and a deviation for each head."""
        if not self.config.qk_norm:
            return 0
        W = self.q_channels
        kv = self.kv_channels
        deviations = 4 * (self.config.n_head + self.config.n_kv_head)
        if self.device_type == 'cuda':
            return deviations  # the input is part of c_attn's output, in any precision
        if self.in_16_bits:
            return 4 * (W + kv) + deviations  # autocast copies queries and keys to float32
        if self.attention_form == FLASH:
            return deviations  # the input is part of c_attn's output, which v holds anyway
        return 4 * (W + 2 * kv) + deviations  # c_attn's output

    def _qk_norm_weight(self):
        """Of the weights of that norm: the queries and keys that they multiply."""
        if not self.config.qk_norm_weight:
            return 0
        return self.number_size * (self.q_channels + self.kv_channels)

    def mlp(self):
        """Of the MLP: the inputs of its two layers, and what its activation function needs."""
        C = self.config.n_embd
        width = self.config.mlp_width
        # GELU and squared ReLU: the hidden layer before and after. SwiGLU: the gates, their SiLU,
        # which a compiled model computes again, the values, and the product.
        hidden = 2
        if self.config.mlp == 'swiglu':
            hidden = 3 if self.compiled else 4
        numbers = C + hidden * width
        kept = self.number_size * numbers + self._dropout_mask()
        if self.squares_in_float32:
            kept += 4 * width  # a copy of what is squared
        return kept

    @property
    def squares_in_float32(self):
        """Whether the square of squared ReLU is computed in float32, as CUDA's autocast has it."""
        on_cuda = self.device_type == 'cuda' and self.in_16_bits
        return on_cuda and self.config.mlp == 'relu2' and not self.compiled

    def _dropout_mask(self):
        """Of dropout of C channels: a byte each; our CPU kernels keep the mask in x's precision."""
        if self.config.dropout == 0:
            return 0
        mask_size = self.number_size if self.device_type == 'cpu' else 1
        return mask_size * self.config.n_embd
