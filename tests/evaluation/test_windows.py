"""Strided windows count each target once, with as much context as promised."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaingpt.evaluation.windows import Windows


class Tokens:
    """A TokenFile in which token number i is i."""

    @staticmethod
    def rows(starts, length):
        return np.array(starts)[:, None] + np.arange(length)


def test_the_windows_are_those_of_the_docstring():
    windows = Windows.over(tokens=10, context_size=4, stride=2)
    assert len(windows) == 4
    batch = windows.read(Tokens, 0, 4)
    assert batch.tokens[:, 0].tolist() == [0, 2, 4, 5]
    assert batch.counted.astype(int).tolist() == [
        [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


@given(st.integers(2, 50), st.integers(1, 12), st.data())
def test_each_target_counts_once_and_in_order(tokens, context_size, data):
    stride = data.draw(st.integers(1, context_size))
    windows = Windows.over(tokens, context_size, stride)
    counted = []
    for number in range(len(windows)):
        assert windows.counted_before(number) == len(counted)
        batch = windows.read(Tokens, number, number + 1)
        targets = batch.tokens[:, 1:]
        counted += targets[batch.counted].tolist()
        contexts = np.arange(1, windows.length + 1)[batch.counted[0]]
        if number > 0:
            assert contexts.min() > context_size - stride
    assert counted == list(range(1, tokens))


@pytest.mark.parametrize('tokens', [2, 5])
def test_a_split_shorter_than_a_window_is_one_short_window(tokens):
    windows = Windows.over(tokens, context_size=8, stride=4)
    assert len(windows) == 1
    assert windows.read(Tokens, 0, 1).tokens.tolist() == [list(range(tokens))]
