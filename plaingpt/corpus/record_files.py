"""
Files of records: JSON Lines, JSON, CSV and Parquet, read piece by piece.

Each function takes (path, raw, stream, reading), with the file as compressed_files.opened() gives
it. It yields (constructor of a chunk, which lacks next_place and bytes_read; bytes of the file
read so far).
"""
import csv
import functools
import io
import os

from plaingpt.corpus.chunks import CHUNK_BYTES, JsonLines, JsonTexts, Records, TableRows
from plaingpt.corpus.compressed_files import import_pyarrow, opened, seekable
from plaingpt.corpus.documents import shown
from plaingpt.corpus.file_search import suffix_of
from plaingpt.corpus.json_stream import records_of
from plaingpt.corpus.utf8 import decoded_blocks
from plaingpt.system.messages import UserError

MAX_LINE_BYTES = 2**28   # of a line of JSON: a file without line breaks must not fill the memory
MAX_FIELD_CHARS = 2**28  # of CSV: nor must a quote that is never closed
ROWS_AT_ONCE = 1000      # of a Parquet file, at most
ROWS_IN_A_CHUNK = 10_000


def json_lines(path, raw, stream, reading):
    """The lines of a file with one JSON object in each."""
    first_byte = 0
    first_line = 1
    rest = []  # blocks of an unfinished line
    while block := stream.read(CHUNK_BYTES):
        end = block.rfind(b'\n') + 1
        if end == 0:
            rest.append(block)
            if len(rest) * CHUNK_BYTES > MAX_LINE_BYTES:
                raise UserError(f'record {first_line} of {shown(path)} is longer than '
                                f'{MAX_LINE_BYTES / 1e6:.0f} MB: is this really JSON Lines, with '
                                'one object in each line?')
            continue
        content = b''.join([*rest, block[:end]])
        yield functools.partial(JsonLines, path, content, first_byte, first_line), raw.tell()
        first_byte += len(content)
        first_line += content.count(b'\n')
        rest = [block[end:]]
    content = b''.join(rest)
    if content:
        yield functools.partial(JsonLines, path, content, first_byte, first_line), raw.tell()


def _grouped(sized_records):
    """Yields (number of the first record, list of records), each with about CHUNK_BYTES.

    sized_records: (record, characters) one after another, which are counted from 1."""
    first = 1
    group = []
    group_chars = 0
    for record, chars in sized_records:
        group.append(record)
        group_chars += chars
        if group_chars >= CHUNK_BYTES:
            yield first, group
            first += len(group)
            group = []
            group_chars = 0
    if group:
        yield first, group


# ---- JSON ----

def json_records(path, raw, stream, reading):
    """The objects of a JSON array, or objects that stand one after another."""
    for first, group in _grouped(_json_texts(path, stream, reading)):
        yield functools.partial(JsonTexts, path, group, first), raw.tell()


def _json_texts(path, stream, reading):
    """Yields the text of each record of a JSON file, and its length."""
    blocks = (text for _, text in decoded_blocks(stream, path, CHUNK_BYTES))
    for number, (text, record) in enumerate(records_of(blocks, shown(path))):
        if number == 0:
            _check_is_record(path, record, reading)
        yield text, len(text)


def _check_is_record(path, value, reading):
    """UserError if the first value of a file is no record, but an object that holds the records."""
    if not isinstance(value, dict) or all(name in value for name in reading.fields):
        return
    for name, inner in value.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            raise UserError(f'{shown(path)} is an object whose field {name!r} holds the records: '
                            'write that list alone as the file, or one object a line in a .jsonl '
                            'file')


# ---- CSV ----

