"""
The schedules: the learning rate of each step of a run.

All of them warm up linearly to the peak, learning_rate, decay to min_lr, and stay there. To add
one, write its function, call it in learning_rate(), and name it in the key `schedule` of train.py.
"""
import math


def learning_rate(step, run):
    """The learning rate of a step, counted from 0; run: the config of train.py."""
    if not run['decay_lr']:
        return run['learning_rate']
    if step < run['warmup_iters']:
        return warmup(step, run)
    if run['schedule'] == 'cosine':
        return cosine(step, run)
    if run['schedule'] == 'linear':
        return linear(step, run)
    return wsd(step, run)


def warmup(step, run):
    """A linear rise that reaches the peak right after warmup_iters steps; never 0."""
    peak = run['learning_rate']
    return peak * (step + 1) / (run['warmup_iters'] + 1)


def cosine(step, run):
    """Half a period of a cosine, from the end of the warm-up to lr_decay_iters."""
    done = decay_done(step, run['warmup_iters'], run['lr_decay_iters'])
    return interpolate(run, (1 + math.cos(math.pi * done)) / 2)


def linear(step, run):
    """A straight line from the end of the warm-up to lr_decay_iters."""
    done = decay_done(step, run['warmup_iters'], run['lr_decay_iters'])
    return interpolate(run, 1 - done)


def wsd(step, run):
    """Warm-up, stable, decay: the peak, and a straight line in the last decay_share of the steps.

    A run can be extended from any state before the decay. Hu et al. 2024, MiniCPM, arXiv
    2404.06395, section 4."""
    end = run['lr_decay_iters']
    begin = max(run['warmup_iters'], end * (1 - run['decay_share']))
    return interpolate(run, 1 - decay_done(step, begin, end))


def decay_done(step, begin, end):
    """The share of a decay from step begin to step end that is over, 0 to 1."""
    done = max(0, step - begin) / max(1, end - begin)
    return min(1.0, done)


def interpolate(run, height):
    """The rate at a height between min_lr (0) and the peak (1)."""
    lowest = run['min_lr']
    return lowest + (run['learning_rate'] - lowest) * height
