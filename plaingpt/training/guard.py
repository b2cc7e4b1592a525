"""
The guard: it takes the optimizer's step, and keeps a loss or a gradient that is not finite from
reaching the weights.
"""
import math
from typing import NamedTuple

import torch

from plaingpt.training.optimizers import can_skip


class Halt(NamedTuple):
    """The first step whose loss or gradient norm was not finite."""
    step: int
    loss: float
    grad_norm: float


class StepReport(NamedTuple):
    """What the guard has seen: of the last step, and since the last report."""
    loss: float          # of the last step, mean over all ranks; may be infinite or NaN
    grad_norm: float     # of the last step, before clipping; may be infinite or NaN
    skipped: int         # steps since the last report that float16 overflows have cost
    clipped: int         # steps since the last report with a gradient norm above grad_clip
    steps: int           # steps since the last report
    halted: Halt | None  # None as long as all is well


class Guard:
    """Takes each step of the optimizer, unless a loss or gradient is not finite on any rank.

    After the first such step the guard is halted: no later step changes the weights, and read()
    says which step it was. A float16 overflow does not halt: all ranks skip that step, and the
    scaler halves its scale, as long as the scale is above 1.

    step() queues its checks on the device and does not wait for their result; read() waits."""

    def __init__(self, process, optimizer, scaler, grad_clip=0.0):
        """process: a processes.Process; scaler: a torch.amp.GradScaler, enabled in float16 only;
        grad_clip: the norm to which gradients are clipped before step(), 0.0 for no limit."""
        self.process = process
        self.optimizer = optimizer
        self.scaler = scaler
        self.clip_limit = grad_clip or math.inf

        # An optimizer that can skip a step reads found_inf on the device, so the host never waits.
        # With the others the host reads it at each step.
        self.must_wait = not can_skip(optimizer, process.device.type)

        def zero(dtype):
            return torch.zeros((), dtype=dtype, device=process.device)

        # The last step, and counts since the last read().
        self.loss = zero(torch.float32)
        self.grad_norm = zero(torch.float32)
        self.skipped = zero(torch.int64)
        self.clipped = zero(torch.int64)
        self.steps = 0
        # Whether a step was not finite, and the first one that was not.
        self.halted = zero(torch.bool)
        self.halt_step = zero(torch.int64)
        self.halt_loss = zero(torch.float32)
        self.halt_norm = zero(torch.float32)

        self.one = torch.ones((), device=process.device)

    def step(self, number, loss, grad_norm):
        """Takes training step `number`, counted from 1, if its numbers are finite on all ranks.

        loss: this rank's share of the loss, a float32 scalar on the device; the shares add up to
        the mean. grad_norm: the norm of this rank's gradients before clipping, likewise."""
        scale = self.scaler.scale(self.one)  # 1 if the scaler is disabled

        # One sum over the ranks tells each of them what all have seen.
        shared = torch.stack([loss, ~grad_norm.isfinite()])
        loss, overflows = self.process.sum(shared)

        # float16 overflows on all ranks at once, since they share the averaged gradients. An
        # overflow at scale 1, or on some ranks only, is a real one.
        skip = (overflows == self.process.world_size) & (scale > 1)
        bad = ~loss.isfinite() | ((overflows > 0) & ~skip)

        first_bad = bad & ~self.halted
        self.halt_step = torch.where(first_bad, number, self.halt_step)
        self.halt_loss = torch.where(first_bad, loss, self.halt_loss)
        self.halt_norm = torch.where(first_bad, grad_norm, self.halt_norm)
        self.halted = self.halted | bad

        self.loss = loss
        self.grad_norm = grad_norm
        self.skipped += skip
        self.clipped += grad_norm > self.clip_limit
        self.steps += 1

        found_inf = (self.halted | skip).float()
        if not self.must_wait:
            self.optimizer.found_inf = found_inf
            self.optimizer.step()
        elif not found_inf:
            self.optimizer.step()

        # The scaler sees infinite gradients of this rank only, not a norm that overflows although
        # they are finite. So the guard sets the scale on all ranks: half after a skipped step.
        self.scaler.update()
        if self.scaler.is_enabled():
            updated_scale = self.scaler.scale(self.one)
            self.scaler.update(torch.where(skip, scale / 2, updated_scale))

    def read(self):
        """Waits for the device, and returns a StepReport; the counts start again at 0."""
        loss, grad_norm = torch.stack([self.loss, self.grad_norm]).tolist()
        counts = torch.stack([self.skipped, self.clipped, self.halted]).tolist()
        skipped, clipped, is_halted = counts
        halt = None
        if is_halted:
            halt = Halt(self.halt_step.item(), self.halt_loss.item(), self.halt_norm.item())
        report = StepReport(loss, grad_norm, skipped, clipped, self.steps, halt)

        self.skipped.zero_()
        self.clipped.zero_()
        self.steps = 0
        return report
