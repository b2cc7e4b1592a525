"""
Token files (.bin): how ids lie on disk, opening and checking a file, and its random batches.

A token file holds nothing but ids, as unsigned integers of 2 or 4 bytes, little-endian, without a
header. The meta.json beside it says which type they have (see data_sets.py).
"""
import codecs
import os

import numpy as np

from plaingpt.system.messages import UserError

DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}  # little-endian on every machine

# Independent streams of random batches: evaluation never draws from the one that training uses.
STREAMS = {'train': 0, 'eval-train': 1, 'eval-val': 2}

# The first bytes of files that people mistake for raw tokens.
LLM_C_ADVICE = 'a token file of llm.c, which begins with a header: remove its first 1024 bytes'
OTHER_FORMATS = {
    (20240520).to_bytes(4, 'little'): LLM_C_ADVICE,  # GPT-2's tokens
    (20240801).to_bytes(4, 'little'): LLM_C_ADVICE,  # Llama 3's
    b'\x93NUMPY': 'a NumPy file: write its array with .tofile()',
    b'PK\3\4': 'a zip archive',
    b'\x1f\x8b\x08': 'gzip',
    b'\x28\xb5\x2f\xfd': 'Zstandard',
    b'PAR1': 'Parquet',
    b'\x89HDF': 'HDF5',
    b'MMIDIDX\0': 'an index of Megatron',
}


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
    """One .bin file, opened once and read by offset.

    It reads with seek and read, not through a memory map. If something cuts the file short during
    training, a read ends in a sentence, where a map would end in a bus error. It is faster, too:
    12 x 64 tokens take 45 us, against 157 us from a map; 64 x 256 take 143 us, against 859 us.

    path: the file.
    dtype: 'uint16' or 'uint32'.
    vocab_size: reading an id that is not below it raises UserError; None: ids are not checked.
    block_size: the longest sequence that batch() will be asked for.
    expected_tokens: how many tokens meta.json says the file has; None if it doesn't say.

    UserError if the file is missing, empty, unreadable, too short, or not of this format."""

    def __init__(self, path, dtype='uint16', vocab_size=None, block_size=1, expected_tokens=None):
        self.path = path
        self.dtype = DTYPES[dtype]
        self.vocab_size = vocab_size
        try:
            self.file = _open(path)
            head = self.file.read(1024)
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror}): '
                            f'{_how_to_prepare(path)}') from None
        size = os.fstat(self.file.fileno()).st_size
        self.tokens = size // self.dtype.itemsize
        if size == 0:
            raise UserError(f'{path} is empty: {_how_to_prepare(path)}')

        # Is this a file of tokens at all? Where meta.json gives a count, the count tells uint16
        # from uint32 better than a guess from the first bytes.
        other_format = _recognise_format(head)
        if other_format is None and dtype == 'uint16' and expected_tokens is None:
            other_format = _recognise_uint32(head)
        if other_format is not None:
            raise UserError(f'{path} does not hold {dtype} tokens from its first byte on, but '
                            f'looks like {other_format}')

        # Is it complete?
        if size % self.dtype.itemsize != 0:
            raise UserError(f'{path} has {size} bytes, which is not a whole number of {dtype} '
                            'tokens: it was cut short or has another format; '
                            f'{_how_to_prepare(path)}')
        if expected_tokens is not None and self.tokens != expected_tokens:
            raise UserError(f'{path} has {self.tokens} {dtype} tokens, but the meta.json beside it '
                            f'says {expected_tokens}: it was cut short, or something else wrote '
                            f'it; {_how_to_prepare(path)}')

        # Is it long enough? A sequence of T tokens and its targets need T + 1.
        if self.tokens <= block_size:
            remedy = 'use more text'
            if self.tokens > 1:
                remedy = f'use --block_size={self.tokens - 1} or less, or more text'
            raise UserError(f'{path} has {self.tokens} tokens, but block_size={block_size} needs '
                            f'{block_size + 1}: {remedy}')

    def __len__(self):
        return self.tokens

    def check_ids(self, vocab_size):
        """Sets vocab_size, and checks the ids in 64 stretches spread evenly over the file.

        The other ids are checked when they are read. UserError names the first id outside."""
        self.vocab_size = vocab_size
        length = min(self.tokens, 4096)
        starts = np.linspace(0, self.tokens - length, 64, dtype=np.int64)
        self.rows(np.unique(starts), length)

    def rows(self, starts, length):
        """Reads `length` tokens from each start on: an int64 array (len(starts), length).

        UserError if an id is outside the vocabulary, or the file has been cut short."""
        rows = np.empty((len(starts), length), self.dtype)
        for row, start in zip(rows, starts, strict=True):
            try:
                self.file.seek(int(start) * self.dtype.itemsize)
                bytes_read = self.file.readinto(memoryview(row).cast('B'))
            except OSError as error:
                raise UserError(f'{self.path} cannot be read at token {start} '
                                f'({error.strerror})') from error
            if bytes_read != row.nbytes:
                raise UserError(f'{self.path} ends before token {start + length}, although it had '
                                f'{self.tokens} tokens when it was opened: something has cut it '
                                'short')
        if self.vocab_size is not None and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UserError(f'{self.path} holds the id {rows[row, column]} at token '
                            f'{starts[row] + column}, but the vocabulary has {self.vocab_size} '
                            'tokens: the file was written by another tokenizer or has another '
                            'format')
        return rows.astype(np.int64)

    def batch(self, seed, stream, step, micro_batch, batch_size, block_size, device, part=0,
              parts=1):
        """Random windows for one micro-batch: a pure function of the arguments and the file.

        stream: a key of STREAMS.
        micro_batch: its number within the step, counted over all ranks.
        part, parts: return only every parts-th row, beginning with row number `part`.

        Returns x and y, int64 (batch_size / parts, block_size) on device; y is x one token on."""
        import torch  # here, because preparing a data set should not wait for it
        random = np.random.default_rng([seed, STREAMS[stream], step, micro_batch])
        # All parts draw the starts of the whole micro-batch, and each keeps its own.
        starts = random.integers(0, self.tokens - block_size, size=batch_size)[part::parts]
        windows = torch.from_numpy(self.rows(starts, block_size + 1))  # (B, T + 1)
        x = windows[:, :-1].contiguous()
        y = windows[:, 1:].contiguous()
        if device.type == 'cuda':
            # A copy from pinned memory runs while the GPU computes what was queued before it.
            x = x.pin_memory().to(device, non_blocking=True)
            y = y.pin_memory().to(device, non_blocking=True)
            return x, y
        return x.to(device), y.to(device)


