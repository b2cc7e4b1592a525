"""
Hashes of stretches of a sequence, computed for a whole array in a few passes of numpy: of words in
a text, of groups of words, of runs of tokens.
"""
import functools

import numpy as np

# The polynomial hash of a stretch v0, v1, v2, … is v0 + v1 BASE + v2 BASE² + …, modulo 2**64. BASE
# is odd, so that it has an inverse: a sum that begins at place i is BASE^i times the hash.
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 2**64)


class StretchHashes:
    """Hashes of stretches of an array; equal stretches have equal hashes, wherever they stand.

    values: uint64 (n,). Two different stretches of random values have the same hash with a
    probability of about 2**-64."""

    def __init__(self, values):
        length = len(values)
        self.sums = np.zeros(length + 1, np.uint64)
        np.cumsum(values * _powers(BASE, length), out=self.sums[1:])
        self.shifts = _powers(INVERSE, length + 1)

    def of(self, starts, ends):
        """Hashes of the stretches from starts to before ends: uint64, in the shape of starts."""
        return (self.sums[ends] - self.sums[starts]) * self.shifts[starts]

    def windows(self, length):
        """Hashes of all stretches of this length: uint64 (n - length + 1,)."""
        sums = self.sums[length:] - self.sums[:-length]
        return sums * self.shifts[:len(sums)]


def _powers(base, count):
    """The powers 0 to count - 1 of base, modulo 2**64."""
    return _many_powers(base, max(count - 1, 1).bit_length())[:count]


@functools.lru_cache(maxsize=8)
def _many_powers(base, bits):
    factors = np.full(2**bits, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
