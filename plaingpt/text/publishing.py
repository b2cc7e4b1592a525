"""
Puts a finished data set into its folder, so that a reader never finds half of it, and runs the
prepare.py of a data set that is missing.
"""
import json
import os
import subprocess
import sys

from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, explained
from plaingpt.text.data_sets import FORMAT_VERSION
from plaingpt.text.token_files import dtype_for, pack


def prepare_if_missing(folder):
    """Runs a data set's prepare.py if it has one and train.bin is missing.

    UserError if prepare.py fails."""
    script = os.path.join(folder, 'prepare.py')
    train = os.path.join(folder, 'train.bin')
    if os.path.exists(train) or not os.path.exists(script):
        return
    print(f'{train} is missing: running {script}', flush=True)
    finished = subprocess.run([sys.executable, script])
    if finished.returncode != 0:
        raise UserError(f'{script} failed: see its message above')


def write_data_set(folder, tokenizer, ids, source, sha256):
    """Makes ids the data set of a folder, which is created if need be.

    ids: {'train': list of int or integer array, 'val': the same}.
    tokenizer, source, sha256: as in publish()."""
    tokens = {}
    for split in ('train', 'val'):
        packed = pack(ids[split], tokenizer.vocab_size)
        tokens[split] = len(packed)
        path = os.path.join(folder, f'{split}.bin.part')
        with explained(OSError, prefix=f'{path} could not be written: '):
            os.makedirs(folder, exist_ok=True)
            write_atomically(path, packed.tobytes())
    publish(folder, tokenizer, tokens, source, sha256)


def publish(folder, tokenizer, tokens, source, sha256=None):
    """Turns train.bin.part and val.bin.part, which must be complete, into the folder's data set.

    tokens: {'train': count, 'val': count}.
    source: where the text comes from, for meta.json.
    sha256: of the text; None if unknown.

    UserError if the disk is full or the folder can't be written."""
    meta = {
        'format_version': FORMAT_VERSION,
        'dtype': dtype_for(tokenizer.vocab_size),
        'vocab_size': tokenizer.vocab_size,
        'tokenizer': tokenizer.to_meta(),
        'tokens': tokens,
        'source': source,
        'sha256': sha256,
    }
    train = os.path.join(folder, 'train.bin')
    val = os.path.join(folder, 'val.bin')
    meta_json = os.path.join(folder, 'meta.json')

    # The old train.bin is removed first and the new one comes last, because every reader refuses
    # a folder without it. So a kill at any point leaves the old data set, the new one, or one that
    # is refused, and never a meta.json beside the tokens of another tokenizer.
    with explained(OSError, prefix=f'the data set could not be put into {folder}: '):
        if os.path.exists(train):
            os.remove(train)
        os.replace(f'{val}.part', val)
        write_atomically(meta_json, json.dumps(meta, indent=1).encode())
        os.replace(f'{train}.part', train)
    print(f'{folder}: train.bin has {tokens["train"]:,} tokens, val.bin {tokens["val"]:,}, '
          f'from a vocabulary of {tokenizer.vocab_size:,}')
