"""
Which machine, precision and process this is: what train.py, sample.py and bench.py decide before they do anything.
"""
import torch


def seed_dropout(seed, step, unit, device):
    """Makes what dropout draws next a function of the seed, the step and the part of its batch: nothing to save."""
    # On a CPU past torch.manual_seed, which writes down for CUDA who called it: 0.1 to 0.5 ms of a step of 20.
    seed_all = torch.default_generator.manual_seed if device.type == 'cpu' else torch.manual_seed
    seed_all(((seed * 1_000_003 + step) * 1_000_003 + unit) % 2**63)
