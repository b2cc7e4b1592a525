"""
How big and how long: the arithmetic of a GPT's parameters, FLOPs and memory, and what this machine does in what time,
which plan.py and the two notebooks share. The notebooks derive it, and hold it against measurements.

References:
[1] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[2] Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 4
"""
import statistics
import time
from dataclasses import replace

import torch

from model import GPT
from plaingpt.planning.counts import parameters
from plaingpt.system.devices import compile_or_warn, precision, synchronize
from plaingpt.training.guard import Guard
from plaingpt.training.processes import Process


def measured_peak(device, dtype):
    """FLOP/s of the fastest of some products of two square matrices of this torch.dtype on a torch.device."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(_seconds(lambda: a @ b, device))


def measured_bandwidth(device):
    """Bytes/s that the fastest of some copies of an array too large for any cache reads and writes on a device."""
    source = torch.ones(2 ** 28 if device.type == 'cuda' else 2 ** 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source), device))


def _seconds(work, device, least=3, enough=0.5):
    """Seconds of each repetition of work(), after one that does not count: at least so many, until enough seconds."""
    times = []
    work()
    while len(times) < least or sum(times) < enough:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def measured_step(config, batch_size, device, dtype, compiled, checkpointing, optimizer_of=None):
    """(seconds, seconds): a micro-batch forward and backward, and the update of the weights, of random tokens on a
    device, as train.py does them. optimizer_of: a function from a GPT to its optimizer; None: AdamW.

    As much is computed as takes some seconds and little memory: of a large model some sequences, at two depths, from
    which follows what a block takes and what the rest."""
    depth = min(config.n_layer, max(2, 2 * 10 ** 8 // (12 * config.n_embd ** 2)))
    _, autocast, scaler = precision(device, dtype, config.n_embd)

    def of_depth(n_layer):
        gpt = GPT(replace(config, n_layer=n_layer)).to(device)
        gpt.checkpointing = checkpointing
        return gpt

    def micro_batch(gpt, rows):
        tokens = torch.randint(config.vocab_size, (rows, config.block_size), device=device)
        with autocast():
            loss = gpt(tokens, tokens, with_logits=False)[1]
        scaler.scale(loss).backward()

    def timed(gpt, rows):
        if compiled:
            compile_or_warn(gpt, lambda: micro_batch(gpt, rows))
        return statistics.median(_seconds(lambda: micro_batch(gpt, rows), device, enough=3)) * batch_size / rows

    deep = of_depth(depth)
    rows = int(2 / min(_seconds(lambda: micro_batch(deep, 1), device, least=1, enough=0)))
    rows = max(1, min(batch_size, rows))
    seconds = timed(deep, rows)
    optimizer = optimizer_of(deep) if optimizer_of else deep.configure_optimizers(0.1, 0.0, (0.9, 0.95), device.type)
    guard = Guard(Process(device), optimizer, scaler)

    def update():
        scaler.unscale_(optimizer)
        guard.step(1, torch.ones((), device=device), torch.nn.utils.clip_grad_norm_(deep.parameters(), 1.0))

    share = sum(parameters(deep.config).values()) / sum(parameters(config).values())
    update_seconds = statistics.median(_seconds(update, device)) / share
    if depth < config.n_layer:
        block = (seconds - timed(of_depth(1), rows)) / (depth - 1)
        seconds += (config.n_layer - depth) * block
    return seconds, update_seconds
