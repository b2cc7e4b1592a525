"""
The Source of a corpus: reads its files in order and in bounded memory, and yields chunks, of which
workers make documents.
"""
import itertools
import os

from plaingpt.corpus import large_files, record_files
from plaingpt.corpus.chunks import CHUNK_BYTES, START, Place, SkippedFile, TextFiles
from plaingpt.corpus.compressed_files import FAILURES, explaining_damage, is_damage, opened
from plaingpt.corpus.file_search import TEXT
from plaingpt.corpus.utf8 import is_binary

FILES_AT_ONCE = 1000  # small files in a chunk
RECORD_READERS = {'JSON Lines': record_files.json_lines, 'JSON': record_files.json_records,
                  'CSV': record_files.csv_records, 'Parquet': record_files.table_rows}


class Source:
    """The documents of files.

    found: the files, a Found. reading: how they become documents, a Reading.
    UserError if a file can't be read."""

    def __init__(self, found, reading):
        self.paths = found.paths
        self.kind = found.kind
        self.reading = reading
        self.skipped = found.skipped  # files that were not read
        self.sizes = []     # in bytes, as on disk
        self.identity = []  # what tells that the files are the same as in an earlier run
        for path in self.paths:
            with explaining_damage(path):
                status = os.stat(path)
            self.sizes.append(status.st_size)
            self.identity.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
        self.size = sum(self.sizes)
        self.splits_itself = False  # whether each Document says which split it belongs to

    def chunks(self, first=START):
        """Yields the chunks from a Place on. UserError if a file can't be read or is damaged."""
        if self.kind == TEXT:
            return self._text_chunks(first)
        return self._record_chunks(first)

    def _record_chunks(self, first):
        read = RECORD_READERS[self.kind]
        before = sum(self.sizes[:first.file])
        for file in range(first.file, len(self.paths)):
            path = self.paths[file]
            skip = first.chunk if file == first.file else 0
            with explaining_damage(path), opened(path) as (raw, stream):
                chunks = enumerate(read(path, raw, stream, self.reading), start=1)
                for number, (make_chunk, done) in itertools.islice(chunks, skip, None):
                    # A file may have grown since its size was taken.
                    bytes_read = before + min(done, self.sizes[file])
                    yield make_chunk(next_place=Place(file, number), bytes_read=bytes_read)
            before += self.sizes[file]

    def _text_chunks(self, first):
        """Small files in groups, large ones in pieces."""
        group = []
        group_bytes = 0
        before = sum(self.sizes[:first.file])
        for file in range(first.file, len(self.paths)):
            path = self.paths[file]
            content, reason = self._begin_of(path)
            is_small = reason is None and len(content) <= large_files.PIECE_BYTES
            if is_small:
                group.append((path, content))
                group_bytes += len(content)
            elif group:
                yield TextFiles(group, Place(file, 0), before)
                group = []
                group_bytes = 0

            end = before + self.sizes[file]
            if reason is not None:
                yield SkippedFile(path, reason, Place(file + 1, 0), end)
            elif not is_small:
                skip = first.chunk if file == first.file else 0
                with explaining_damage(path):
                    pieces = large_files.pieces(path, self.reading, file, before, self.sizes[file])
                    yield from itertools.islice(pieces, skip, None)
            elif group_bytes >= CHUNK_BYTES or len(group) == FILES_AT_ONCE:
                yield TextFiles(group, Place(file + 1, 0), end)
                group = []
                group_bytes = 0
            before = end
        if group:
            yield TextFiles(group, Place(len(self.paths), 0), before)

    def _begin_of(self, path):
        """The first bytes of a text file, all if it is small, and why it is skipped or None."""
        with explaining_damage(path):
            try:
                with opened(path) as (_, stream):
                    content = stream.read(large_files.PIECE_BYTES + 1)
            except FAILURES as error:
                if self.reading.skips_binaries and is_damage(error):
                    return b'', 'damaged'
                raise
        # A worker finds the small ones.
        is_large = len(content) > large_files.PIECE_BYTES
        if self.reading.skips_binaries and is_large and is_binary(content):
            return content, 'binary'
        return content, None
