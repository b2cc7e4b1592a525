"""
Faster CPU versions of dropout, attention in training, and the loss.

Times are medians of a forward and backward pass on 2 cores of an AMD EPYC with AVX512-BF16;
experiments/what_pays.py measures them again.
"""
import math

import torch
from torch.nn import functional as F

from model import Kernels
from plaingpt.system.seeds import mixed_seed

WEIGHTS_AT_ONCE = 2 ** 21  # attention weights, which then stay in a core's cache


class CpuKernels(Kernels):
    """Kernels for eager models on a CPU. While torch.compile traces, they are torch's own.

    Dropout is drawn row by row, and the mask of a row depends on torch's CPU seed and the row's
    number alone: ranks that share the rows of a micro-batch draw what one rank would have drawn."""

    def __init__(self):
        self.set_rows(0, 1)

    def set_rows(self, first, stride):
        """Says which rows of the micro-batch the next tensors hold: first, first + stride, …"""
        self.first_row = first
        self.row_stride = stride

    @property
    def prefers_loss_in_parts(self):
        return not torch.compiler.is_compiling()

    def dropout(self, x, p):
        # 16 x 256 x 384 elements take 3 ms, against 11 for F.dropout.
        if torch.compiler.is_compiling():
            return super().dropout(x, p)
        keep = self.keep_mask(self.draw_seed(), x.shape, p, x.dtype)
        return x * keep.mul_(1 / (1 - p))

    def causal_attention(self, q, k, v, p, bias=None, grouped=False):
        """Writes attention out, some sequences at a time, where that is faster than torch's kernel.

        16 sequences x 6 heads x 256 positions x 64 in bfloat16: 34 ms against 51; with dropout 38
        against 147, in float32 78 against 124. Without dropout torch's kernel is as fast at 1024
        positions in bfloat16 and at any number in float32, and keeps no T x T weights. It also
        rounds scores less, so it serves wherever nothing is trained."""
        T = q.size(2)
        short = q.dtype == torch.bfloat16 and T <= 512
        write_out = p > 0 or (short and torch.is_grad_enabled())
        if torch.compiler.is_compiling() or not write_out:
            return super().causal_attention(q, k, v, p, bias, grouped)
        return self.written_out_attention(q, k, v, p, bias)

    def written_out_attention(self, q, k, v, p, bias):
        """Attention with its T x T weights written out; arguments as above."""
        B, nh, T, hs = q.shape
        if k.size(1) < nh:
            k = k.repeat_interleave(nh // k.size(1), dim=1)
            v = v.repeat_interleave(nh // v.size(1), dim=1)
        if bias is None:
            bias = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        q = q * hs ** -0.5
        v = v / (1 - p)  # dropout's scale, which costs less here than on T x T weights
        seed = self.draw_seed() if p > 0 else None

        outputs = []
        rows = max(1, WEIGHTS_AT_ONCE // (nh * T * T))
        for begin in range(0, B, rows):
            chunk = slice(begin, begin + rows)
            scores = q[chunk] @ k[chunk].transpose(2, 3) + bias
            weights = F.softmax(scores, dim=-1)  # (rows, nh, T, T)
            if p > 0:
                weights = weights * self.keep_mask(seed, weights.shape, p, weights.dtype, begin)
            outputs.append(weights @ v[chunk])
        return torch.cat(outputs)

    @staticmethod
    def draw_seed():
        """A seed for one mask, from the generator that activation checkpointing restores."""
        return torch.empty((), dtype=torch.int64).random_().item()

    def keep_mask(self, seed, shape, p, dtype, begin=0):
        """A tensor of this shape that is 0 with probability p, in steps of 2**-16, and else 1.

        begin: index of its first row among those of set_rows()."""
        # Each int16 is compared with a threshold: of 2**16 values, p * 2**16 lie below it.
        threshold = round(p * 2 ** 16) - 2 ** 15
        threshold = min(threshold, 2 ** 15 - 1)  # the highest int16
        elements = math.prod(shape[1:])
        words = math.ceil(elements / 4)  # a draw of 64 bits serves four elements
        drawn = torch.empty(shape[0], words, dtype=torch.int64)
        generator = torch.Generator()
        for row in range(shape[0]):
            number = self.first_row + (begin + row) * self.row_stride
            generator.manual_seed(mixed_seed(seed, number))
            # From -2**63 on: random_() without bounds never sets the highest bit.
            drawn[row].random_(-2 ** 63, None, generator=generator)
        drawn = drawn.view(torch.int16)[:, :elements]
        return drawn.reshape(shape).ge_(threshold).to(dtype)
