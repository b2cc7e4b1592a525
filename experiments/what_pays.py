"""
What model.py and generation.py compute in another way on a CPU, in turns with torch's own way; medians of forward and
backward. docs/benchmarks.md has what came of it. And what the figures of a run's health cost (docs/modern.md).

    python experiments/what_pays.py
"""
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..')))
import model
from plaingpt.text.token_files import TokenFile
from plaingpt.training.health import Health

BF16, F32 = torch.bfloat16, torch.float32


def compare(title, repetitions=15, **contenders):
    """Prints the median milliseconds of each contender, a function; in turns, after a round that does not count."""
    times = {name: [] for name in contenders}
    for number in range(repetitions + 1):
        for name, work in contenders.items():
            begin = time.perf_counter()
            work()
            if number:
                times[name].append(1000 * (time.perf_counter() - begin))
    print(f'{title:<62}' + ', '.join(f'{name} {statistics.median(taken):.3g}' for name, taken in times.items()) + ' ms',
          flush=True)


def leaf(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype).requires_grad_()


def attention(B, nh, T, dtype, p):
    q, k, v, gradient = (leaf(B, nh, T, 64, dtype=dtype) for _ in range(4))
    compare(f'attention, {B} x {nh} heads x {T} x 64, dropout {p}, {name(dtype)}',
            ours=lambda: model.causal_attention(q, k, v, p).backward(gradient),
            torch=lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p).backward(gradient))


def dropout(dtype):
    x, gradient = leaf(16, 256, 384, dtype=dtype), torch.ones(16, 256, 384, dtype=dtype)
    compare(f'dropout of 16 x 256 x 384, {name(dtype)}', ours=lambda: model.dropout(x, 0.2).backward(gradient),
            torch=lambda: F.dropout(x, 0.2).backward(gradient))


def loss(N, V, dtype):
    gpt = model.GPT(model.GPTConfig(vocab_size=V, n_layer=1, n_head=12, n_embd=768))
    x, targets, losses = leaf(N, 768, dtype=F32), torch.randint(V, (N,)), {}

    def run(kind, compute):
        with torch.autocast('cpu', dtype=BF16, enabled=dtype == BF16):
            losses[kind] = compute()
        losses[kind].backward()

    ways = {'in_parts': lambda: gpt._loss_in_parts(x, targets),
            'at_once': lambda: F.cross_entropy(gpt.lm_head(x).float(), targets)}
    if hasattr(F, 'linear_cross_entropy'):  # torch 2.13
        weight = gpt.lm_head.weight
        ways['linear_cross_entropy'] = lambda: F.linear_cross_entropy(
            x.to(dtype), weight.to(dtype), targets, options=torch.nn.LinearCrossEntropyOptions())
    compare(f'loss of {N} tokens, {V} ids, {name(dtype)}', 2,
            **{kind: lambda kind=kind, way=way: run(kind, way) for kind, way in ways.items()})
    print('    losses:', ', '.join(f'{kind} {value.item():.4f}' for kind, value in losses.items()))


@torch.no_grad()
def one_row(rows):
    matrices = [torch.randn(4 * 768, 768).to(BF16) for _ in range(36)]  # more than a cache holds, as 124M's are
    x = torch.randn(rows, 768).to(BF16)

    def without_onednn():
        enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
        [F.linear(x, matrix) for matrix in matrices]
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)

    compare(f'{rows} rows times 36 matrices of 3072 x 768, bfloat16',
            torchs_own=without_onednn, onednn=lambda: [F.linear(x, matrix) for matrix in matrices])


@torch.no_grad()
def one_position(B, past):
    full = torch.randn(B, 12, 1, 64), *torch.randn(2, B, 12, past, 64)
    half = [x.to(BF16) for x in full]
    compare(f'one position attends to {past}, {B} x 12 heads x 64', 200,
            float32=lambda: F.scaled_dot_product_attention(*full),
            bfloat16=lambda: F.scaled_dot_product_attention(*half))


def batch(B, T):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'train.bin')
        np.zeros(2 ** 20, np.uint16).tofile(path)
        data = TokenFile(path, 'uint16', 65, T)
        compare(f'a batch of {B} x {T}', 200, ours=lambda: data.batch(0, 'train', 1, 0, B, T, torch.device('cpu')))


def health(repetitions, batch_size, **shape):
    gpt = model.GPT(model.GPTConfig(**shape))
    optimizer, watched = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu'), Health(gpt)
    x = torch.randint(gpt.config.vocab_size, (batch_size, gpt.config.block_size))

    def step():
        with torch.autocast('cpu', dtype=BF16):
            gpt(x, x, with_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def watch():
        with watched.watch():
            pass
        watched.figures()

    millions = gpt.get_num_params() / 1e6
    compare(f'health of {millions:.1f}M parameters, {batch_size} x {gpt.config.block_size} tokens', repetitions,
            figures=watch, step=step)


def name(dtype):
    return str(dtype).removeprefix('torch.')


for dtype, p in (BF16, 0.0), (BF16, 0.2), (F32, 0.2):
    attention(16, 6, 256, dtype, p)
dropout(BF16), dropout(F32)
loss(4096, 50304, BF16), loss(4096, 50304, F32)
one_row(1), one_row(10)
one_position(1, 400)
batch(12, 64), batch(64, 256)
health(100, 12, block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)
health(8, 16, block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384)
health(8, 1)
