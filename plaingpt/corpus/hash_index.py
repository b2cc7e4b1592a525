"""
An index of documents by hashes, in a few bytes a document.
"""
import numpy as np


MIXER = 0x9E3779B97F4A7C15  # odd, with its bits set as if at random


def short_key(hashes):
    """A hash of 32 bits of uint64, still as uint64.

    All bits count in the upper half of the product, so bands that differ in a few bytes, which
    near duplicates have, get different keys."""
    return hashes * np.uint64(MIXER) >> np.uint64(32)


class GrowingArray:
    """A uint64 array to which rows are appended."""

    def __init__(self, row_shape):
        self.rows = 0
        self.space = np.empty((1024, *row_shape), np.uint64)

    @property
    def array(self):
        return self.space[:self.rows]

    def append(self, rows):
        needed = self.rows + len(rows)
        if needed > len(self.space):
            # Half as much again, so that each row is copied about twice, however many there are.
            space = np.empty((max(needed, len(self.space) * 3 // 2), *self.space.shape[1:]),
                             np.uint64)
            space[:self.rows] = self.array
            self.space = space
        self.space[self.rows:needed] = rows
        self.rows = needed


class HashIndex:
    """Finds the documents that have a key of 32 bits.

    An entry is a uint64, the key above the document's number, in one of several sorted arrays. Each
    array is at least twice as long as the next, so there are few, and adding is cheap."""

    def __init__(self):
        self.arrays = []

    def add(self, keys, numbers):
        """Adds documents with their keys, uint64 (n,)."""
        entries = np.sort(keys << np.uint64(32) | numbers.astype(np.uint64))
        if len(entries) == 0:
            return
        while self.arrays and len(self.arrays[-1]) < 2 * len(entries):
            # Stable sorting recognises the two sorted halves, and only merges them.
            entries = np.concatenate([self.arrays.pop(), entries])
            entries.sort(kind='stable')
        self.arrays.append(entries)

    def find(self, keys):
        """All documents with one of these keys, uint64 (n,).

        Returns two int64 arrays: rows of keys, and numbers of documents."""
        rows = [np.empty(0, np.int64)]
        numbers = [np.empty(0, np.int64)]
        for entries in self.arrays:
            first = np.searchsorted(entries, keys << np.uint64(32))
            # Most keys are new: their place holds another key, or is the end of the array.
            at_place = entries[np.minimum(first, len(entries) - 1)]
            row = np.flatnonzero(at_place >> np.uint64(32) == keys)
            place = first[row]
            while len(row) > 0:
                entry = entries[place]
                is_match = entry >> np.uint64(32) == keys[row]
                row = row[is_match]
                rows.append(row)
                numbers.append((entry[is_match] & np.uint64(2**32 - 1)).astype(np.int64))
                place = place[is_match] + 1
                is_inside = place < len(entries)
                row, place = row[is_inside], place[is_inside]
        return np.concatenate(rows), np.concatenate(numbers)
