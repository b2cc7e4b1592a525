"""
A document that is so large that it comes in pieces: what is in several of them counts once.
"""
import numpy as np

from plaingpt.corpus.duplicates import FirstOccurrences
from plaingpt.inspection.chunk_survey import LONG_LINE, HEAD_CHARS, Passage

MAX_LINES = 2**21  # different lines that are remembered, with 23 bytes each


class LargeDocument:
    """What has been counted of a large document, whose pieces come one after another."""

    def __init__(self, origin):
        self.lines = FirstOccurrences('exact')  # by their hashes
        self.odd = set()                        # names of kinds of characters
        self.open_line = Passage(0, origin, '')  # what the pieces so far have of an unended line
        self.longest_line = self.open_line

    @property
    def is_full(self):
        """Whether it has more lines than are remembered, so that the further ones don't count."""
        return self.lines.documents >= MAX_LINES

    def new_in(self, chunk):
        """The ChunkSurvey of the next piece, without what earlier pieces have been counted for."""
        hashes = self._new_lines(chunk.line_hashes)
        odd = {}
        for name, count in chunk.odd.items():
            is_first = name not in self.odd
            odd[name] = count._replace(documents=int(is_first))
            self.odd.add(name)
        return chunk._replace(line_hashes=hashes, line_counts=np.ones(len(hashes), np.int64),
                              odd=odd, long_lines=self._ended_lines(chunk))

    def _new_lines(self, hashes):
        if self.is_full:
            return hashes[:0]
        return hashes[self.lines.add(hashes.reshape(-1, 1))]

    def _ended_lines(self, chunk):
        """The LongLines of a piece, of which the last one has the longest line of the document."""
        lines = chunk.long_lines
        chars = lines.chars
        self.longest_line = max(self.longest_line, *lines.longest)
        self._lengthen(lines.first)
        if lines.last is not None:
            chars += self._end_line()
            self._lengthen(lines.last)
        longest = []
        if chunk.extent.is_last:
            chars += self._end_line()
            longest = [self.longest_line]
        return lines._replace(longest=longest, chars=chars)

    def _lengthen(self, more):
        """Adds a Passage to the line that is open."""
        line = self.open_line
        self.open_line = line._replace(rank=line.rank + more.rank,
                                       text=(line.text + more.text)[:HEAD_CHARS])

    def _end_line(self):
        """Ends the line that is open. Returns its characters if they are more than LONG_LINE."""
        line = self.open_line
        self.open_line = line._replace(rank=0, text='')
        self.longest_line = max(self.longest_line, line)
        return line.rank if line.rank > LONG_LINE else 0
