"""
How the weights move: the learning rate of a step, the optimizers, the guard against numbers that are not finite, and
the figures by which one sees whether a run is healthy.

References:
[1] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
[2] Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4: the warm-up, stable, decay schedule (wsd)
[3] Smith 2015, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3: the range test
"""
import contextlib
import math
import re

import torch


class Health:
    """The norm of the weights that a step moves, and of the step, by kinds of weights. A step of a thousandth of the
    weights is usual; one of much less learns slowly, of much more often leads to divergence.

    Of a tensor of more than SAMPLE elements so many count, spread evenly: both norms are estimates, to 1% or 2%, and
    cost a fortieth of a step of the smallest net, of others some thousandths (docs/modern.md)."""

    KINDS = {'embedding': r'wte|wpe', 'attention': r'\.attn\.', 'mlp': r'\.mlp\.', 'head': 'lm_head', 'norm': ''}
    SAMPLE = 2048

    def __init__(self, gpt):
        of_kind = {kind: [] for kind in self.KINDS}
        for name, parameter in gpt.named_parameters():
            of_kind[next(kind for kind, part in self.KINDS.items() if re.search(part, name))].append(parameter)
        self.parameters = [parameter for some in of_kind.values() for parameter in some]
        # Odd strides, which are seldom a multiple of a row's length. The elements are of the parameters' own memory.
        self.samples = [p.detach().view(-1)[::p.numel() // self.SAMPLE | 1] for p in self.parameters]
        sizes = {parameter: len(sample) for parameter, sample in zip(self.parameters, self.samples, strict=True)}
        self.lengths = [sum(map(sizes.get, some)) for some in of_kind.values()]  # of the kinds' samples
        self.moved = self.weights = self.norms = None

    @contextlib.contextmanager
    def watch(self, wanted=True):
        """Around the step that figures() is to tell of."""
        before, self.norms = torch.cat(self.samples) if wanted else None, None
        yield
        if not wanted:
            return
        moved = [parameter.grad is not None for parameter in self.parameters]
        if moved != self.moved:  # for how many elements each stands, none where they are frozen
            factors = [counts * p.numel() / len(some)
                       for p, some, counts in zip(self.parameters, self.samples, moved, strict=True)]
            self.weights = torch.cat([torch.full_like(*both) for both in zip(self.samples, factors, strict=True)])
            self.moved = moved
        squares = torch.stack([before, torch.cat(self.samples) - before]).square() * self.weights
        self.norms = torch.stack([part.sum(dim=1) for part in squares.split(self.lengths, dim=1)]).sqrt()  # (kinds, 2)

    def figures(self):
        """{'weight_norm': {kind: norm}, 'update_ratio': {kind: norm of the step / norm of the weights}} of the last
        step, {} if it was not watched."""
        found = {} if self.norms is None else dict(zip(self.KINDS, self.norms.tolist(), strict=True))
        found = {kind: norms for kind, norms in found.items() if norms[0] and all(map(math.isfinite, norms))}
        return found and {'weight_norm': {kind: norm for kind, (norm, _) in found.items()},
                          'update_ratio': {kind: step / norm for kind, (norm, step) in found.items()}}
