"""
How the weights move: the learning rate of a step, the optimizers, the guard against numbers that are not finite, and
the figures by which one sees whether a run is healthy.

References:
[1] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
[2] Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4: the warm-up, stable, decay schedule (wsd)
[3] Smith 2015, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3: the range test
"""
import os

from tqdm import tqdm

import plot
from plaingpt.system.messages import RANK, UserError, explained, print0


def find_learning_rate(train_step, guard, out_dir, lowest=1e-6, highest=10.0, steps=200):
    """Prints a suggestion for learning_rate, and draws how the loss changes where the rate rises in every step by the
    same factor [3]: find_lr.png in out_dir, the one thing that is written.

    train_step: a function of the number of steps before and the rate. It ends where the smoothed loss is four times its
    lowest, or not finite. The suggestion is a tenth of the rate at which it is lowest: from there on noise grows faster
    than what is learnt."""
    with explained(OSError, prefix='out_dir cannot be written: '):
        os.makedirs(out_dir, exist_ok=True)
    rates, losses, smoothed, mean = [], [], [], 0.0
    for step in tqdm(range(steps), 'find_lr', leave=False, disable=None if RANK == 0 else True):
        rates.append(lowest * (highest / lowest) ** (step / (steps - 1)))
        train_step(step, rates[-1])
        record, wrong = guard.look()
        if wrong:
            rates.pop()
            break
        losses.append(record['loss'])
        mean = 0.9 * mean + 0.1 * losses[-1]
        smoothed.append(mean / (1 - 0.9 ** len(losses)))
        if smoothed[-1] > 4 * min(smoothed):
            break
    if not smoothed:
        raise UserError('the loss is not finite at the lowest learning rate already: look at the data and the weights')
    lowest_at = rates[smoothed.index(min(smoothed))]
    suggestion = lowest_at / 10
    factor = guard.optimizer.param_groups[-1]['factor']  # of Muon, whose rate has risen too
    print0(f'the loss is lowest, {min(smoothed):.4f}, at a learning rate of {lowest_at:.1e}: try '
           f'--learning_rate={suggestion:.1e}' + f' --muon_learning_rate={factor * suggestion:.1e}' * (factor != 1))
    if RANK == 0:
        plot.draw_sweep(rates, losses, smoothed, suggestion, os.path.join(out_dir, 'find_lr.png'))
