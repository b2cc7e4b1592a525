"""
The unfinished token files of a split: one, or shards of equal length, written in order.

They are called train.bin.part, or train_000.bin.part and so on, until publishing.py makes them a
data set.
"""
import os

import numpy as np

from plaingpt.system.files import remove
from plaingpt.text.shards import shard_path, shards_of


class PartFiles:
    """What is written for one split.

    whole: the path of the only file, such as folder/train.bin.part, or of what is cut into shards.
    dtype: of the values. shard_tokens: values in a shard; 0: all in one file."""

    def __init__(self, whole, dtype, shard_tokens=0):
        self.whole = whole
        self.dtype = np.dtype(dtype)
        self.shard_tokens = shard_tokens
        self.tokens = 0   # written so far
        self.file = None  # the one that is being written

    @property
    def name(self):
        """'train', 'val_mask' or 'fingerprints'."""
        return os.path.basename(self.whole).removesuffix('.part').removesuffix('.bin')

    def path(self, shard):
        return shard_path(self.whole, shard) if self.shard_tokens else self.whole

    def holds(self, tokens):
        """Whether the files on disk have at least so many values."""
        shard, rest = self._locate(tokens)
        sizes = [self.shard_tokens] * shard
        if rest > 0:
            sizes.append(rest)
        for number, size in enumerate(sizes):
            path = self.path(number)
            if not os.path.exists(path) or os.path.getsize(path) < size * self.dtype.itemsize:
                return False
        return True

    def begin(self, tokens):
        """Gets ready to write after so many values. What lies behind them is removed."""
        shard, rest = self._locate(tokens)
        complete = {self.path(number) for number in range(shard)}
        current = self.path(shard)
        used = {*complete, current} if rest > 0 else complete
        for path in (self.whole, *shards_of(self.whole).values()):
            if path not in used:
                remove([path])
        for path in complete:
            os.truncate(path, self.shard_tokens * self.dtype.itemsize)
        if rest > 0:
            os.truncate(current, rest * self.dtype.itemsize)
            self.file = self._open(shard, 'ab')
        self.tokens = tokens

    def write(self, values):
        """Appends an array, which may go on in the next shard."""
        while len(values) > 0:
            shard, rest = self._locate(self.tokens)
            if rest == 0:
                self.close()
                self.file = self._open(shard, 'wb')
            room = self.shard_tokens - rest if self.shard_tokens else len(values)
            self.file.write(values[:room].astype(self.dtype, copy=False).tobytes())
            self.tokens += len(values[:room])
            values = values[room:]

    def sync(self):
        """Makes sure that what was written is on the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        self.sync()
        if self.file:
            self.file.close()
            self.file = None

    def _open(self, shard, mode):
        return open(self.path(shard), mode)

    def _locate(self, tokens):
        """The shard in which value number `tokens` lies, and its place there."""
        if self.shard_tokens:
            return divmod(tokens, self.shard_tokens)
        return 0, tokens