def csv_records(path, raw, stream, reading):
    """The rows of a CSV file, whose first line names the fields."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    # Fields between tabs may be quoted, too. Spreadsheets and pandas write and read them so.
    delimiter = '\t' if suffix_of(path) == '.tsv' else ','
    text = io.TextIOWrapper(stream, encoding='utf-8-sig', newline='')
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        for first, group in _grouped(_named(path, rows, reading)):
            yield functools.partial(Records, path, group, first), raw.tell()
    except UnicodeDecodeError:
        _find_invalid_byte(path)
        raise  # not reached
    except csv.Error as error:
        if 'field larger' in str(error):
            raise UserError(f'{shown(path)} has a field of more than {MAX_FIELD_CHARS:,} '
                            f'characters, at line {rows.line_num}: close the double quote before '
                            'it, or shorten it') from None
        raise UserError(f'{shown(path)} is not valid CSV at line {rows.line_num} ({error}): fields '
                        'with commas or line breaks must stand in double quotes') from None


def _named(path, rows, reading):
    """Yields the rows of a csv.reader as dicts, with the names of its first row, and their size."""
    names = next(rows, [])
    for name in reading.fields:
        if names.count(name) > 1:
            raise UserError(f'{shown(path)} has {names.count(name)} fields {name!r}: give them '
                            'different names in the first line')
    number = 0
    for row in rows:
        if not row:
            continue  # a blank line
        number += 1
        if len(row) != len(names):
            raise UserError(f'record {number} of {shown(path)} has {len(row)} fields, and the '
                            f'first line names {len(names)}: correct line {rows.line_num}')
        yield dict(zip(names, row, strict=True)), sum(map(len, row))


def _find_invalid_byte(path):
    """UserError if a file is not valid UTF-8, with the first byte that is not."""
    with opened(path) as (_, stream):
        for _ in decoded_blocks(stream, path, CHUNK_BYTES):
            pass


# ---- Parquet ----

def table_rows(path, raw, stream, reading):
    """The rows of a Parquet file, with the fields that are needed and no others."""
    pyarrow = import_pyarrow(path)
    from pyarrow import parquet
    with seekable(path, raw, stream) as file:
        # The file may be a copy, but progress is counted in bytes of the one on disk.
        size = os.fstat(raw.fileno()).st_size
        try:
            table = parquet.ParquetFile(file, buffer_size=CHUNK_BYTES)
            reading.check_fields(table.schema_arrow.names, shown(path))
            rows = _rows_at_once(table.metadata, reading.fields)
            batches = table.iter_batches(rows, columns=reading.fields, use_threads=False)
            done = 0
            for group in _groups(batches):
                content = _serialized(group)
                make_chunk = functools.partial(TableRows, path, content, done + 1)
                done += sum(batch.num_rows for batch in group)
                yield make_chunk, size * done // table.metadata.num_rows
        except pyarrow.ArrowException as error:
            reason = ' '.join(str(error).split())[:300]
            raise UserError(f'{shown(path)} is not a readable Parquet file ({reason}): check the '
                            'file, or leave it out') from None


def _rows_at_once(metadata, fields):
    """How many rows of a Parquet file to read at once, for about CHUNK_BYTES in these fields.

    Its metadata may tell far too little: a text that occurs often may be stored once."""
    size = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            path = column.path_in_schema  # a field with parts has a column for each of them
            if any(path == name or path.startswith(f'{name}.') for name in fields):
                size += column.total_uncompressed_size
    return max(1, min(ROWS_AT_ONCE, CHUNK_BYTES * metadata.num_rows // (size + 1)))


def _groups(batches):
    """Cuts record batches, and yields lists of them that have about CHUNK_BYTES."""
    group = []
    group_bytes = 0
    group_rows = 0
    for batch in batches:
        batch = _without_dictionaries(batch)
        rows = 1 + CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)
        for first in range(0, batch.num_rows, rows):
            part = batch.slice(first, rows)
            group.append(part)
            group_bytes += part.nbytes
            group_rows += part.num_rows
            if group_bytes >= CHUNK_BYTES or group_rows >= ROWS_IN_A_CHUNK:
                yield group
                group = []
                group_bytes = 0
                group_rows = 0
    if group:
        yield group


def _without_dictionaries(batch):
    """A record batch whose columns hold each value, where they held numbers of values."""
    from pyarrow import RecordBatch, types
    columns = []
    for column in batch.columns:
        columns.append(column.dictionary_decode() if types.is_dictionary(column.type) else column)
    return RecordBatch.from_arrays(columns, names=batch.schema.names)


def _serialized(batches):
    """Record batches in Arrow's own format, which pickling would send with the rows around them."""
    import pyarrow
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return sink.getvalue().to_pybytes()
