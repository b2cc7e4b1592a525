"""Tests of the histogram of lengths."""
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaingpt.corpus.lengths import Lengths

some_lengths = st.lists(st.one_of(st.integers(0, 100), st.integers(0, 2**52)), max_size=50)


def histogram(*batches):
    lengths = Lengths()
    for batch in batches:
        lengths.add(batch)
    return lengths


@given(some_lengths, some_lengths)
def test_adding_merging_and_saving_give_the_same(first, second):
    together = histogram(first + second)
    merged = histogram(first)
    merged.merge(histogram(second))
    loaded = Lengths.from_json(json.loads(json.dumps(merged.to_json())))
    for other in (merged, loaded, histogram(first, second)):
        assert other.to_json() == together.to_json()
    assert together.documents == len(first + second)
    assert together.sum == sum(first + second)


@given(some_lengths.filter(bool), st.floats(0, 1))
def test_quantiles_are_at_most_3_percent_off(lengths, share):
    exact = next(length for length in sorted(lengths)
                 if sum(other <= length for other in lengths) >= share * len(lengths))
    assert histogram(lengths).quantile(share) == pytest.approx(exact, rel=0.032)


@pytest.mark.parametrize('lengths, share, expected', [
    ([10, 20], 0.5, 10), ([10, 20], 0.51, 20), ([1, 2, 3], 0.5, 2), ([7], 0.01, 7),
    (range(31), 0.0, 0), (range(31), 1.0, 30), ([1] * 9 + [30], 0.9, 1)])
def test_a_quantile_is_a_length_that_occurs(lengths, share, expected):
    assert histogram(lengths).quantile(share) == expected


def test_half_of_two_documents_is_one_of_them():
    assert histogram([10, 1000]).quantile(0.5) == 10


@given(some_lengths)
def test_smallest_largest_and_mean(lengths):
    found = histogram(lengths)
    assert found.smallest == min(lengths, default=0)
    assert found.largest == max(lengths, default=0)
    assert found.mean == pytest.approx(np.mean(lengths) if lengths else 0)


@given(some_lengths)
def test_bars_count_each_document_once_where_it_belongs(lengths):
    bars = histogram(lengths).bars()
    assert sum(documents for _, _, documents in bars) == len(lengths)
    for first, end, documents in bars:
        assert documents == sum(first <= length < end for length in lengths)
    for (_, end, _), (first, _, _) in zip(bars, bars[1:], strict=False):
        assert end == first
    if bars:
        assert bars[0][2] > 0 and bars[-1][2] > 0
