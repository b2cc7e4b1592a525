"""
How seeds are made: from the run's seed and the numbers of what it is for, a step or a sample. So no
random number depends on what was drawn before, and no generator's state has to be saved.
"""


def mixed_seed(*numbers):
    """One seed, in [0, 2**63), for several whole numbers, such as (seed, step, micro-batch)."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return seed % 2**63
