"""
Chunks of a corpus: about a megabyte of documents, as a reader hands it to a worker.

Each chunk can be pickled, and has `bytes_read`, those of all files that are read when it is
done, `next_place`, where reading continues after it, and documents(reading), which a worker calls.
"""
import json
from typing import NamedTuple

from plaingpt.corpus.documents import Document, Extent, Skipped, shown
from plaingpt.corpus.json_stream import kind_of_value
from plaingpt.corpus.utf8 import decoded, is_binary
from plaingpt.system.messages import UserError

# It changes whenever chunks are cut otherwise. An interrupted preparation of an older program then
# starts anew.
FORMAT = 1
CHUNK_BYTES = 2**20  # of text that a worker takes at a time


class Place(NamedTuple):
    """Where a chunk begins: in which file, and after how many chunks of that file."""
    file: int
    chunk: int


START = Place(0, 0)


class TextFiles(NamedTuple):
    """Whole files, each of which is a document."""
    files: list   # (path, bytes)
    next_place: Place
    bytes_read: int

    def documents(self, reading):
        """Returns a list of Documents, and what was Skipped.

        UserError if one is not UTF-8, unless the reading skips such files."""
        documents = []
        skipped = Skipped()
        for path, content in self.files:
            reason = None
            if reading.skips_binaries:
                reason = reason_against_text(content, reading.max_line)
            if reason is None:
                document = Document(decoded(content, path), shown(path))
                reason = reading.reason_to_skip(document)
            if reason is None:
                documents.append(document)
            else:
                skipped.add(reason, shown(path))
        return documents, skipped


class TextPiece(NamedTuple):
    """A piece of a large file, which is one document; it ends where a tokenizer would cut, too."""
    path: str
    content: bytes
    first_byte: int
    extent: Extent
    next_place: Place
    bytes_read: int

    def documents(self, reading):
        text = decoded(self.content, self.path, self.first_byte)
        return [Document(text, shown(self.path), extent=self.extent)], Skipped()


class SkippedFile(NamedTuple):
    """A file that is left out, because it is damaged, or large and not as text should be."""
    path: str
    reason: str
    next_place: Place
    bytes_read: int

    def documents(self, reading):
        skipped = Skipped()
        skipped.add(self.reason, shown(self.path))
        return [], skipped


class JsonLines(NamedTuple):
    """Complete lines of a file, each of which is a record or blank."""
    path: str
    content: bytes
    first_byte: int
    first_line: int   # its number, counted from 1
    next_place: Place
    bytes_read: int

    def documents(self, reading):
        """As TextFiles. UserError if a line is no JSON object, or lacks a field."""
        return _documents_of(self._records(), self.path, reading)

    def _records(self):
        text = decoded(self.content, self.path, self.first_byte)
        # splitlines() would also split at characters that JSON allows within a string.
        for number, line in enumerate(text.split('\n'), start=self.first_line):
            if line.strip():
                yield number, _parsed(line, _origin(number, self.path))


class JsonTexts(NamedTuple):
    """Records of a JSON file, each as the text that stands there.

    The reader has parsed them to find their ends, but text is faster to send to a worker."""
    path: str
    texts: list
    first_record: int  # its number, counted from 1
    next_place: Place
    bytes_read: int

    def documents(self, reading):
        """As Records."""
        return _documents_of(self._records(), self.path, reading)

    def _records(self):
        for number, text in enumerate(self.texts, start=self.first_record):
            yield number, _parsed(text, _origin(number, self.path))


class Records(NamedTuple):
    """Records of a file, which the reader has parsed already."""
    path: str
    records: list
    first_record: int  # its number, counted from 1
    next_place: Place
    bytes_read: int

    def documents(self, reading):
        """As TextFiles. UserError if a record is no object, or lacks a field."""
        numbered = enumerate(self.records, start=self.first_record)
        return _documents_of(numbered, self.path, reading)


class TableRows(NamedTuple):
    """Rows of a Parquet file."""
    path: str
    content: bytes     # record batches as a stream in Arrow's own format
    first_record: int
    next_place: Place
    bytes_read: int

    def documents(self, reading):
        """As Records. UserError if a value can't be read, such as a text that is not UTF-8."""
        import pyarrow
        records = []
        with pyarrow.ipc.open_stream(self.content) as batches:
            for batch in batches:
                try:
                    records += batch.to_pylist()
                except ValueError:
                    self._find_damage(batch, self.first_record + len(records))
                    raise  # not reached
        numbered = enumerate(records, start=self.first_record)
        return _documents_of(numbered, self.path, reading)

    def _find_damage(self, batch, first_record):
        for row in range(batch.num_rows):
            origin = _origin(first_record + row, self.path)
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f'{origin} holds text that is not valid UTF-8 ({error.reason}): '
                                'write the column anew, or leave the file out') from None
            except ValueError as error:
                raise UserError(f'{origin} holds a value that cannot be read ({error}): choose '
                                'other fields, or leave the file out') from None


def _origin(number, path):
    return f'record {number} of {shown(path)}'


def _parsed(text, origin):
    """The value of a text in JSON. UserError if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{origin} is not valid JSON ({error}): each line must hold one '
                        'object') from None


def _documents_of(numbered_records, path, reading):
    """The Documents of a file's records, which come as (number, record), and what was Skipped."""
    documents = []
    skipped = Skipped()
    for number, record in numbered_records:
        origin = _origin(number, path)
        if not isinstance(record, dict):
            raise UserError(f'{origin} is {kind_of_value(record)}, not an object with fields: '
                            'write each record as {"text": "…"}')
        document = reading.document(record, origin)
        reason = reading.reason_to_skip(document)
        if reason is None:
            documents.append(document)
        else:
            skipped.add(reason, origin)
    return documents, skipped


# ---- what is no text ----

def reason_against_text(content, max_line):
    """Why the bytes of a file are not used as text, or None if they are."""
    if is_binary(content):
        return 'binary'
    try:
        text = content.decode('utf-8')
    except UnicodeDecodeError:
        return 'not UTF-8'
    return reason_by_line(max(map(len, text.split('\n'))), max_line)


def reason_by_line(longest_line, max_line):
    """Why text with a line of so many characters is not used, or None if it is."""
    if max_line and longest_line > max_line:
        return f'a line over max_line={max_line:,} characters'
    return None
