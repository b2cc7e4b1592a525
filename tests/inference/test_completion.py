"""Completions of a batch: stops, and pieces that are shown early."""
import pytest
import torch

from plaingpt.inference.completion import complete
from plaingpt.text.tokenizers import CharTokenizer

LETTERS = CharTokenizer('abcdefghij')


def ids_of(*texts, asked=None):
    """Yields the ids of texts of equal length, position by position; counts them in asked."""
    for chars in zip(*texts, strict=True):
        if asked is not None:
            asked.append(chars)
        yield torch.tensor([LETTERS.encode(char) for char in chars])


@pytest.mark.parametrize('stops, expected', [
    ([], ['abcdef', 'fedcba']),
    (['cd'], ['ab', 'fedcba']),
    (['cd', 'dc'], ['ab', 'fe']),
    (['e', 'bc'], ['a', 'f']),  # the first one in the text counts
    (['a'], ['', 'fedcb']),
])
def test_the_first_stop_ends_a_completion(stops, expected):
    assert complete(ids_of('abcdef', 'fedcba'), 2, LETTERS, stops) == expected


def test_no_more_ids_are_asked_for_once_all_rows_have_a_stop():
    asked = []
    assert complete(ids_of('abcdef', 'bacdef', asked=asked), 2, LETTERS, ['b']) == ['a', '']
    assert len(asked) == 2


def test_what_is_shown_is_the_first_completion_and_never_the_beginning_of_a_stop():
    pieces = []
    completions = complete(ids_of('abcdefgh', 'aaaaaaaa'), 2, LETTERS, ['fg', 'cx'], pieces.append)
    assert ''.join(pieces) == completions[0] == 'abcde'
    assert pieces[:5] == ['a', 'b', '', 'cd', 'e']  # 'c' may begin 'cx'


def test_no_ids_are_an_empty_completion():
    assert complete(iter(()), 2, LETTERS) == ['', '']