def _open(path):
    """The file at path, unbuffered. UserError if it is missing or not a file, else OSError."""
    if not os.path.exists(path):
        raise UserError(f'{path} not found: {_how_to_prepare(path)}')
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise UserError(f'{path} is not a file: {_how_to_prepare(path)}')
    return open(path, 'rb', buffering=0)


def _recognise_format(head):
    """Names the format of a file that begins with these bytes; None if they may be tokens."""
    for magic, name in OTHER_FORMATS.items():
        if head.startswith(magic):
            return name
    # 64 printable characters in a row are text. Tokens hardly ever happen to be valid UTF-8.
    try:
        # The incremental decoder accepts that the last character may be cut off.
        text = codecs.getincrementaldecoder('utf-8')().decode(head)
    except UnicodeDecodeError:
        return None
    if len(text) >= 64 and all(char.isprintable() or char.isspace() for char in text):
        return 'text: convert it to tokens with a prepare.py'
    return None


def _recognise_uint32(head):
    """Names uint32 if a file that begins with these bytes seems to hold it, else None.

    Read as uint16, small uint32 numbers have a zero in every other place."""
    halves = np.frombuffer(head[:len(head) // 4 * 4], '<u2').reshape(-1, 2)
    low = halves[:, 0]
    high = halves[:, 1]
    if len(halves) >= 64 and low.any() and not high.any():
        return 'uint32, because every other uint16 is 0: the meta.json beside it has to say so'
    return None


def _how_to_prepare(path):
    """The end of an error message: how to get the token file at path."""
    folder = os.path.dirname(path)
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        return f'put train.bin, val.bin and meta.json into {folder}'
    if os.path.basename(folder) == 'openwebtext':
        return (f'run python {script} (54 GB), or start with python train.py '
                'config/train_shakespeare_char.py')
    return f'run python {script}'
