"""
Shows how a tokenizer cuts a text: 'The| quick| brown', with a bar between two tokens.
"""
import codecs
import unicodedata

from plaingpt.text.fast_encoding import utf8_of
from plaingpt.text.token_bytes import token_bytes

SEPARATOR = '|'


def visible_tokens(tokenizer, text):
    """What the tokens of a text stand for: a list of printable str, one for each token.

    Bytes that are no whole character are shown as <E6>, a line break as \\n. UserError if the
    vocabulary can't express the text."""
    ids = tokenizer.encode_corpus([text])[0]
    pieces = _bytes_of_tokens(tokenizer, ids, text)
    if pieces is None:
        # These tokens don't tell their bytes: what each one decodes to has to do.
        return [_printable(tokenizer.decode([token])) for token in ids.tolist()]
    return [_printable(piece.decode('utf-8', 'show_bytes')) for piece in pieces]


def _bytes_of_tokens(tokenizer, ids, text):
    """The bytes that each id stands for, a list, or None if they don't add up to the text."""
    lengths = token_bytes(tokenizer)
    content = utf8_of(text)
    if lengths is None or lengths[ids].sum() != len(content):
        return None
    pieces = []
    begin = 0
    for length in lengths[ids].tolist():
        pieces.append(content[begin:begin + length])
        begin += length
    return pieces


def _show_bytes(error):
    """Replaces the bytes that are not valid UTF-8, for bytes.decode()."""
    wrong = error.object[error.start:error.end]
    return ''.join(f'<{byte:02X}>' for byte in wrong), error.end


codecs.register_error('show_bytes', _show_bytes)


def _printable(text):
    """The text with characters that can't be seen as escapes."""
    shown = []
    for char in text:
        if char.isprintable():  # a space is
            shown.append(char)
        else:
            shown.append(char.encode('unicode_escape').decode('ascii'))
    return ''.join(shown)


def joined_lines(pieces, width):
    """The pieces with bars between them, as lines of at most `width` columns.

    A line ends between two pieces, unless one piece is wider than a line."""
    lines = []
    line = ''
    for number, piece in enumerate(pieces):
        if number < len(pieces) - 1:
            piece += SEPARATOR
        if line and columns_of(line + piece) > width:
            lines.append(line)
            line = ''
        line += piece
    lines.append(line)
    return lines


def columns_of(text):
    """How many columns a text takes on a terminal, where Chinese characters take two."""
    columns = 0
    for char in text:
        if unicodedata.combining(char):
            continue
        columns += 2 if unicodedata.east_asian_width(char) in 'WF' else 1
    return columns
