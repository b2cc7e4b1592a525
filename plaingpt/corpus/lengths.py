"""
Histogram of the lengths of documents, which keeps its size however many documents there are.
"""
import math

import numpy as np

# Lengths below EXACT have a bin each. Above, each doubling has PARTS bins, so that a bin is at most
# 1/16 as wide as the lengths in it, and a quantile that is read from it at most 3% off.
EXACT = 32
PARTS = 16
QUARTERS = (0, 3, 7, 11)  # bins of a doubling at which bars of about equal ratio begin
EXACT_BITS = EXACT.bit_length() - 1
BINS = EXACT + PARTS * (53 - EXACT_BITS)  # up to 2**53


def _edges():
    """The smallest length of each bin, and the end of the last: int64 (BINS + 1,)."""
    edges = list(range(EXACT))
    for bits in range(EXACT_BITS, 53):
        for part in range(PARTS):
            edges.append(2**bits + part * 2**bits // PARTS)
    edges.append(2**53)
    return np.array(edges)


EDGES = _edges()


class Lengths:
    """A histogram of lengths, with their number, sum, smallest and largest."""

    def __init__(self):
        self.counts = np.zeros(BINS, np.int64)
        self.documents = 0
        self.sum = 0
        self.smallest = 0  # of none: 0
        self.largest = 0

    def add(self, lengths):
        """Adds the lengths of some documents, a list or an array of int."""
        lengths = np.asarray(lengths, np.int64)
        if len(lengths) == 0:
            return
        bins = np.searchsorted(EDGES, lengths, side='right') - 1
        self.counts += np.bincount(bins, minlength=BINS)
        self._extend(len(lengths), int(lengths.sum()), int(lengths.min()), int(lengths.max()))

    def merge(self, other):
        """Adds all that another Lengths holds."""
        if other.documents > 0:
            self.counts += other.counts
            self._extend(other.documents, other.sum, other.smallest, other.largest)

    def _extend(self, documents, total, smallest, largest):
        self.smallest = smallest if self.documents == 0 else min(self.smallest, smallest)
        self.largest = max(self.largest, largest)
        self.documents += documents
        self.sum += total

    @property
    def mean(self):
        """The mean length, 0 if there is none."""
        return self.sum / self.documents if self.documents else 0.0

    def quantile(self, share):
        """The length that this share of the documents does not exceed, at most 3% off; an int.

        It is the smallest such length of a document: of 10 and 1000, the median is 10."""
        if self.documents == 0:
            return 0
        rank = max(math.ceil(share * self.documents) - 1, 0)
        found = int(np.searchsorted(np.cumsum(self.counts), rank, side='right'))
        middle = int(EDGES[found] + EDGES[found + 1] - 1) // 2
        return min(max(middle, self.smallest), self.largest)

    def bars(self):
        """The histogram, coarser: a list of (from, to before, documents), without empty ends."""
        starts = list(range(0, EXACT, 4))
        for doubling in range(EXACT, BINS, PARTS):
            starts += [doubling + quarter for quarter in QUARTERS]
        documents = np.add.reduceat(self.counts, starts)
        used = np.flatnonzero(documents)
        if len(used) == 0:
            return []
        ends = [*starts[1:], BINS]
        bars = []
        for bar in range(used[0], used[-1] + 1):
            first, last = int(EDGES[starts[bar]]), int(EDGES[ends[bar]])
            bars.append((first, last, int(documents[bar])))
        return bars

    def to_json(self):
        """A dict for JSON, from which from_json() makes an equal Lengths."""
        used = np.flatnonzero(self.counts)
        counts = [[int(number), int(self.counts[number])] for number in used]
        return {'documents': self.documents, 'sum': self.sum, 'smallest': self.smallest,
                'largest': self.largest, 'bins': counts}

    @classmethod
    def from_json(cls, saved):
        """The Lengths that to_json() described."""
        lengths = cls()
        for number, documents in saved['bins']:
            lengths.counts[number] = documents
        lengths.documents = saved['documents']
        lengths.sum = saved['sum']
        lengths.smallest = saved['smallest']
        lengths.largest = saved['largest']
        return lengths
