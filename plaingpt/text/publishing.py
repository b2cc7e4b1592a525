"""
Puts a finished data set into its folder, so that a reader never finds half of it, and runs the
prepare.py of a data set that is missing.
"""
import json
import os
import subprocess
import sys

from plaingpt.system.files import remove, sync, write_atomically
from plaingpt.system.messages import UserError, explained, print0
from plaingpt.text.data_sets import FORMAT_VERSION, SPLITS, mask_path
from plaingpt.text.shards import files_of, has_split, shards_of
from plaingpt.text.token_files import DTYPES, dtype_for, pack
from plaingpt.text.tokenizer_folder import TOKENIZER_JSON

# The tokenizer once more, in the formats that other programs read.
TIKTOKEN_FILE = 'tokenizer.tiktoken'
# What a report says of the old data set (see plaingpt/inspection/report.py) is not true of the new.
REPORT_FILES = ('report.html', 'report.json', 'lengths.png')


# ---- preparing ----

def prepare_if_missing(folder):
    """Runs a data set's prepare.py if it has one and its training tokens are missing.

    UserError if prepare.py fails."""
    script = os.path.join(folder, 'prepare.py')
    train = os.path.join(folder, 'train.bin')
    if has_split(train) or not os.path.exists(script):
        return
    print(f'{train} is missing: running {script}', flush=True)
    finished = subprocess.run([sys.executable, script])
    if finished.returncode != 0:
        raise UserError(f'{script} failed: see its message above')


def write_data_set(folder, tokenizer, ids, source, sha256):
    """Makes ids the data set of a folder, which is created if need be.

    ids: {'train': list of int or integer array, 'val': the same}.
    tokenizer, source, sha256: as in publish()."""
    with explained(OSError, prefix=f'{folder} could not be written: '):
        remove_parts(folder)  # of a preparation that was given up
    tokens = {}
    for split in SPLITS:
        packed = pack(ids[split], tokenizer.vocab_size)
        tokens[split] = len(packed)
        path = os.path.join(folder, f'{split}.bin.part')
        with explained(OSError, prefix=f'{path} could not be written: '):
            os.makedirs(folder, exist_ok=True)
            write_atomically(path, packed.tobytes())
    publish(folder, tokenizer, tokens, source, sha256)


def remove_parts(folder):
    """Removes the .part files in a folder. OSError if that is not allowed."""
    for split in SPLITS:
        for path in (os.path.join(folder, f'{split}.bin.part'), mask_path(folder, split, '.part')):
            remove([path, *shards_of(path).values()])
    for name in ('meta.json', TOKENIZER_JSON, TIKTOKEN_FILE):
        remove([os.path.join(folder, f'{name}.part')])


# ---- publishing ----

