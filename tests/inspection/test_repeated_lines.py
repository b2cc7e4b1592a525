"""Tests of counting the lines that occur in many documents."""
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plaingpt.corpus.splitting import hash_of
from plaingpt.inspection import repeated_lines
from plaingpt.inspection.repeated_lines import LineCounts, line_counts, stripped_lines

LINES = [f'a line that is long enough, number {number}' for number in range(8)]

documents = st.lists(st.lists(st.sampled_from(LINES), max_size=6), max_size=30)


def test_lines_count_without_the_space_around_them_if_they_are_long_enough():
    text = 'short\n   twenty characters ok\ntwenty characters ok\t\n\nnineteen characters\n'
    assert stripped_lines(text) == {'twenty characters ok'}


@given(documents, st.integers(1, 7), st.integers(1, 4))
def test_counts_of_documents_do_not_depend_on_the_batches(all_lines, size, at_least):
    expected = Counter()
    for lines in all_lines:
        expected.update({hash_of(line) for line in lines})
    texts = ['\n'.join(lines) for lines in all_lines]
    counts = LineCounts()
    for first in range(0, len(texts), size):
        counts.add(*line_counts(texts[first:first + size]))
    frequent = {line: count for line, count in expected.items() if count >= at_least}
    assert counts.most_frequent(100, at_least) == frequent
    assert counts.max_missing == 0


def test_the_most_frequent_come_first():
    counts = LineCounts()
    counts.add(np.array([1, 2, 3, 2**64 - 1], np.uint64), np.array([5, 9, 1, 7]))
    assert list(counts.most_frequent(2, 1).items()) == [(2, 9), (2**64 - 1, 7)]


def test_rare_lines_are_forgotten_and_the_result_says_so(monkeypatch):
    monkeypatch.setattr(repeated_lines, 'MAX_LINES', 100)
    monkeypatch.setattr(repeated_lines, 'MERGE_AT', 50)
    counts = LineCounts()
    frequent = np.uint64(7)
    for batch in range(40):
        rare = np.arange(20, dtype=np.uint64) + np.uint64(1000 * (batch + 1))
        counts.add(np.append(rare, frequent), np.ones(21, np.int64))
    found = counts.most_frequent(5, 10)
    assert len(counts.hashes) <= 100
    assert list(found) == [7]
    assert 40 - counts.max_missing <= found[7] <= 40
    assert counts.max_missing > 0
