"""
What the prepare.py scripts share: fetching a text from one of two sources, tokens on their way to disk, and putting a
finished data set (train.bin, val.bin, meta.json) into its folder; and how a run starts them.
"""
import json
import os
import subprocess
import sys

import numpy as np

from plaingpt.system.files import replace_file
from plaingpt.system.messages import UserError, explained
from plaingpt.text.data_sets import FORMAT_VERSION
from plaingpt.text.token_files import DTYPES


def prepare_if_missing(folder):
    """Runs the prepare.py of a data set's folder if there is one and train.bin is missing. UserError if it fails."""
    script, train = (os.path.join(folder, name) for name in ('prepare.py', 'train.bin'))
    if os.path.exists(script) and not os.path.exists(train):
        print(f'no {train} yet: running {script}', flush=True)
        if subprocess.run([sys.executable, script]).returncode:
            raise UserError(f'{script} failed, as said above')


def dtype_for(vocab_size):
    """The key of data_sets.DTYPES for ids below vocab_size: 'uint16' up to 65,536 of them, else 'uint32'."""
    return 'uint16' if vocab_size <= 2 ** 16 else 'uint32'


def pack(ids, vocab_size):
    """Integers (list or array) as an array of the type that they have on disk. UserError for one outside
    0..vocab_size - 1, which would otherwise wrap around to another token."""
    ids = np.asarray(ids, dtype=None if isinstance(ids, np.ndarray) else np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise UserError(f'the tokenizer gave the id {wrong}, but has a vocabulary of {vocab_size}: nothing was written')
    return ids.astype(DTYPES[dtype_for(vocab_size)])


def publish(folder, tokenizer, tokens, source, sha256=None):
    """Makes train.bin.part and val.bin.part, which must be complete, the data set of folder, with their meta.json.

    train.bin goes first and comes back last: whenever we are killed, folder holds the old data set, the new one, or one
    without train.bin, which every reader refuses, and never a meta.json beside the tokens of another tokenizer.
    tokens: {'train': count, 'val': count}; source: where the text is from; sha256: of the text, None if unknown."""
    meta = {'format_version': FORMAT_VERSION, 'dtype': dtype_for(tokenizer.vocab_size),
            'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.to_meta(), 'tokens': tokens, 'source': source,
            'sha256': sha256}
    train, val = (os.path.join(folder, f'{split}.bin') for split in ('train', 'val'))
    with explained(OSError, prefix='the data set could not be put in place: '):
        if os.path.exists(train):
            os.remove(train)
        os.replace(f'{val}.part', val)
        replace_file(os.path.join(folder, 'meta.json'), json.dumps(meta, indent=1).encode())
        os.replace(f'{train}.part', train)
    print(f'{folder}: train.bin has {tokens["train"]:,} tokens, val.bin {tokens["val"]:,}, '
          f'of a vocabulary of {tokenizer.vocab_size:,}')


def write_data_set(folder, tokenizer, ids, source, sha256):
    """Packs ids, {'train': ints, 'val': ints}, and publishes them."""
    for split in ids:
        replace_file(os.path.join(folder, f'{split}.bin.part'), pack(ids[split], tokenizer.vocab_size).tobytes())
    publish(folder, tokenizer, {split: len(ids[split]) for split in ids}, source, sha256)