def publish(folder, tokenizer, tokens, source, sha256=None, preparation=None):
    """Turns the finished .part files of a folder into its data set.

    They are train.bin.part or train_000.bin.part, train_001.bin.part, …, the same for val, and for
    a chat a loss mask beside each split, such as train_mask.bin.part: one uint8 for each token.

    tokens: {'train': count, 'val': count}.
    source: where the text comes from, for meta.json.
    sha256: of the text; None if unknown.
    preparation: how it was made, a value for JSON that goes into meta.json; None: not told.

    UserError if a .part file is missing or has another size, if the disk is full, or if the folder
    can't be written."""
    meta = {
        'format_version': FORMAT_VERSION,
        'dtype': dtype_for(tokenizer.vocab_size),
        'vocab_size': tokenizer.vocab_size,
        'tokenizer': tokenizer.to_meta(),
        'tokens': tokens,
        'source': source,
        'sha256': sha256,
    }
    if preparation is not None:
        meta['preparation'] = preparation
    itemsize = DTYPES[meta['dtype']].itemsize
    meta['loss_mask'] = any(has_split(mask_path(folder, split, '.part')) for split in SPLITS)
    parts = {}  # the .part files by split
    masks = []  # and those of all loss masks
    for split in SPLITS:
        path = os.path.join(folder, f'{split}.bin.part')
        parts[split] = _finished_parts(path, tokens[split] * itemsize)
        if meta['loss_mask']:
            masks += _finished_parts(mask_path(folder, split, '.part'), tokens[split])
    contents = _tokenizer_files(meta['tokenizer'])
    meta['tokenizer_files'] = list(contents)
    contents['meta.json'] = json.dumps(meta, indent=1).encode()

    # The small files are written first, beside the old data set, which a full disk then leaves as
    # it is. What follows only removes and renames. Every reader refuses a split without its first
    # file, and a wrong number of tokens. So a kill at any point leaves the old data set, the new
    # one, or splits that are refused: meta.json is never read with the tokens of another tokenizer.
    with explained(OSError, prefix=f'the data set could not be put into {folder}: '):
        for name, content in contents.items():
            write_atomically(os.path.join(folder, f'{name}.part'), content)
        _remove_data_set(folder)
        _finish(os.path.join(folder, f'{name}.part') for name in reversed(contents))
        _finish(masks)
        _finish(reversed(parts['val']))
        _finish(reversed(parts['train']))  # train.bin or train_000.bin completes the data set
        sync(folder)
    files = {}
    for split, paths in parts.items():
        if len(paths) == 1:
            files[split] = os.path.basename(paths[0]).removesuffix('.part')
        else:
            files[split] = f'{split}.bin (in {len(paths)} shards)'
    print0(f'{folder}: {files["train"]} has {tokens["train"]:,} tokens, {files["val"]} '
           f'{tokens["val"]:,}, from a vocabulary of {tokenizer.vocab_size:,}')


def _finished_parts(path, size):
    """The .part files of a split, or of its mask. UserError unless they have `size` bytes in all.

    path: that of the only file; where it is missing, its shards are meant."""
    paths = files_of(path)
    found = sum(os.path.getsize(part) for part in paths)
    if not paths or found != size:
        raise UserError(f'{path}, or its shards, should have {size} bytes, but {found} are there: '
                        'something else has changed the folder, so prepare the data set again')
    return paths


def _tokenizer_files(tokenizer_meta):
    """{name: bytes} of the files beside meta.json that give the tokenizer to other programs.

    They have the tokenizers that one's own text was made with; others are known by their names."""
    if tokenizer_meta['kind'] != 'tokenizer.json':
        return {}
    from plaingpt.text.tokenizer_export import tiktoken_ranks_of  # here, as it needs more packages
    files = {TOKENIZER_JSON: tokenizer_meta['json'].encode()}
    ranks = tiktoken_ranks_of(tokenizer_meta)
    if ranks is not None:
        files[TIKTOKEN_FILE] = ranks
    return files


def _remove_data_set(folder):
    """Removes the token files, loss masks, tokenizer files and report of the old data set."""
    old = []
    for split in SPLITS:
        # The first file of a split goes first, without which the others are refused.
        path = os.path.join(folder, f'{split}.bin')
        old += [path, *shards_of(path).values()]
    for split in SPLITS:
        path = mask_path(folder, split)
        old += [path, *shards_of(path).values()]
    for name in (*_published_tokenizer_files(folder), *REPORT_FILES):
        old.append(os.path.join(folder, name))
    remove(old)
    sync(folder)  # before anything new is there


def _published_tokenizer_files(folder):
    """The tokenizer files that publish() has put beside the meta.json of a folder."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
            names = json.load(file).get('tokenizer_files', [])
    except (OSError, ValueError, AttributeError, RecursionError):
        return []  # there is none, or nothing that could be trusted
    # A user may have put a tokenizer.json there, which is not ours to remove.
    return [name for name in (TOKENIZER_JSON, TIKTOKEN_FILE) if name in names]


def _finish(parts):
    """Takes the ending .part from the names of files, in this order."""
    for part in parts:
        os.replace(part, part.removesuffix('.part'))
