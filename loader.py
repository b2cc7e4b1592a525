"""
Token files: opening, checking, and the batch for a given (seed, split, step, micro-batch).

A data set is a folder with train.bin and val.bin, raw little-endian unsigned integers without a header, and meta.json,
which says what they hold. A folder of nanoGPT's (no meta.json; meta.pkl or nothing) is read as well.
"""
import codecs
import io
import json
import os
import pickle

import numpy as np

from errors import UserError, warn

FORMAT_VERSION = 1
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}  # on disk: little-endian on every machine
STREAMS = {'train': 0, 'eval-train': 1, 'eval-val': 2}  # evaluation never draws from the stream that training sees
GPT2_VOCAB_SIZE = 50257
META_KEYS = ('dtype', 'vocab_size', 'tokenizer')
OTHER_FORMATS = {  # the first bytes of what is now and then taken for raw tokens
    **dict.fromkeys([magic.to_bytes(4, 'little') for magic in (20240520, 20240801)],  # GPT-2's tokens, Llama 3's
                    'a token file of llm.c, whose header is no token: drop its first 1024 bytes'),
    b'\x93NUMPY': 'a NumPy file: write its array with .tofile()', b'PK\3\4': 'a zip archive', b'\x1f\x8b\x08': 'gzip',
    b'\x28\xb5\x2f\xfd': 'Zstandard', b'PAR1': 'Parquet', b'\x89HDF': 'HDF5', b'MMIDIDX\0': 'an index of Megatron'}


def read_meta(folder):
    """What a data set's files hold, as a dict: dtype ('uint16' or 'uint32'), vocab_size (int, or None if nothing says),
    tokenizer (the dict that tokenizer.py reads) and tokens ({split: count}, {} if nothing says). UserError if meta.json
    is broken."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        return _read_nanogpt_meta(folder)
    try:
        with _open_file(path, encoding='utf-8') as file:
            meta = json.load(file)
        version = meta['format_version']
        dtype, vocab_size, tokenizer = (meta.get(key) for key in META_KEYS)
        tokens = meta.setdefault('tokens', {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is not a readable meta.json ({error!r}): prepare the data set again') from error
    if version != FORMAT_VERSION:
        raise UserError(f'{path} has format version {version!r}, this program reads {FORMAT_VERSION}: '
                        'update the program, or prepare the data set again')
    if not (isinstance(dtype, str) and dtype in DTYPES and type(vocab_size) is int
            and 1 <= vocab_size <= 2 ** (8 * DTYPES[dtype].itemsize) and isinstance(tokenizer, dict)
            and isinstance(tokens, dict) and all(type(count) is int and count >= 0 for count in tokens.values())):
        raise UserError(f'{path} has dtype {str(dtype)[:99]!r}, vocab_size {str(vocab_size)[:99]!r}, tokenizer of type '
                        f'{type(tokenizer).__name__} and tokens {str(tokens)[:99]!r}: prepare the data set again')
    return meta


def _open_file(path, *mode, **options):
    if not os.path.isfile(path):
        raise OSError('it is not a file')  # but a pipe, which would be waited for
    return open(path, *mode, **options)


class _PlainUnpickler(pickle._Unpickler):  # the one in C makes room for as many objects as a file claims to have
    """Admits dict, list, str, int and the like, which need no import, and nothing that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it wants to import {module!r}.{name!r}')


def _read_nanogpt_meta(folder):
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):  # what nanoGPT takes such a folder for
        return {'dtype': 'uint16', 'vocab_size': None, 'tokenizer': {'kind': 'gpt2'}, 'tokens': {}}
    try:
        with _open_file(path, 'rb') as file:
            meta = _PlainUnpickler(io.BytesIO(file.read())).load()
        itos, vocab_size = meta['itos'], meta['vocab_size']
        chars = [itos[i] for i in range(len(itos))]
        if vocab_size != len(chars) or not chars:
            raise ValueError(f'it has a vocab_size of {str(vocab_size)[:99]!r} and {len(chars)} characters')
    except Exception as error:  # a hostile or broken pickle can raise anything; the file is refused either way
        raise UserError(f'{path} is not the vocabulary of a character data set ({error}): '
                        f'run python {os.path.join(folder, "prepare.py")} to write meta.json') from error
    return {'dtype': 'uint16', 'vocab_size': vocab_size, 'tokenizer': {'kind': 'char', 'chars': chars}, 'tokens': {}}


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
        import torch  # only here: to prepare a data set it is not needed
        random = np.random.default_rng([seed, STREAMS[stream], step, micro_batch])
        starts = random.integers(0, self.tokens - block_size, size=batch_size)[part::parts]
        rows = torch.from_numpy(self.rows(starts, block_size + 1))
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if device.type == 'cuda':  # a pinned copy runs beside the kernels queued before it
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)


def open_data_set(folder, block_size, may_be_missing=False):
    """(meta, train, val): what read_meta says of a folder, and its two TokenFiles. UserError as theirs; where there is
    no train.bin and may_be_missing, both are None."""
    meta = read_meta(folder)
    if may_be_missing and not os.path.exists(os.path.join(folder, 'train.bin')):
        warn(f"{folder} has no train.bin: epochs are unknown, and a vocabulary that nothing else tells is taken to be "
             "GPT-2's")
        return meta, None, None
    return meta, *(TokenFile(os.path.join(folder, f'{split}.bin'), meta['dtype'], meta['vocab_size'], block_size,
                             meta['tokens'].get(split)) for split in ('train', 'val'))


def rounded_vocab_size(meta):
    """The vocabulary of a model for a data set: its own, or, of GPT-2's, a rounder and faster one."""
    return 50304 if meta['vocab_size'] in (None, GPT2_VOCAB_SIZE) else meta['vocab_size']


def check_fit(folder, meta, token_files, vocab_size, tokenizer=None):
    """UserError if a data set can't be for a model of this vocab_size, or has not the tokenizer (None: any) that it was
    trained with, or if an id is outside the vocabulary where its files are looked into."""
    if (meta['vocab_size'] or 0) > vocab_size:
        raise UserError(f"{folder} has {meta['vocab_size']} tokens in its vocabulary, the model {vocab_size}: they do "
                        'not belong together')
    if tokenizer not in (None, meta['tokenizer']):
        raise UserError(f'{folder} has another vocabulary than the model was trained with: give the data set of '
                        'then, or one prepared with the same tokenizer')
    for tokens in token_files:
        tokens.check_ids(meta['vocab_size'] or vocab_size)


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
