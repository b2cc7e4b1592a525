"""Tests of hashes of stretches: equal for equal stretches, wherever they stand."""
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plaingpt.corpus.stretch_hashes import StretchHashes

values = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@given(values, st.integers(1, 8))
def test_windows_have_equal_hashes_exactly_if_they_are_equal(numbers, length):
    if len(numbers) < length:
        return
    hashes = StretchHashes(np.array(numbers, np.uint64) + np.uint64(1)).windows(length)
    windows = [tuple(numbers[start:start + length]) for start in range(len(hashes))]
    assert len(hashes) == len(numbers) - length + 1
    for first, first_hash in zip(windows, hashes, strict=True):
        for second, second_hash in zip(windows, hashes, strict=True):
            assert (first == second) == (first_hash == second_hash)


@given(values, st.data())
def test_a_stretch_has_the_hash_of_the_window_at_its_place(numbers, data):
    start = data.draw(st.integers(0, len(numbers) - 1))
    end = data.draw(st.integers(start + 1, len(numbers)))
    hashes = StretchHashes(np.array(numbers, np.uint64))
    of_stretch = hashes.of(np.array([start]), np.array([end]))
    assert of_stretch[0] == hashes.windows(end - start)[start]


def test_a_hash_does_not_depend_on_what_surrounds_the_stretch():
    random = np.random.default_rng(0)
    stretch = random.integers(2**64, size=7, dtype=np.uint64)
    alone = StretchHashes(stretch).windows(7)
    before = random.integers(2**64, size=1000, dtype=np.uint64)
    within = StretchHashes(np.concatenate([before, stretch, before])).windows(7)
    assert within[1000] == alone[0]
    assert np.count_nonzero(within == alone[0]) == 1
