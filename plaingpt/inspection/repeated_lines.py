"""
Lines that occur in many documents: licences, menus, cookie notices, prompts.

A first reading counts hashes of lines, because the lines themselves would not fit into memory. A
second one reads until it has found the text of those that occur most.
"""
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from plaingpt.corpus.progress import Progress
from plaingpt.corpus.splitting import hash_of, hashes_of

MIN_CHARS = 20       # shorter lines repeat by nature
MAX_LINES = 2**21    # hashes that are kept; 16 bytes each, twice that while they are merged
MERGE_AT = 2**20     # hashes that wait to be merged


def stripped_lines(text):
    """The different lines of a text that are long enough, without space around them: a set."""
    lines = {line.strip() for line in text.split('\n')}
    return {line for line in lines if len(line) >= MIN_CHARS}


def line_counts(texts):
    """Hashes of the lines of texts, uint64 (n,), and in how many texts each occurs, int64 (n,)."""
    counter = Counter()
    for text in texts:
        counter.update(stripped_lines(text))
    counts = np.fromiter(counter.values(), np.int64, len(counter))
    return hashes_of(counter), counts


class LineCounts:
    """In how many documents each line occurs, for the hashes of lines.

    Where there are more than MAX_LINES different lines, it forgets the rarest of those so far. Then
    a count may be too low, by up to max_missing documents."""

    def __init__(self):
        self.hashes = np.zeros(0, np.uint64)
        self.counts = np.zeros(0, np.int64)
        self.waiting = []
        self.num_waiting = 0
        self.max_missing = 0

    def add(self, hashes, counts):
        """Adds what line_counts() returned."""
        self.waiting.append((hashes, counts))
        self.num_waiting += len(hashes)
        if self.num_waiting >= MERGE_AT:
            self._merge()

    def _merge(self):
        hashes = np.concatenate([self.hashes, *[hashes for hashes, _ in self.waiting]])
        counts = np.concatenate([self.counts, *[counts for _, counts in self.waiting]])
        self.waiting = []
        self.num_waiting = 0
        if len(hashes) == 0:
            return
        order = np.argsort(hashes)
        hashes, counts = hashes[order], counts[order]
        is_first = np.concatenate([[True], hashes[1:] != hashes[:-1]])
        self.hashes = hashes[is_first]
        self.counts = np.add.reduceat(counts, np.flatnonzero(is_first))
        if len(self.hashes) > MAX_LINES:
            # The smallest count of which not even half as many lines as fit are above.
            limit = int(np.partition(self.counts, -MAX_LINES // 2)[-MAX_LINES // 2])
            is_frequent = self.counts > limit
            self.hashes, self.counts = self.hashes[is_frequent], self.counts[is_frequent]
            self.max_missing += limit

    def most_frequent(self, number, at_least):
        """The lines in at_least documents or more, up to a number: {hash: documents}."""
        self._merge()
        order = np.lexsort([self.hashes, -self.counts])[:number]
        frequent = {}
        for line_hash, count in zip(self.hashes[order].tolist(), self.counts[order].tolist(),
                                    strict=True):
            if count >= at_least:
                frequent[line_hash] = count
        return frequent


# ---- the second reading ----

class Search(NamedTuple):
    """A chunk, and the hashes of the lines that are sought in it."""
    chunk: Any
    hashes: frozenset


def found_lines(work, search):
    """The text and an origin of each line that a Search finds: {hash: (line, origin)}."""
    documents, _ = search.chunk.documents(work.reading)
    found = {}
    for document in documents:
        for line in stripped_lines(document.text):
            line_hash = hash_of(line)
            if line_hash in search.hashes:
                found.setdefault(line_hash, (line, document.origin))
    return found


def find_lines(pool, source, hashes):
    """Reads a source until it has seen lines with all these hashes: {hash: (line, origin)}."""
    found = {}
    if not hashes:
        return found
    searches = (Search(chunk, frozenset(hashes)) for chunk in source.chunks())
    with Progress('finding repeated lines', source.size) as progress:
        for search, lines in pool.map(found_lines, searches):
            progress.show(search.chunk.bytes_read)
            for line_hash, line_and_origin in lines.items():
                found.setdefault(line_hash, line_and_origin)
            if len(found) == len(hashes):
                break
    return found
