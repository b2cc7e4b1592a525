"""
Data sets on disk: where their folders are, what their files hold, and whether they fit a model.

A data set is a folder with train.bin and val.bin (see token_files.py), each perhaps cut into shards
(see shards.py), and meta.json, which gives the type of the ids, the vocabulary and the tokenizer. A
data set of chats also has loss masks, train_mask.bin and val_mask.bin: one uint8 for each token, 1
where its loss counts. publishing.py writes these files. nanoGPT's folders work, too: they have a
meta.pkl, or nothing, in place of meta.json.
"""
import io
import json
import os
import pickle

from plaingpt.system.messages import UserError, warn
from plaingpt.text.shards import files_of, has_split
from plaingpt.text.token_files import DTYPES, TokenFile
from plaingpt.text.tokenizers import GPT2_VOCAB_SIZE, same_vocabulary

DATA_FOLDER = os.path.abspath(os.path.join(__file__, '..', '..', '..', 'data'))
FORMAT_VERSION = 1  # of meta.json
SPLITS = ('train', 'val')


def folder_of(dataset):
    """The path of a data set's folder: data/<dataset> beside the scripts; absolute names pass."""
    return os.path.join(DATA_FOLDER, os.path.expanduser(dataset))


def mask_path(folder, split, ending=''):
    """The path of a split's loss mask, which may be cut into shards, too."""
    return os.path.join(folder, f'{split}_mask.bin{ending}')


# ---- what the files hold ----

def read_meta(folder):
    """Reads what the token files in a folder hold. Returns a dict with at least

    dtype: 'uint16' or 'uint32'.
    vocab_size: int, or None if no file says.
    tokenizer: the dict that load_tokenizer() takes.
    tokens: {split: count}; {} if no file says.

    UserError if meta.json, or nanoGPT's meta.pkl, is damaged."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        return _read_nanogpt_meta(folder)
    try:
        meta = json.loads(_read_file(path).decode('utf-8'))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f'{path} is not a readable meta.json ({error!r}): '
                        'prepare the data set again') from error
    if not isinstance(meta, dict) or 'format_version' not in meta:
        raise UserError(f'{path} is not a meta.json of this program: prepare the data set again')

    # The version comes first: a later one may give the other keys another meaning.
    version = meta['format_version']
    if version != FORMAT_VERSION:
        raise UserError(f'{path} has format version {_shown(version)}, but this program reads '
                        f'{FORMAT_VERSION}: update the program, or prepare the data set again')
    dtype = meta.get('dtype')
    vocab_size = meta.get('vocab_size')
    tokens = meta.setdefault('tokens', {})

    def check(is_valid, key):
        if not is_valid:
            raise UserError(f'{path} has an invalid {key}, {_shown(meta.get(key))}: '
                            'prepare the data set again')

    check(isinstance(dtype, str) and dtype in DTYPES, 'dtype')
    check(_is_count(vocab_size) and vocab_size >= 1, 'vocab_size')
    check(vocab_size <= 2 ** (8 * DTYPES[dtype].itemsize), 'vocab_size')
    check(isinstance(meta.get('tokenizer'), dict), 'tokenizer')
    check(isinstance(tokens, dict) and all(_is_count(count) for count in tokens.values()), 'tokens')
    check(isinstance(meta.get('loss_mask', False), bool), 'loss_mask')
    return meta


def _read_nanogpt_meta(folder):
    """read_meta() for a folder of nanoGPT's, whose ids are always uint16."""
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        # nanoGPT's own rule: where nothing gives a vocabulary, the tokens are GPT-2's.
        return {'dtype': 'uint16', 'vocab_size': None, 'tokenizer': {'kind': 'gpt2'}, 'tokens': {}}

    def refuse(reason):
        return UserError(f'{path} is not the vocabulary of a character data set ({reason}): '
                         f'run python {os.path.join(folder, "prepare.py")} to write meta.json')

    try:
        content = _PlainUnpickler(io.BytesIO(_read_file(path))).load()
    except Exception as error:  # on hostile bytes an unpickler can raise anything
        raise refuse(error) from error
    try:
        itos = content['itos']
        chars = [itos[i] for i in range(len(itos))]
        vocab_size = content['vocab_size']
    except (LookupError, TypeError) as error:
        raise refuse(f'it lacks {error}') from error
    if vocab_size != len(chars) or not chars:
        raise refuse(f'its vocab_size is {_shown(vocab_size)}, and it has {len(chars)} characters')
    return {'dtype': 'uint16', 'vocab_size': vocab_size,
            'tokenizer': {'kind': 'char', 'chars': chars}, 'tokens': {}}


