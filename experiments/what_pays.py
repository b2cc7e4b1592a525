"""
Times what this repository computes in its own way on a CPU against torch's own way, and prints the
figures behind docs/benchmarks.md. The last lines are the cost of a run's health figures, for
docs/modern.md. Times are medians, of forward and backward passes where something is trained; the
contenders take turns, so that other load on the machine meets all of them. About 4 minutes on two
cores.

    python experiments/what_pays.py
"""
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig, Linear
from plaingpt.system.cpu_kernels import CpuKernels
from plaingpt.system.devices import place, set_up_math
from plaingpt.text.token_files import TokenFile
from plaingpt.training.health import Health

CPU = torch.device('cpu')


def compare(title, contenders, repetitions=15):
    """Prints the median milliseconds of each contender, a dict of names and functions."""
    times = {name: [] for name in contenders}
    for number in range(repetitions + 1):
        for name, work in contenders.items():
            begin = time.perf_counter()
            work()
            elapsed = 1000 * (time.perf_counter() - begin)
            if number > 0:  # the first round warms up
                times[name].append(elapsed)
    medians = [f'{name} {statistics.median(taken):.3g}' for name, taken in times.items()]
    print(f'{title:<62}{", ".join(medians)} ms', flush=True)


def trainable(*shape, dtype):
    """A random tensor that takes a gradient."""
    return torch.randn(shape).to(dtype).requires_grad_()


def short_name(dtype):
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix('torch.')


def compare_attention(dtype, p):
    """Training attention of the baby GPT's size, with dropout p of the weights."""
    B, nh, T, hs = 16, 6, 256, 64
    q = trainable(B, nh, T, hs, dtype=dtype)
    k = trainable(B, nh, T, hs, dtype=dtype)
    v = trainable(B, nh, T, hs, dtype=dtype)
    gradient = torch.randn(B, nh, T, hs).to(dtype)
    kernels = CpuKernels()

    def ours():
        kernels.causal_attention(q, k, v, p).backward(gradient)

    def torchs():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        y.backward(gradient)

    title = f'attention, {B} x {nh} heads x {T} x {hs}, dropout {p}, {short_name(dtype)}'
    compare(title, {'ours': ours, 'torch': torchs})


def compare_linear(rows, width_in, width_out):
    """A linear layer of a training step in float32."""
    x = trainable(rows, width_in, dtype=torch.float32)
    weight = trainable(width_out, width_in, dtype=torch.float32)
    gradient = torch.randn(rows, width_out)
    kernels = CpuKernels()

    def ours():
        kernels.linear(x, weight, None).backward(gradient)

    def torchs():
        F.linear(x, weight).backward(gradient)

    title = f'linear layer, {rows} x {width_in} to {width_out}, float32'
    compare(title, {'ours': ours, 'torch': torchs}, repetitions=50)


@torch.no_grad()
def compare_packed_weights(rows):
    """The linear layers of the baby GPT in decoding, in float32: with packed weights, by torch."""
    gpt = GPT(GPTConfig(256, 65, 6, 6, 384))
    layers = [module for module in gpt.modules() if isinstance(module, Linear)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]
    kernels = CpuKernels()
    packed = kernels.pack(gpt, rows)

    def multiply(linear):
        for layer, x in zip(layers, inputs, strict=True):
            linear(x, layer.weight, None)

    def ours():
        with kernels.use_packed(packed):
            multiply(kernels.linear)

    title = f'{rows} rows times the matrices of the 10.7M net, float32'
    compare(title, {'ours': ours, 'torch': partial(multiply, F.linear)}, repetitions=50)


def compare_gelus(dtype):
    """GELU in the two forms, of a micro-batch of the CPU profile."""
    x = trainable(12, 64, 512, dtype=dtype)
    gradient = torch.ones(12, 64, 512, dtype=dtype)

    def tanh():
        F.gelu(x, approximate='tanh').backward(gradient)

    def exact():
        F.gelu(x).backward(gradient)

    title = f'GELU of 768 x 512, {short_name(dtype)}'
    compare(title, {'exact': exact, 'tanh': tanh}, repetitions=50)


def compare_dropout(dtype):
    """Dropout of a micro-batch of the baby GPT."""
    x = trainable(16, 256, 384, dtype=dtype)
    gradient = torch.ones(16, 256, 384, dtype=dtype)
    kernels = CpuKernels()

    def ours():
        kernels.dropout(x, 0.2).backward(gradient)

    def torchs():
        F.dropout(x, 0.2).backward(gradient)

    compare(f'dropout of 16 x 256 x 384, {short_name(dtype)}', {'ours': ours, 'torch': torchs})


