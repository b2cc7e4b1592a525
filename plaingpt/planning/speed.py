"""
How fast this machine computes: its peak, its memory bandwidth, and the time of a training step.
"""
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import torch

from model import GPT, Kernels
from plaingpt.planning.counts import parameters
from plaingpt.system.compiling import (choose_mode, compile_or_warn, keep_gradients,
                                       uses_cuda_graphs)
from plaingpt.system.cpu_kernels import CpuKernels
from plaingpt.system.devices import place, precision, residual_dtype, synchronize
from plaingpt.training.guard import Guard
from plaingpt.training.processes import Process

# A step of a larger model is not measured whole, but at two depths of at most so many parameters.
MEASURED_PARAMETERS = 2 * 10 ** 8


class StepSettings(NamedTuple):
    """How a step is computed; the fields are keys of train.py, except for `compiled`."""
    dtype: str = 'auto'
    compiled: bool = False  # whether torch.compile is used
    compile_mode: str = 'auto'
    bf16_residual: bool = False
    activation_checkpointing: bool = False


class StepTime(NamedTuple):
    """Seconds that the parts of a training step take."""
    micro_batch: float  # forward and backward
    update: float       # of the weights, with clipping


def measured_peak(device, dtype):
    """FLOP/s of the fastest of some products of two large square matrices of this torch.dtype."""
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    kernels = CpuKernels() if device.type == 'cpu' else Kernels()
    seconds = min(_timed(lambda: kernels.linear(a, b, None), device))
    return 2 * n ** 3 / seconds


def measured_bandwidth(device):
    """Bytes/s that the fastest of some copies of an array too large for caches reads and writes."""
    numbers = 2 ** 28 if device.type == 'cuda' else 2 ** 26
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    seconds = min(_timed(lambda: target.copy_(source), device))
    return 2 * source.nbytes / seconds


def measured_step(config, batch_size, device, settings, make_optimizer=None):
    """StepTime of a GPT with this GPTConfig, on random tokens, as train.py computes a step.

    batch_size: sequences in a micro-batch; settings: StepSettings; make_optimizer: a function from
    a GPT to its optimizer, None: AdamW.

    It takes some seconds and little memory, whatever the model: a micro-batch is scaled up from a
    few sequences, and a large model from two depths, whose difference is the time of a block."""
    block_parameters = 12 * config.n_embd ** 2
    depth = max(2, MEASURED_PARAMETERS // block_parameters)
    depth = min(config.n_layer, depth)
    deep = _Measured(replace(config, n_layer=depth), device, settings)

    # As many sequences as take about two seconds.
    seconds = min(_timed(lambda: deep.micro_batch(1), device, repetitions=1, seconds=0))
    rows = max(1, min(batch_size, int(2 / seconds)))
    micro_batch = deep.timed_micro_batch(rows) * batch_size / rows

    share_measured = sum(parameters(deep.config).values()) / sum(parameters(config).values())
    update = deep.timed_update(make_optimizer) / share_measured

    if depth < config.n_layer:
        shallow = _Measured(replace(config, n_layer=1), device, settings)
        shallow_micro_batch = shallow.timed_micro_batch(rows) * batch_size / rows
        block = (micro_batch - shallow_micro_batch) / (depth - 1)
        micro_batch += (config.n_layer - depth) * block
    return StepTime(micro_batch, update)


class _Measured:
    """A GPT whose training steps are timed."""

    def __init__(self, config, device, settings):
        self.config = config
        self.device = device
        self.compiled = settings.compiled
        name, self.autocast, self.scaler = precision(device, settings.dtype, config.n_embd)
        self.gpt = place(GPT(config), device)
        self.gpt.residual_dtype = residual_dtype(settings.bf16_residual, name)
        self.gpt.checkpointing = settings.activation_checkpointing
        self.mode = choose_mode(self.gpt, device, settings.compile_mode)
        self.has_graphs = settings.compiled and uses_cuda_graphs(self.mode, device)

    def micro_batch(self, rows):
        """Computes the gradients of so many sequences."""
        shape = rows, self.config.block_size
        tokens = torch.randint(self.config.vocab_size, shape, device=self.device)
        if self.has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            _, loss = self.gpt(tokens, tokens, with_logits=False)
        self.scaler.scale(loss).backward()

    def timed_micro_batch(self, rows):
        """Seconds of micro_batch(), of the compiled model if that is asked for."""
        if self.has_graphs:
            keep_gradients(self.gpt)
        if self.compiled:
            compile_or_warn(self.gpt, lambda: self.micro_batch(rows), mode=self.mode)
        return statistics.median(_timed(lambda: self.micro_batch(rows), self.device, seconds=3))

    def timed_update(self, make_optimizer):
        """Seconds of the update; micro_batch() must have made gradients."""
        gpt = self.gpt
        if make_optimizer is None:
            optimizer = gpt.configure_optimizers(0.1, 0.0, (0.9, 0.95), self.device.type)
        else:
            optimizer = make_optimizer(gpt)
        guard = Guard(Process(self.device), optimizer, self.scaler)
        loss = torch.ones((), device=self.device)

        def update():
            self.scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            guard.step(1, loss, norm)

        return statistics.median(_timed(update, self.device))


def _timed(work, device, repetitions=3, seconds=0.5):
    """Seconds of each call of work(): at least so many calls, until their sum is so many seconds.

    A first call does not count: it may allocate memory, or choose kernels."""
    times = []
    work()
    while len(times) < repetitions or sum(times) < seconds:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times
