"""
Opening files that may be compressed, and saying which file is damaged.
"""
import contextlib
import gzip
import io
import os
import tempfile
import zlib

from plaingpt.corpus.documents import shown
from plaingpt.corpus.file_search import COMPRESSIONS
from plaingpt.system.messages import UserError

BUFFER_BYTES = 2**20
FAILURES = (OSError, EOFError, zlib.error)  # what an opened() file raises


@contextlib.contextmanager
def opened(path):
    """Opens a file and unpacks it on the fly. Gives (raw, stream).

    raw: the file on disk, whose tell() says how much of it has been read. stream: its content."""
    method = _compression_of(path)
    with open(path, 'rb', buffering=0) as raw:
        if method is None:
            yield raw, io.BufferedReader(raw, BUFFER_BYTES)
        elif method == 'gzip':
            yield raw, gzip.GzipFile(fileobj=raw, mode='rb')
        else:
            # It notices a file that was cut short, which the package zstandard does not.
            pyarrow = import_pyarrow(path)
            unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode='r'), method)
            yield raw, io.BufferedReader(unpacked, BUFFER_BYTES)


@contextlib.contextmanager
def seekable(path, raw, stream):
    """Gives an opened() file in which one can seek: raw, or a copy of what had to be unpacked.

    UserError if there is no room for the copy."""
    if _compression_of(path) is None:
        yield raw
        return
    # Without a buffer, nothing remains to be written when a full disk has ended this.
    with tempfile.TemporaryFile(buffering=0) as copy:
        while block := stream.read(BUFFER_BYTES):
            _write(block, copy, path)
        copy.seek(0)
        yield copy


def _write(block, copy, path):
    """Writes a block of an unpacked file. UserError if there is no room for it."""
    folder = tempfile.gettempdir()
    with _explaining(f'{shown(path)} cannot be unpacked to the temporary folder {folder}',
                     'free some space there, or set TMPDIR to another folder'):
        rest = memoryview(block)
        while rest:
            rest = rest[copy.write(rest):]


def _compression_of(path):
    return COMPRESSIONS.get(os.path.splitext(path.lower())[1])


def import_pyarrow(path):
    """The package pyarrow. UserError, which says that path needs it, if it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f'reading {shown(path)} needs the package pyarrow: '
                        'pip install pyarrow') from None
    return pyarrow


def explaining_damage(path):
    """A block that turns what a damaged or unreadable file raises into a UserError."""
    return _explaining(f'{shown(path)} cannot be read', 'check the file, or leave it out')


def is_damage(error):
    """Whether one of the FAILURES comes from the content of a compressed file.

    If it comes from the system, as for a disk that fails, it has a number."""
    return getattr(error, 'errno', None) is None


@contextlib.contextmanager
def _explaining(problem, advice):
    """Turns FAILURES into a UserError with what could not be done, the reason, and what to do."""
    try:
        yield
    except FAILURES as error:
        reason = ' '.join((getattr(error, 'strerror', None) or str(error)).split())[:300]
        raise UserError(f'{problem} ({reason}): {advice}') from error