def compare_losses(N, V, dtype):
    """The loss of N tokens and V ids: in parts, with all logits at once, fused by torch 2.13."""
    gpt = GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=12, n_embd=768))
    x = trainable(N, 768, dtype=torch.float32)
    targets = torch.randint(V, (N,))
    losses = {}  # the last loss of each contender: they should agree

    def train(name, compute_loss):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses[name] = compute_loss()
        losses[name].backward()

    def loss_in_parts():
        return gpt.loss_in_parts(x, targets)

    def loss_at_once():
        return F.cross_entropy(gpt.lm_head(x).float(), targets)

    def torchs_fused_loss():
        weight = gpt.lm_head.weight.to(dtype)
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x.to(dtype), weight, targets, options=options)

    contenders = {
        'in_parts': partial(train, 'in_parts', loss_in_parts),
        'at_once': partial(train, 'at_once', loss_at_once),
    }
    if hasattr(F, 'linear_cross_entropy'):  # new in torch 2.13
        name = 'linear_cross_entropy'
        contenders[name] = partial(train, name, torchs_fused_loss)
    compare(f'loss of {N} tokens, {V} ids, {short_name(dtype)}', contenders, repetitions=2)
    values = [f'{name} {loss.item():.4f}' for name, loss in losses.items()]
    print(f'    losses: {", ".join(values)}')


@torch.no_grad()
def compare_products(rows):
    """Decoding's matrix products: a few rows times as many matrices as GPT-2's 124M has."""
    # 36 matrices do not fit into a cache, so each product reads its weights from memory.
    matrices = [torch.randn(3072, 768).to(torch.bfloat16) for _ in range(36)]
    x = torch.randn(rows, 768).to(torch.bfloat16)

    def onednns():
        for matrix in matrices:
            F.linear(x, matrix)

    def torchs():
        enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
        onednns()
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)

    title = f'{rows} rows times 36 matrices of 3072 x 768, bfloat16'
    compare(title, {'torchs_own': torchs, 'onednn': onednns})


@torch.no_grad()
def compare_cache_precisions(B, past):
    """Attention of one new position to `past` cached ones, in float32 and in bfloat16."""
    q = torch.randn(B, 12, 1, 64)
    k = torch.randn(B, 12, past, 64)
    v = torch.randn(B, 12, past, 64)
    q16, k16, v16 = q.bfloat16(), k.bfloat16(), v.bfloat16()

    def in_float32():
        F.scaled_dot_product_attention(q, k, v)

    def in_bfloat16():
        F.scaled_dot_product_attention(q16, k16, v16)

    title = f'one position attends to {past}, {B} x 12 heads x 64'
    compare(title, {'float32': in_float32, 'bfloat16': in_bfloat16}, repetitions=200)


def time_batch(B, T):
    """Reading a batch from a token file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'train.bin'
        np.zeros(2 ** 20, np.uint16).tofile(path)
        data = TokenFile(str(path), 'uint16', 65, T)

        def ours():
            data.batch(0, 'train', 1, 0, B, T, CPU)

        compare(f'a batch of {B} x {T}', {'ours': ours}, repetitions=200)


def time_health(batch_size, repetitions, **shape):
    """The health figures of a step, against the step."""
    gpt = place(GPT(GPTConfig(**shape)), CPU)
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')
    health = Health(gpt)
    x = torch.randint(gpt.config.vocab_size, (batch_size, gpt.config.block_size))

    def step():
        with torch.autocast('cpu', dtype=torch.bfloat16):
            _, loss = gpt(x, x, with_logits=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def figures():
        with health.watch(True):
            pass
        health.figures()

    millions = gpt.get_num_params() / 1e6
    title = f'health of {millions:.1f}M parameters, {batch_size} x {gpt.config.block_size} tokens'
    compare(title, {'figures': figures, 'step': step}, repetitions)


def main():
    set_up_math(0, CPU)
    compare_attention(torch.bfloat16, 0.0)
    compare_attention(torch.bfloat16, 0.2)
    compare_attention(torch.float32, 0.2)
    compare_linear(768, 128, 512)
    compare_linear(4096, 384, 1536)
    compare_packed_weights(1)
    compare_packed_weights(10)
    compare_gelus(torch.bfloat16)
    compare_gelus(torch.float32)
    compare_dropout(torch.bfloat16)
    compare_dropout(torch.float32)
    compare_losses(4096, 50304, torch.bfloat16)
    compare_losses(4096, 50304, torch.float32)
    compare_products(1)
    compare_products(10)
    compare_cache_precisions(1, 400)
    time_batch(12, 64)
    time_batch(64, 256)
    # The small net of the CPU profile, the baby GPT, and GPT-2's 124M.
    time_health(12, 100, block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)
    time_health(16, 8, block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384)
    time_health(1, 8)


if __name__ == '__main__':
    main()