class _PlainUnpickler(pickle._Unpickler):
    """Loads dict, list, str, int and the like, and nothing that could run code.

    It builds on the unpickler that is written in Python: the one in C allocates memory for as many
    objects as a file claims to have."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it wants to import {module!r}.{name!r}')


def _read_file(path):
    """The bytes of a file. OSError also for a pipe: opening one would wait for a writer."""
    if not os.path.isfile(path):
        raise OSError('it is not a file')
    with open(path, 'rb') as file:
        return file.read()


def _is_count(value):
    return type(value) is int and value >= 0  # to isinstance(), True would be an int


def _shown(value):
    """A value from a file as it stands in an error message: on one line, and short."""
    return repr(value)[:99]


# ---- opening and checking ----

def open_data_set(folder, block_size, may_be_missing=False):
    """Opens a data set for sequences of up to block_size tokens.

    may_be_missing: return None for both files, and warn, if there is no train.bin.

    Returns meta (see read_meta), and the TokenFiles of train.bin and val.bin. UserError if a file
    is missing or can't be used."""
    meta = read_meta(folder)
    if may_be_missing and not has_split(os.path.join(folder, 'train.bin')):
        warn(f'{folder} has no train.bin: the number of epochs is unknown, and unless something '
             "else gives a vocabulary, it is assumed to be GPT-2's")
        return meta, None, None
    token_files = []
    for split in SPLITS:
        path = os.path.join(folder, f'{split}.bin')
        token_file = TokenFile(path, meta['dtype'], meta['vocab_size'], block_size,
                               expected_tokens=meta['tokens'].get(split))
        if meta.get('loss_mask'):
            _check_mask(mask_path(folder, split), len(token_file))
        token_files.append(token_file)
    train, val = token_files
    return meta, train, val


def _check_mask(path, tokens):
    """UserError unless the loss mask at path has an entry for each of so many tokens."""
    entries = sum(os.path.getsize(file) for file in files_of(path))
    if entries != tokens:
        raise UserError(f'{path}, or its shards, should have {tokens} bytes, one for each token, '
                        f'but {entries} are there: prepare the data set again')


def rounded_vocab_size(meta):
    """The vocab_size of a new model for a data set, as read_meta() describes it.

    It is rounded up to a multiple of 64, which makes the output matrix faster: GPT-2's 50,257
    become 50,304. Only characters keep theirs, so that nanoGPT's runs and checkpoints stay as they
    are. No token has the ids that are added, so a model learns not to choose them."""
    vocab_size = meta['vocab_size'] or GPT2_VOCAB_SIZE
    if meta['tokenizer']['kind'] == 'char':
        return vocab_size
    return -(-vocab_size // 64) * 64


def check_fit(folder, meta, token_files, vocab_size, tokenizer=None):
    """Checks that a data set can be used with a model.

    vocab_size, tokenizer: the model's; tokenizer is the dict of the tokenizer that the model was
    trained with, or None if that is unknown or does not matter.

    UserError if the vocabulary is too large for the model or another one than the model's, or if
    the token files (a sample of each is read) hold ids outside of it."""
    data_vocab_size = meta['vocab_size']
    if data_vocab_size is not None and data_vocab_size > vocab_size:
        raise UserError(f'{folder} has {data_vocab_size} tokens in its vocabulary, but the model '
                        f'has {vocab_size}: use a data set that fits the model, or train a new '
                        'model')
    if tokenizer is not None and not same_vocabulary(tokenizer, meta['tokenizer']):
        raise UserError(f'{folder} has another vocabulary than the model was trained with: use the '
                        'data set that it was trained on, or prepare one with the same tokenizer')
    for token_file in token_files:
        token_file.check_ids(data_vocab_size or vocab_size)
