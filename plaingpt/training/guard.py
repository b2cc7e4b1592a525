"""
How the weights move: the learning rate of a step, the optimizers, the guard against numbers that are not finite, and
the figures by which one sees whether a run is healthy.

References:
[1] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
[2] Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4: the warm-up, stable, decay schedule (wsd)
[3] Smith 2015, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3: the range test
"""
import math

import torch


class Guard:
    """Keeps what is not finite from the weights, on all ranks alike, and without a wait for the device in each step.

    After a step whose loss or gradient is not finite no step changes the weights, until look() tells; but where float16
    has overflowed only that step is left out, and the scaler lowers its scale, as long as that is above 1."""

    def __init__(self, process, optimizer, scaler, grad_clip=0.0, resumed=None):
        """resumed: a dict with what unlogged() has returned, or None."""
        self.process, self.optimizer, self.scaler, self.grad_clip = process, optimizer, scaler, grad_clip
        # Metal's fused kernel takes no notice of found_inf, nor does Muon: there each step waits for the device.
        self.waits = process.device.type == 'mps' or not all(group.get('fused') for group in optimizer.param_groups)
        # Loss and norm of the last step, steps left out, steps clipped, steps, whether halted, and number, loss and
        # norm of what did that.
        self.seen = torch.zeros(9, device=process.device)
        for i, key in (3, 'clipped'), (4, 'unlogged'):
            self.seen[i] = (resumed or {}).get(key, 0)

    def step(self, number, loss, grad_norm):
        """The optimizer's step of this number, for this rank's share of the loss and its norm of the gradient before it
        was clipped."""
        one = torch.ones((), device=self.process.device)
        scale = self.scaler.scale(one)
        loss, overflows = self.process.sum(torch.stack([loss, ~grad_norm.isfinite()]))  # over all ranks
        skipped = (overflows == self.process.world_size) & (scale > 1)
        bad = ~loss.isfinite() | ((overflows > 0) & ~skipped)
        halted = self.seen[5] > 0
        first = torch.where(halted, self.seen[6:], torch.stack([one * number, loss, grad_norm]))
        clipped = grad_norm > (self.grad_clip or math.inf)
        counts = self.seen[2:5] + torch.stack([skipped, clipped, one])
        self.seen = torch.cat([torch.stack([loss, grad_norm]), counts, (halted | bad)[None], first])
        self.optimizer.found_inf = self.seen[5].maximum(skipped)  # a fused optimizer does nothing where this is 1
        if not (self.waits and self.optimizer.found_inf):
            self.optimizer.step()
        self.scaler.update()
        if self.scaler.is_enabled():  # which has not seen what was finite before the norm, or on this rank
            self.scaler.update(torch.where(skipped, scale / 2, self.scaler.scale(one)))

    def look(self, closing=True):
        """(record, None or (number, sentence) of the first step that was not finite), for which this rank waits for its
        device. record: the steps left out since the last look, if any; and, closing a line of the log, loss and norm of
        the last step, the latter None if it is not finite, and the share of steps clipped since the last line."""
        loss, norm, skipped, clipped, steps, halted, *first = self.seen.tolist()
        self.seen[2] = 0
        record = {'skipped': int(skipped)} if skipped else {}
        if closing:
            self.seen[3:5] = 0
            record |= {'loss': loss, 'grad_norm': norm if math.isfinite(norm) else None,
                       'clipped': clipped / max(1, steps)}
        wrong = (f'after step {first[0] - 1:.0f} the loss is {first[1]} and the gradient norm {first[2]}: stopped '
                 'before they reached the weights')
        return record, (int(first[0]), wrong) if halted else None

    def unlogged(self):
        """{'clipped': steps clipped since the last line of the log, 'unlogged': steps since then}."""
        return dict(zip(('clipped', 'unlogged'), map(int, self.seen[3:5].tolist()), strict=True))
