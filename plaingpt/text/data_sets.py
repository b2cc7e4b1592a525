"""
Token files: opening, checking, and the batch for a given (seed, split, step, micro-batch).

A data set is a folder with train.bin and val.bin, raw little-endian unsigned integers without a header, and meta.json,
which says what they hold. A folder of nanoGPT's (no meta.json; meta.pkl or nothing) is read as well.
"""
import io
import json
import os
import pickle

import numpy as np

from plaingpt.system.messages import UserError, warn
from plaingpt.text.token_files import DTYPES, TokenFile

FORMAT_VERSION = 1
GPT2_VOCAB_SIZE = 50257
META_KEYS = ('dtype', 'vocab_size', 'tokenizer')


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
