"""
The search for a learning rate: train with a rate that rises in each step, and see where the loss
begins to rise with it.

Smith 2015, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3, the
range test.
"""
from typing import NamedTuple

from tqdm import tqdm

from plaingpt.system.messages import RANK, UserError, print0

DIVERGED = 4  # the search ends if the smoothed loss is this many times its lowest


class Sweep(NamedTuple):
    """The steps of a search whose loss was finite, and what they suggest."""
    rates: list[float]     # learning rate of each step
    losses: list[float]    # loss of each step
    smoothed: list[float]  # running mean of the losses
    suggestion: float      # for the key learning_rate


def find(train_step, guard, first_step=0, lowest=1e-6, highest=10.0, steps=200):
    """Trains with rates from lowest to highest, prints a suggestion, and returns the Sweep.

    train_step(step, rate) runs training step `step` at learning rate `rate`, and guard reports on
    it. first_step: number of the first one. The search ends early where the loss diverges.
    UserError if the loss is not finite at the lowest rate."""
    rates = []
    losses = []
    smoothed = []
    mean = 0.0
    is_silent = None if RANK == 0 else True  # None: on the first rank a bar if it is a terminal
    for count in tqdm(range(steps), 'find_lr', leave=False, disable=is_silent):
        # The rate rises in each step by the same factor.
        rate = lowest * (highest / lowest) ** (count / (steps - 1))
        train_step(first_step + count, rate)
        report = guard.read()
        if report.halted:
            break
        rates.append(rate)
        losses.append(report.loss)

        # A running mean from 0, divided by the weight that the losses have in it so far.
        mean = 0.9 * mean + 0.1 * report.loss
        smoothed.append(mean / (1 - 0.9 ** len(losses)))
        if smoothed[-1] > DIVERGED * min(smoothed):
            break
    if not smoothed:
        raise UserError('the loss is not finite even at the lowest learning rate: check the data '
                        'and the weights')

    # A tenth of the rate with the lowest loss: above it, noise grows faster than what is learned.
    lowest_loss = min(smoothed)
    best_rate = rates[smoothed.index(lowest_loss)]
    suggestion = best_rate / 10
    flags = f'--learning_rate={suggestion:.1e}'
    muon_factor = guard.optimizer.param_groups[-1]['factor']  # 1 for AdamW alone
    if muon_factor != 1:
        flags += f' --muon_learning_rate={muon_factor * suggestion:.1e}'
    print0(f'the loss is lowest, {lowest_loss:.4f}, at a learning rate of {best_rate:.1e}: '
           f'try {flags}')
    return Sweep(rates, losses, smoothed, suggestion)
