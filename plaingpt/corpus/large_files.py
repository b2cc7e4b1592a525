"""
Text files that are too large to be handled at once: they are read once for what concerns the whole
document, and again in pieces.
"""
import hashlib
import re

import numpy as np

from plaingpt.corpus.chunks import Place, SkippedFile, TextPiece, reason_by_line
from plaingpt.corpus.compressed_files import FAILURES, is_damage, opened
from plaingpt.corpus.documents import Extent
from plaingpt.corpus.splitting import HASH_BYTES
from plaingpt.corpus.utf8 import BYTE_ORDER_MARK, NotUtf8, decoded_blocks

PIECE_BYTES = 2**22   # a text file with more is cut into pieces
SEARCH_BYTES = 2**18  # at the end of a piece, in which a good place to cut is looked for
LETTER = r'[^\W\d_]'  # of any script
# Where byte-pair encodings end a token, the best place first: behind what one of these matches.
GOOD_ENDS = (
    re.compile(r'(?<=\S)\n(?=[^\W_])'),            # a line break before a letter or a digit
    re.compile(rf'(?<={LETTER})(?= {LETTER})'),    # a space between letters begins a token
    # GPT-2 makes two tokens of it, cl100k_base one. An encoding with GPT-2's words may have learned
    # a token for \r\n, and then this place gives one token less than the whole text.
    re.compile(r'(?<=\S)\r\n(?=[^\W_])'),
)


def pieces(path, reading, file, before, size):
    """Yields the chunks of a large text file, TextPieces or one SkippedFile.

    file: its number in the corpus. before: the bytes of the files before it. size: its own."""
    key, all_chars, reason = _read_through(path, reading)
    if reason is not None:
        yield SkippedFile(path, reason, Place(file + 1, 0), before + size)
        return
    first_byte = 0
    first_char = 0
    with opened(path) as (raw, stream):
        for number, (content, is_last) in enumerate(_cut(stream)):
            extent = Extent(key, first_char, all_chars, is_last)
            following = Place(file + 1, 0) if is_last else Place(file, number + 1)
            done = before + min(raw.tell(), size)
            yield TextPiece(path, content, first_byte, extent, following, done)
            if number == 0 and content.startswith(BYTE_ORDER_MARK):
                first_char -= 1  # decoded() drops it
            first_byte += len(content)
            first_char += _count_chars(content)


def _read_through(path, reading):
    """Reads a text file once. Returns its hash, its characters, and why it is skipped or None.

    NotUtf8 or one of FAILURES if it is no text, unless the reading skips such files."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    chars = 0
    longest_line = 0
    line = 0  # length so far of the line that is being read
    try:
        with opened(path) as (_, stream):
            for block, text in decoded_blocks(stream, path, PIECE_BYTES):
                digest.update(block)
                chars += len(text)
                first, *others = text.split('\n')
                line += len(first)
                longest_line = max(longest_line, line)
                if others:
                    longest_line = max(longest_line, *map(len, others))
                    line = len(others[-1])
    except NotUtf8:
        if reading.skips_binaries:
            return 0, 0, 'not UTF-8'
        raise
    except FAILURES as error:
        if reading.skips_binaries and is_damage(error):
            return 0, 0, 'damaged'
        raise
    reason = reason_by_line(longest_line, reading.max_line) if reading.skips_binaries else None
    key = int.from_bytes(digest.digest(), 'little')
    return key, chars, reason or reading.reason_by_length(chars)


def _cut(stream):
    """Yields (content, whether it is the last) for the pieces of a stream.

    A piece ends in one of the GOOD_ENDS, if there is one, and then the pieces give the tokens of
    the whole."""
    rest = b''
    while True:
        content = rest + stream.read(PIECE_BYTES - len(rest))
        following = stream.read(1)
        if not following:
            yield content, True
            return
        content += following
        end = _good_end(content)
        yield content[:end], False
        rest = content[end:]


def _good_end(content):
    """Where to cut bytes in two, not within a character of UTF-8."""
    end = _begin_of_char(content, len(content) - 1)
    begin = _begin_of_char(content, max(0, end - SEARCH_BYTES))
    # Another program may be writing the file. Then a worker finds what is no UTF-8.
    text = content[begin:end].decode('utf-8', 'surrogateescape')
    for pattern in GOOD_ENDS:
        last = None
        for match in pattern.finditer(text):
            last = match
        if last is not None and last.end() > 0:
            return begin + len(text[:last.end()].encode('utf-8', 'surrogateescape'))
    return end


def _begin_of_char(content, at):
    """Where the character of UTF-8 begins that has the byte at this place."""
    while at > 0 and content[at] & 0xC0 == 0x80:  # a byte that continues a character
        at -= 1
    return at


def _count_chars(content):
    """The number of characters in UTF-8 bytes, by their first bytes."""
    values = np.frombuffer(content, np.uint8)
    return int(np.count_nonzero((values & 0xC0) != 0x80))
