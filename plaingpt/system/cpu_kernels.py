"""
Faster CPU versions of linear layers, dropout, attention in training, and the loss.

Times are medians of a forward and backward pass on 2 cores of an AMD EPYC with AVX512-BF16;
experiments/what_pays.py measures them again.
"""
import contextlib
import math

import torch
from torch.autograd.function import once_differentiable

from model import Kernels, Linear
from plaingpt.system.devices import cpu_capabilities, instruction_set
from plaingpt.system.seeds import mixed_seed

WEIGHTS_AT_ONCE = 2 ** 21   # attention weights, which then stay in a core's cache
LONGEST_WRITTEN_OUT = 1024  # positions, for attention without dropout in bfloat16


class CpuKernels(Kernels):
    """Kernels for eager models on a CPU. While torch.compile traces, they are torch's own.

    Dropout is drawn row by row, and the mask of a row depends on torch's CPU seed and the row's
    number alone: ranks that share the rows of a micro-batch draw what one rank would have drawn."""

    def __init__(self):
        self.set_rows(0, 1)
        self.uses_onednn = onednn_beats_mkl()
        self.packed = {}  # what use_packed() has been given

    def set_rows(self, first, stride):
        """Says which rows of the micro-batch the next tensors hold: first, first + stride, …"""
        self.first_row = first
        self.row_stride = stride

    @property
    def prefers_loss_in_parts(self):
        return not torch.compiler.is_compiling()

    # ---- linear layers ----

    def linear(self, x, weight, bias):
        if torch.compiler.is_compiling():
            return super().linear(x, weight, bias)
        in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
        if in_float32 and weight in self.packed:
            return onednn_linear(x, self.packed[weight], bias)
        if in_float32 and self.uses_onednn:
            return OneDnnLinear.apply(x, weight, bias)
        return super().linear(x, weight, bias)

    def pack(self, gpt, rows):
        """{weight: a copy in the order in which oneDNN reads it} of linear layers, to decode with.

        rows: how many are multiplied at a time. {} where a copy would not help: for one row, and in
        any precision but float32. 10 rows times 768 x 3072 take 172 us, without packing 363, with
        MKL 740 (two threads)."""
        in_float32 = gpt.transformer.ln_f.weight.dtype == torch.float32
        if rows == 1 or not in_float32 or not has_onednn():
            return {}
        layers = [module for module in gpt.modules() if isinstance(module, Linear)]
        reorder = torch.ops.mkldnn._reorder_linear_weight
        return {layer.weight: reorder(layer.weight.detach(), rows) for layer in layers}

    @contextlib.contextmanager
    def use_packed(self, packed):
        """A context in which linear() multiplies by the weights from pack()."""
        before = self.packed
        self.packed = packed
        try:
            yield
        finally:
            self.packed = before

    # ---- attention ----

    def causal_attention(self, q, k, v, p, bias=None, grouped=False):
        """Writes attention out, some sequences at a time, where that is faster than torch's kernel.

        16 sequences x 6 heads x 256 positions x 64 in bfloat16: 12 ms against 34; with dropout 20
        against 77, in float32 43 against 77. Without dropout torch's kernel is hardly slower in
        float32, and it keeps no T x T weights, which matters in long sequences. It also rounds
        scores less, so it serves wherever nothing is trained."""
        T = q.size(2)
        short = q.dtype == torch.bfloat16 and T <= LONGEST_WRITTEN_OUT
        write_out = p > 0 or (short and torch.is_grad_enabled())
        if torch.compiler.is_compiling() or not write_out:
            return super().causal_attention(q, k, v, p, bias, grouped)

        B, nh, T, hs = q.shape
        if k.size(1) < nh:
            k = k.repeat_interleave(nh // k.size(1), dim=1)
            v = v.repeat_interleave(nh // v.size(1), dim=1)
        if bias is None:
            bias = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        seed = self.draw_seed() if p > 0 else None
        q = q * hs ** -0.5

        def keep_mask(begin, weights):
            return self.keep_mask(seed, weights.shape, p, weights.dtype, begin)

        return WrittenOutAttention.apply(q, k, v, bias, p, keep_mask)

    # ---- dropout ----

    def dropout(self, x, p):
        # 16 x 256 x 384 elements take 3 ms, against 11 for F.dropout.
        if torch.compiler.is_compiling():
            return super().dropout(x, p)
        keep = self.keep_mask(self.draw_seed(), x.shape, p, x.dtype)
        return x * keep.mul_(1 / (1 - p))

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


class WrittenOutAttention(torch.autograd.Function):
    """Causal attention with its T x T weights written out, some sequences at a time.

    By hand because autograd would start twice as many operations. With dropout it would also keep
    the weights, the mask and their product, although the first two are enough."""

    @staticmethod
    def forward(ctx, q, k, v, bias, p, keep_mask):
        """q, scaled already, k, v and the result: (B, nh, T, hs).

        bias: added to the scores (B, nh, T, T). p: dropout probability of the weights; keep_mask: a
        function of a sequence's index and the weights from there on, which returns their mask."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        B, nh, T, hs = q.shape
        bias = bias.expand(B, nh, T, T)
        weights = q.new_empty(B, nh, T, T)
        kept = torch.empty_like(weights) if p > 0 else None
        y = torch.empty_like(q)
        for part in slices(B, WEIGHTS_AT_ONCE // (nh * T * T)):
            scores = torch.matmul(q[part], k[part].mT)
            scores += bias[part]
            torch.softmax(scores, dim=-1, out=weights[part])
            dropped = weights[part]
            if p > 0:
                kept[part] = keep_mask(part.start, weights[part])
                dropped = dropped * kept[part]
            torch.matmul(dropped, v[part], out=y[part])
        ctx.save_for_backward(q, k, v, weights, kept)
        ctx.p = p
        return y / (1 - p) if p > 0 else y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, weights, kept = ctx.saved_tensors
        p = ctx.p
        q_gradient = torch.empty_like(q)
        k_gradient = torch.empty_like(k)
        v_gradient = torch.empty_like(v)
        gradient = gradient.contiguous()
        if p > 0:
            gradient = gradient / (1 - p)
        B, nh, T, hs = q.shape
        for part in slices(B, WEIGHTS_AT_ONCE // (nh * T * T)):
            dropped = weights[part]
            weights_gradient = torch.matmul(gradient[part], v[part].mT)
            if p > 0:
                dropped = dropped * kept[part]
                weights_gradient *= kept[part]
            # Through the softmax, back to the scores, and from there to queries and keys.
            scores_gradient = torch._softmax_backward_data(
                weights_gradient, weights[part], -1, weights.dtype)
            torch.matmul(scores_gradient, k[part], out=q_gradient[part])
            torch.matmul(scores_gradient.mT, q[part], out=k_gradient[part])
            torch.matmul(dropped.mT, gradient[part], out=v_gradient[part])
        return q_gradient, k_gradient, v_gradient, None, None, None


class OneDnnLinear(torch.autograd.Function):
    """F.linear in float32 by oneDNN; torch takes MKL."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        x_gradient = weight_gradient = bias_gradient = None
        row_gradients = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            x_gradient = onednn_linear(gradient, weight.T)
        if ctx.needs_input_grad[1]:
            rows = x.flatten(0, -2)
            # oneDNN transposes its first matrix in a copy, so that is the narrower one.
            if rows.size(1) < row_gradients.size(1):
                weight_gradient = onednn_linear(rows.T, row_gradients.T).T.contiguous()
            else:
                weight_gradient = onednn_linear(row_gradients.T, rows.T)
        if ctx.needs_input_grad[2]:
            bias_gradient = row_gradients.sum(0)
        return x_gradient, weight_gradient, bias_gradient


def slices(length, size):
    """Slices of at least one and at most `size` elements that cover a length."""
    size = max(1, size)
    return [slice(begin, begin + size) for begin in range(0, length, size)]


def onednn_linear(x, weight, bias=None):
    """F.linear(x, weight, bias), by oneDNN and without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


def onednn_beats_mkl():
    """Whether products in float32 are faster with oneDNN than with MKL, torch's default.

    MKL uses AVX-512 on Intel's CPUs alone. On an AMD EPYC with AVX-512, two threads: 768 x 128 x
    512 with oneDNN 490 GFLOP/s, with MKL 230; limited to AVX2, 266 and 236."""
    name = cpu_capabilities().get('cpu_name', 'Intel')  # an older torch does not tell
    return has_onednn() and instruction_set() == 'AVX512' and 'Intel' not in name


def has_onednn():
    """Whether oneDNN can be used, on a CPU for which its float32 products are fast."""
    is_usable = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return is_usable and instruction_set() in ('AVX2', 'AVX512')
