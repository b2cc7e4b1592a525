"""
Token files (.bin): how ids lie on disk, opening and checking a split, and its random batches.

A token file holds nothing but ids, as unsigned integers of 2 or 4 bytes, little-endian, without a
header. The meta.json beside it says which type they have (see data_sets.py). A split may also be
cut into several such files (see shards.py).
"""
import numpy as np

from plaingpt.system.messages import UserError
from plaingpt.text.shards import Shards, how_to_prepare

DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}  # little-endian on every machine

# Independent streams of random batches: evaluation never draws from the one that training uses.
STREAMS = {'train': 0, 'eval-train': 1, 'eval-val': 2}


def dtype_for(vocab_size):
    """The key of DTYPES for ids below vocab_size: 'uint16' if they fit into it, else 'uint32'."""
    return 'uint16' if vocab_size <= 2**16 else 'uint32'


def pack(ids, vocab_size):
    """Converts ids (a list of int or an integer array) to an array of the type they have on disk.

    UserError if an id is not in [0, vocab_size): it would wrap around to another token."""
    if not isinstance(ids, np.ndarray):
        ids = np.array(ids, dtype=np.int64)
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise UserError(f'the tokenizer returned the id {ids[outside][0]}, but its vocabulary has '
                        f'{vocab_size} tokens: nothing was written')
    return ids.astype(DTYPES[dtype_for(vocab_size)])


class TokenFile:
    """The tokens of a split, one .bin file or its shards, opened once and read by offset.

    It reads with seek and read, not through a memory map. If something cuts the file short during
    training, a read ends in a sentence, where a map would end in a bus error. It is faster, too:
    12 x 64 tokens take 45 us, against 157 us from a map; 64 x 256 take 143 us, against 859 us.

    path: the split, such as folder/train.bin, also where its files are train_000.bin and so on.
    dtype: 'uint16' or 'uint32'.
    vocab_size: reading an id that is not below it raises UserError; None: ids are not checked.
    block_size: the longest sequence that batch() will be asked for.
    expected_tokens: how many tokens meta.json says the split has; None if it doesn't say.

    UserError if a file is missing, empty, unreadable, too short, or not of this format."""

    def __init__(self, path, dtype='uint16', vocab_size=None, block_size=1, expected_tokens=None):
        self.path = path
        self.dtype = DTYPES[dtype]
        self.vocab_size = vocab_size
        self.shards = Shards(path, self.dtype, is_counted=expected_tokens is not None)
        self.tokens = self.shards.tokens
        files = self.shards.describe()
        have = 'has' if len(self.shards.paths) == 1 else 'together have'

        # Is it complete?
        if expected_tokens is not None and self.tokens != expected_tokens:
            raise UserError(f'{files} {have} {self.tokens} {dtype} tokens, but the meta.json '
                            f'beside it says {expected_tokens}: it was cut short, or something '
                            f'else wrote it; {how_to_prepare(path)}')

        # Is it long enough? A sequence of T tokens and its targets need T + 1.
        if self.tokens <= block_size:
            remedy = 'use more text'
            if self.tokens > 1:
                remedy = f'use --block_size={self.tokens - 1} or less, or more text'
            raise UserError(f'{files} {have} {self.tokens} tokens, but block_size={block_size} '
                            f'needs {block_size + 1}: {remedy}')

    def __len__(self):
        return self.tokens

    def check_ids(self, vocab_size):
        """Sets vocab_size, and checks the ids in 64 stretches spread evenly over the split.

        The other ids are checked when they are read. UserError names the first id outside."""
        self.vocab_size = vocab_size
        length = min(self.tokens, 4096)
        starts = np.linspace(0, self.tokens - length, 64, dtype=np.int64)
        self.rows(np.unique(starts), length)

    def rows(self, starts, length):
        """Reads `length` tokens from each start on: an int64 array (len(starts), length).

        UserError if an id is outside the vocabulary, or a file has been cut short."""
        return self._read(starts, length).astype(np.int64)

    def _read(self, starts, length):
        """rows() in the type that the tokens have on disk."""
        rows = np.empty((len(starts), length), self.dtype)
        row_bytes = length * self.dtype.itemsize
        content = memoryview(rows.view(np.uint8).reshape(-1))
        for row, start in enumerate(np.asarray(starts).tolist()):  # Python's integers are faster
            begin = row * row_bytes
            self.shards.read_into(content[begin:begin + row_bytes], start)
        if self.vocab_size is not None and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            path, place = self.shards.place_of(int(starts[row] + column))
            raise UserError(f'{path} holds the id {rows[row, column]} at token {place}, but the '
                            f'vocabulary has {self.vocab_size} tokens: the file was written by '
                            'another tokenizer or has another format')
        return rows

    def batch(self, seed, stream, step, micro_batch, batch_size, block_size, device, part=0,
              parts=1):
        """Random windows for one micro-batch: a pure function of the arguments and the file.

        stream: a key of STREAMS.
        micro_batch: its number within the step, counted over all ranks.
        part, parts: return only every parts-th row, beginning with row number `part`.

        Returns x and y, int64 (batch_size / parts, block_size) on device; y is x one token on."""
        random = np.random.default_rng([seed, STREAMS[stream], step, micro_batch])
        # All parts draw the starts of the whole micro-batch, and each keeps its own.
        starts = random.integers(0, self.tokens - block_size, size=batch_size)[part::parts]
        return inputs_and_targets(self.rows(starts, block_size + 1), device)


def inputs_and_targets(windows, device):
    """x and y, int64 (B, T) on a device, of windows, an int64 array (B, T + 1)."""
    import torch  # here, because preparing a data set should not wait for it
    windows = torch.from_numpy(windows)
    x = windows[:, :-1].contiguous()
    y = windows[:, 1:].contiguous()
    if device.type == 'cuda':
        # A copy from pinned memory runs while the GPU computes what was queued before it.
        x = x.pin_memory().to(device, non_blocking=True)
        y = y.pin_memory().to(device, non_blocking=True)
        return x, y
    return x.to(device), y.to(device)
