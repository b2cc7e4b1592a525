"""
Token files: opening, checking, and the batch for a given (seed, split, step, micro-batch).

A data set is a folder with train.bin and val.bin, raw little-endian unsigned integers without a header, and meta.json,
which says what they hold. A folder of nanoGPT's (no meta.json; meta.pkl or nothing) is read as well.
"""
import codecs
import os

import numpy as np

from plaingpt.system.messages import UserError

DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}  # on disk: little-endian on every machine
STREAMS = {'train': 0, 'eval-train': 1, 'eval-val': 2}  # evaluation never draws from the stream that training sees
OTHER_FORMATS = {  # the first bytes of what is now and then taken for raw tokens
    **dict.fromkeys([magic.to_bytes(4, 'little') for magic in (20240520, 20240801)],  # GPT-2's tokens, Llama 3's
                    'a token file of llm.c, whose header is no token: drop its first 1024 bytes'),
    b'\x93NUMPY': 'a NumPy file: write its array with .tofile()', b'PK\3\4': 'a zip archive', b'\x1f\x8b\x08': 'gzip',
    b'\x28\xb5\x2f\xfd': 'Zstandard', b'PAR1': 'Parquet', b'\x89HDF': 'HDF5', b'MMIDIDX\0': 'an index of Megatron'}


class TokenFile:
    """One .bin file, opened once and read by offset.

    Reads go through the file, not a memory map: a file cut short while we train then ends in a sentence and not in a
    bus error, and it is faster (12 x 64 tokens in 45 us against 157 us of slicing a map, 64 x 256 in 143 against 859).

    path: the file; dtype: 'uint16' or 'uint32'; vocab_size: ids must be below it (None: not checked);
    block_size: the longest sequence that will be asked for; tokens: how many the file must have (None: any number)."""

    def __init__(self, path, dtype='uint16', vocab_size=None, block_size=1, tokens=None):
        self.path, self.dtype, self.vocab_size = path, DTYPES[dtype], vocab_size
        if not os.path.isfile(path):  # a pipe would be waited for
            wrong = 'is not a file' if os.path.exists(path) else 'not found'
            raise UserError(f'{path} {wrong}: {_how_to_prepare(path)}')
        try:
            self.file = open(path, 'rb', buffering=0)
            head = self.file.read(1024)
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror}): {_how_to_prepare(path)}') from None
        size = os.fstat(self.file.fileno()).st_size
        self.tokens = size // self.dtype.itemsize
        if size == 0:
            raise UserError(f'{path} is empty: {_how_to_prepare(path)}')
        if wrong := _other_format(head, dtype if tokens is None else None):
            raise UserError(f'{path} does not hold {dtype} tokens from its first byte on, but looks like {wrong}')
        if size % self.dtype.itemsize:
            raise UserError(f'{path} has {size} bytes, no whole number of {dtype} tokens: it is cut short or of '
                            f'another format; {_how_to_prepare(path)}')
        if tokens not in (None, self.tokens):
            raise UserError(f'{path} has {self.tokens} {dtype} tokens, but {tokens} by the meta.json beside it: it is '
                            f'cut short or was made by something else; {_how_to_prepare(path)}')
        if self.tokens <= block_size:
            shorter = f'use --block_size={self.tokens - 1} or less, or ' if self.tokens > 1 else 'use '
            raise UserError(f'{path} has {self.tokens} tokens, but block_size={block_size} needs {block_size + 1}: '
                            f'{shorter}more text')

    def __len__(self):
        return self.tokens

    def check_ids(self, vocab_size):
        """Sets vocab_size, and looks for ids beyond it in 64 stretches of the file; UserError names the first. Those
        between are checked when they are read."""
        self.vocab_size = vocab_size
        length = min(self.tokens, 4096)
        self.rows(np.unique(np.linspace(0, self.tokens - length, 64, dtype=np.int64)), length)

    def rows(self, starts, length):
        """int64 array (len(starts), length): the tokens from each start on. UserError for a bad id or a short file."""
        rows = np.empty((len(starts), length), self.dtype)
        for row, start in zip(rows, starts, strict=True):
            try:
                self.file.seek(int(start) * self.dtype.itemsize)
                read = self.file.readinto(memoryview(row).cast('B'))
            except OSError as error:
                raise UserError(f'{self.path} cannot be read at token {start} ({error.strerror})') from error
            if read != row.nbytes:
                raise UserError(f'{self.path} ends before token {start + length}, although it had {self.tokens} tokens '
                                'when it was opened: something has cut it short')
        if self.vocab_size is not None and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UserError(f'{self.path} holds the id {rows[row, column]} at token {starts[row] + column}, but the '
                            f'vocabulary has {self.vocab_size}: the file is of another tokenizer or format')
        return rows.astype(np.int64)

    def batch(self, seed, stream, step, micro_batch, batch_size, block_size, device, part=0, parts=1):
        """Random windows for one micro-batch, the same for the same arguments wherever and whenever they are asked for.

        stream: a key of STREAMS; micro_batch: its number within the step, over all ranks; part, parts: give only every
        parts-th row, from row number part on. Returns x and y, int64 (batch_size / parts, block_size) on device; y is x
        one token later."""
        import torch  # here alone: preparing a data set needs none of it
        random = np.random.default_rng([seed, STREAMS[stream], step, micro_batch])
        starts = random.integers(0, self.tokens - block_size, size=batch_size)[part::parts]
        rows = torch.from_numpy(self.rows(starts, block_size + 1))
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if device.type == 'cuda':  # a pinned copy runs beside the kernels queued before it
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)


def _other_format(head, dtype=None):
    """What a file that begins with these bytes looks like other than tokens, or None. dtype: what it is believed to
    hold where nothing says how many tokens there are."""
    for magic, name in OTHER_FORMATS.items():
        if head.startswith(magic):
            return name
    try:
        text = codecs.getincrementaldecoder('utf-8')().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        text = ''
    if len(text) >= 64 and all(char.isprintable() or char.isspace() for char in text):
        return 'text: a prepare.py makes tokens of it'
    halves = np.frombuffer(head[:len(head) // 4 * 4], '<u2').reshape(-1, 2)
    if dtype == 'uint16' and len(halves) >= 64 and halves[:, 0].any() and not halves[:, 1].any():
        return 'uint32, every other uint16 being 0: a meta.json beside it has to say so'
    return None


def _how_to_prepare(path):
    folder = os.path.dirname(path)
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        return f'put train.bin, val.bin and meta.json into {folder}'
    if os.path.basename(folder) == 'openwebtext':
        return f'run python {script} (54 GB), or start with python train.py config/train_shakespeare_char.py'
    return f'run python {script}'
