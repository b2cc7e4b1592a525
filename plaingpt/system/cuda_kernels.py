"""
Attention on CUDA: keeps torch's choice of a kernel away from those that would cost too much.

torch has four kernels for F.scaled_dot_product_attention: flash, memory-efficient, cuDNN's, and
"math", which holds all T x T weights. It chooses by device, shape and precision.
"""
import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import Kernels

ALL_BUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CudaKernels(Kernels):
    """Kernels for models on a CUDA device."""

    def __init__(self, device):
        """device: a torch.device."""
        # Flash attention needs compute capability 8: Ampere or newer.
        self.has_flash = torch.cuda.get_device_capability(device) >= (8, 0)

    def causal_attention(self, q, k, v, p, bias=None, grouped=False):
        # Only flash attention takes grouped heads, and it takes neither float32 nor a bias. Heads
        # repeated for each query are small beside the T x T weights of the math kernel.
        # (Autocast gives all three the precision of v.)
        flash_serves = self.has_flash and v.dtype != torch.float32 and bias is None
        if grouped and not flash_serves:
            queries_a_head = q.size(1) // k.size(1)
            k = k.repeat_interleave(queries_a_head, dim=1)
            v = v.repeat_interleave(queries_a_head, dim=1)
            grouped = False

        # Some of cuDNN's kernels know the rate of dropout only in steps of 1/16; torch 2.11 chooses
        # them all the same.
        is_exact = (16 * p) % 1 == 0
        allowed_kernels = contextlib.nullcontext() if is_exact else without_cudnn_attention()
        with allowed_kernels:
            return super().causal_attention(q, k, v, p, bias, grouped)


def without_cudnn_attention():
    """A context in which torch chooses any attention kernel but cuDNN's.

    cuDNN plans anew for each length it meets, which takes far longer than a decoding step."""
    return sdpa_kernel(ALL_BUT_CUDNN)
