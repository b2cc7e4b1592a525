"""
The health of a run: how large the weights are, and how far a step moves them.

A step of a thousandth of the weights is usual. With much less, a run learns slowly; much more often
leads to divergence.
"""
import contextlib
import math
import re

import torch

# The kinds of parameters, and what their names contain; all other parameters are norms.
PATTERNS = {
    'embedding': r'wte|wpe',
    'attention': r'\.attn\.',
    'mlp': r'\.mlp\.',
    'head': r'lm_head',
}
KINDS = (*PATTERNS, 'norm')
SAMPLE_SIZE = 2048  # a parameter with more elements is represented by about so many, 2/3 to 2 times


class Sample:
    """Elements spread evenly over the parameters of one kind, from which norms are estimated.

    The estimates are within 1 or 2%. They take a fortieth of the time of a step of the smallest
    net, and a few thousandths with larger ones (docs/modern.md)."""

    def __init__(self, parameters):
        """parameters: a list. They must be on their device already, and stay there."""
        self.parameters = parameters
        self.views = []  # the elements of each parameter, in its own memory
        for parameter in parameters:
            # An odd stride is seldom a multiple of the row length, so it visits all columns.
            stride = parameter.numel() // SAMPLE_SIZE
            if stride % 2 == 0:
                stride += 1
            self.views.append(parameter.detach().view(-1)[::stride])
        self.moved = None  # whether each parameter moved in the last step that was watched
        self.represented = None  # for each element of values(), how many it stands for

    def values(self):
        """The elements of all parameters now, one after another, as a tensor (elements,)."""
        return torch.cat(self.views)

    def norms(self, before):
        """Norms of the parameters that a step moved, and of their change: a tensor (2,).

        before: values() before the step. Call it while the gradients of the step still exist."""
        change = self.values() - before
        self._update_represented()
        squares = torch.stack([before, change]).square() * self.represented
        return squares.sum(dim=1).sqrt()

    def _update_represented(self):
        moved = [parameter.grad is not None for parameter in self.parameters]
        if moved == self.moved:
            return
        self.moved = moved
        parts = []
        for parameter, view, has_moved in zip(self.parameters, self.views, moved, strict=True):
            # Frozen parameters do not count.
            number = parameter.numel() / len(view) if has_moved else 0.0
            parts.append(torch.full_like(view, number))
        self.represented = torch.cat(parts)


class Health:
    """Measures the norms of the weights, and of how far a step moves them, for each kind."""

    def __init__(self, gpt):
        """gpt: on its device already, where it must stay."""
        parameters_of = {kind: [] for kind in KINDS}
        for name, parameter in gpt.named_parameters():
            parameters_of[kind_of(name)].append(parameter)
        self.samples = {}
        for kind, parameters in parameters_of.items():
            if parameters:  # a tied head is an embedding
                self.samples[kind] = Sample(parameters)
        self.norms = None  # of the last step, (kinds, 2) on the device; None: it was not watched

    @contextlib.contextmanager
    def watch(self, wanted=True):
        """A context around the optimizer's step: figures() then describes that step, if wanted."""
        self.norms = None
        if not wanted:
            yield
            return
        before = [sample.values() for sample in self.samples.values()]
        yield
        norms = []
        for sample, values in zip(self.samples.values(), before, strict=True):
            norms.append(sample.norms(values))
        self.norms = torch.stack(norms)

    def figures(self):
        """The figures of the last step for metrics.jsonl; {} if the step was not watched.

        They are {'weight_norm': {kind: norm}, 'update_ratio': {kind: norm of step / of weights}},
        without kinds that are frozen or not finite. Waits for the device."""
        if self.norms is None:
            return {}
        weight_norm = {}
        update_ratio = {}
        for kind, (weights, update) in zip(self.samples, self.norms.tolist(), strict=True):
            are_finite = math.isfinite(weights) and math.isfinite(update)
            if are_finite and weights > 0:
                weight_norm[kind] = weights
                update_ratio[kind] = update / weights
        if not weight_norm:
            return {}
        return {'weight_norm': weight_norm, 'update_ratio': update_ratio}


def kind_of(name):
    """The kind of a parameter, one of KINDS, by its name in the model."""
    for kind, pattern in PATTERNS.items():
        if re.search(pattern, name):
            return kind
    return 'norm'
