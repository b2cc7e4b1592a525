"""Tests of groups of equal documents."""
import numpy as np
import pytest

from plaingpt.corpus.duplicates import fingerprints_of
from plaingpt.corpus.splitting import hashes_of
from plaingpt.inspection import document_groups
from plaingpt.inspection.document_groups import Groups


def add(groups, texts, in_val=None, kept=None):
    """Adds texts to Groups; in_val: the numbers of those in val; kept: those that are used."""
    rows = np.arange(len(texts))
    is_val = np.isin(rows, in_val or [])
    is_kept = np.ones(len(texts), bool) if kept is None else np.isin(rows, kept)
    numbers, is_new = groups.place(fingerprints_of('exact', texts, hashes_of(texts)))
    origins = [f'{text}{row}' for row, text in enumerate(texts, groups.documents)]
    groups.count(numbers, is_new, is_kept, is_val, origins, [text.upper() for text in texts])
    return is_new.tolist()


def test_the_largest_groups_with_their_first_origin_and_another():
    groups = Groups('exact')
    assert add(groups, ['a', 'b', 'a', 'c']) == [True, True, False, True]
    assert add(groups, ['b', 'b', 'd']) == [False, False, True]
    summary = groups.summary()
    assert summary['repeated'] == 3
    assert summary['share'] == 3 / 7
    assert summary['largest_groups'] == [
        {'documents': 3, 'origins': ['b1', 'b4'], 'text': 'B'},
        {'documents': 2, 'origins': ['a0', 'a2'], 'text': 'A'}]


def test_no_documents():
    groups = Groups('exact')
    assert groups.summary() == {'documents': 0, 'repeated': 0, 'share': 0.0,
                                'largest_groups': []}
    assert groups.in_both_splits() == {'val_documents': 0, 'also_in_train': 0, 'share': 0.0,
                                       'examples': []}


def test_documents_of_val_that_are_in_train():
    groups = Groups('exact')
    add(groups, ['a', 'b', 'a', 'c', 'c', 'a'], in_val=[2, 3, 4])
    assert groups.in_both_splits() == {'val_documents': 3, 'also_in_train': 1, 'share': 1 / 3,
                                       'examples': ['a0']}


def test_documents_that_are_dropped_do_not_overlap():
    groups = Groups('exact')
    add(groups, ['a', 'b', 'a'], in_val=[2], kept=[0, 1])
    assert groups.in_both_splits()['val_documents'] == 0
    assert groups.summary()['repeated'] == 1


def test_of_too_many_examples_those_of_the_largest_groups_stay(monkeypatch):
    monkeypatch.setattr(document_groups, 'MAX_EXAMPLES', 10)
    groups = Groups('exact')
    add(groups, ['large'] * 5)
    for number in range(30):
        add(groups, [f'small {number}'] * 2)
    assert len(groups.examples) <= 10
    assert groups.summary()['largest_groups'][0]['text'] == 'LARGE'


def test_more_groups_than_there_was_room_for():
    groups = Groups('exact')
    add(groups, [str(number) for number in range(3000)])
    add(groups, ['2999', '0', 'new'])
    assert groups.summary()['largest_groups'][0]['origins'] == ['00', '03001']
    assert groups.sizes.of(2999) == 2


@pytest.mark.parametrize('in_val', [[2999, 3000], [0, 1]])
def test_splits_that_had_room_for_different_numbers_of_groups(in_val):
    groups = Groups('exact')
    texts = [str(number) for number in range(3000)]
    add(groups, [*texts, texts[in_val[0]]], in_val=in_val)
    assert len(groups.in_train.array) != len(groups.in_val.array)
    overlap = groups.in_both_splits()
    assert overlap['val_documents'] == 2
    assert overlap['also_in_train'] == (0 if in_val[1] == 3000 else 1)
