"""
The strided windows in which a model reads a split, and which of their targets count.

With 10 tokens, windows of 4 and a stride of 2, a window reads the tokens marked . or x and predicts
the token after each. It counts the targets marked x, which the window before has not predicted:

    tokens     0 1 2 3 4 5 6 7 8 9
    window 0   x x x x
    window 1       . . x x
    window 2           . . x x
    window 3             . . . x

So each target counts once and, beyond the first window, has at least length - stride tokens of
context. The last window begins earlier than a stride after its predecessor, so that it ends where
the split ends, and all windows are equally long.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class WindowBatch(NamedTuple):
    """Consecutive windows that a model reads together."""
    tokens: np.ndarray   # int64 (B, T + 1): T tokens to read, and the target of the last one
    counted: np.ndarray  # bool (B, T): whether the target of that position counts


@dataclass(frozen=True)
class Windows:
    """The windows of a split, numbered from 0.

    A split of N tokens has N - 1 targets: nothing predicts its first token."""
    targets: int  # in all
    length: int   # tokens that a window reads
    stride: int   # targets that a window adds to those before, but for the first and the last one

    @classmethod
    def over(cls, tokens, context_size, stride):
        """The windows of a split of so many tokens, at least 2, which may be less than a window."""
        length = min(context_size, tokens - 1)
        return cls(tokens - 1, length, min(stride, length))

    def __len__(self):
        return 1 + math.ceil((self.targets - self.length) / self.stride)

    def start(self, number):
        """The first token that a window reads."""
        return min(number * self.stride, self.targets - self.length)

    def counted_before(self, number):
        """How many targets the windows before this one have counted."""
        if number == 0:
            return 0
        return self.start(number - 1) + self.length

    def read(self, token_file, first, last):
        """The WindowBatch of windows first to last - 1, from a TokenFile."""
        numbers = range(first, last)
        starts = [self.start(number) for number in numbers]
        already_counted = np.array([self.counted_before(number) for number in numbers]) - starts
        counted = np.arange(self.length) >= already_counted[:, None]
        return WindowBatch(token_file.rows(starts, self.length + 1), counted)
