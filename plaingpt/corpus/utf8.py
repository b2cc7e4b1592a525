"""
The bytes of files as text, and the sentences for those that are not UTF-8.
"""
import codecs

from plaingpt.corpus.documents import shown
from plaingpt.system.messages import UserError

BYTE_ORDER_MARK = b'\xef\xbb\xbf'
HEAD_BYTES = 8192  # a file with a zero byte in so many is binary

UTF16_MARKS = (b'\xff\xfe', b'\xfe\xff')
UNPACK = 'unpack it first, or leave it out'
CONVERT = 'convert it to text first, or leave it out'
# How files of other kinds begin, what they are, and what to do with them.
KINDS_BY_HEAD = {
    b'%PDF': ('a PDF document', CONVERT),
    b'PK\x03\x04': ('a zip archive, as .docx and .xlsx are', CONVERT),
    b'\xd0\xcf\x11\xe0': ('an old Office document', CONVERT),
    b'\x89PNG': ('a PNG image', CONVERT),
    b'\xff\xd8\xff': ('a JPEG image', CONVERT),
    b'\x1f\x8b': ('compressed with gzip', 'give it a name that ends in .gz, or leave it out'),
    b'\x28\xb5\x2f\xfd': ('compressed with zstd', 'give it a name that ends in .zst, or leave it '
                          'out'),
    b'\xfd7zXZ': ('compressed with xz', UNPACK),
    b'BZh': ('compressed with bzip2', UNPACK),
    b'7z\xbc\xaf': ('a 7z archive', UNPACK),
    b'PAR1': ('a Parquet file', 'give it a name that ends in .parquet, or leave it out'),
}


class NotUtf8(UserError):
    """A file is not UTF-8."""


def is_binary(head):
    """Whether the first HEAD_BYTES of a file are not those of a text in UTF-8."""
    return b'\0' in head[:HEAD_BYTES]


def decoded(content, path, first_byte=0):
    """Decodes UTF-8 bytes of a file, from first_byte on. A byte order mark is dropped.

    They end within no character, unless the file does. NotUtf8 names the first byte that is not
    valid."""
    head = content[:HEAD_BYTES] if first_byte == 0 else b''
    if head.startswith(BYTE_ORDER_MARK):
        content = content[len(BYTE_ORDER_MARK):]
        first_byte = len(BYTE_ORDER_MARK)
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise _explained(error, path, first_byte, head) from None


def decoded_blocks(stream, path, size):
    """Reads a file in UTF-8 to its end. Yields (bytes, text) for blocks of so many bytes.

    A byte order mark is in neither. NotUtf8 names the first byte that is not valid."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    position = 0  # in the file, of the bytes that come next
    head = b''
    while True:
        block = stream.read(size)
        if position == 0:
            head = block[:HEAD_BYTES]
            if head.startswith(BYTE_ORDER_MARK):
                block = block[len(BYTE_ORDER_MARK):]
                position = len(BYTE_ORDER_MARK)
        is_end = not block  # also of a file that is only a byte order mark
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=is_end)
        except UnicodeDecodeError as error:
            raise _explained(error, path, position - pending, head) from None
        if is_end:
            return
        yield block, text
        position += len(block)


def _explained(error, path, position, head):
    """The NotUtf8 for an error in bytes that begin at this position. head: of the file."""
    at = position + error.start
    value = error.object[error.start]
    name = shown(path)
    if head.startswith(UTF16_MARKS):
        return NotUtf8(f'{name} is not valid UTF-8 at byte {at:,} (0x{value:02X}): it seems to be '
                       'UTF-16; convert it with iconv -f utf-16 -t utf-8')
    for magic, (kind, advice) in KINDS_BY_HEAD.items():
        if head.startswith(magic):
            return NotUtf8(f'{name} is {kind}, not text: {advice}')
    if is_binary(head):
        return NotUtf8(f'{name} is a binary file, not text: {CONVERT}')
    if error.reason == 'unexpected end of data':
        return NotUtf8(f'{name} ends within a character, at byte {at:,}: it was cut short, or is '
                       'not UTF-8')
    return NotUtf8(f'{name} is not valid UTF-8 at byte {at:,} (0x{value:02X}): convert the file, '
                   'for instance with iconv -f latin1 -t utf-8, or leave it out')
