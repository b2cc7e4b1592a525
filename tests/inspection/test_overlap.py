"""Tests of the overlap between the tokens of train and val."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaingpt.inspection import overlap as overlap_module
from plaingpt.inspection.overlap import WINDOW, find_overlap

END = 0


class Tokens:
    """Ids in memory, read as a TokenFile is."""

    def __init__(self, ids):
        self.ids = np.array(ids, np.int64)

    def __len__(self):
        return len(self.ids)

    def rows(self, starts, length):
        return np.stack([self.ids[start:start + length] for start in starts])


def overlap_of(train, val, end_of_text=END, vocab_size=100):
    return find_overlap(Tokens(train), Tokens(val), end_of_text, vocab_size)


def random_ids(number, seed, low=1, high=100):
    return np.random.default_rng(seed).integers(low, high, number).tolist()


@settings(deadline=None)
@given(train=st.lists(st.integers(0, 2), min_size=1, max_size=60),
       val=st.lists(st.integers(0, 2), min_size=1, max_size=40),
       end_of_text=st.sampled_from([END, None]))
def test_against_comparing_all_windows(train, val, end_of_text):
    window = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap_module, 'WINDOW', window)
        patch.setattr(overlap_module, 'BLOCK', 7)
        found = overlap_of(train, val, end_of_text, vocab_size=3)

    of_train = {tuple(train[start:start + window]) for start in range(len(train) - window + 1)}
    covered = [False] * len(val)
    for start in range(len(val) - window + 1):
        tokens = tuple(val[start:start + window])
        if tokens in of_train and end_of_text not in tokens:
            covered[start:start + window] = [True] * window
    assert found.covered_tokens == sum(covered)
    assert found.val_tokens == len(val)
    assert not found.is_sample

    if end_of_text is None:
        assert (found.val_documents, found.documents_with) == (0, 0)
        return
    documents = [[]]
    for token, is_covered in zip(val, covered, strict=True):
        documents[-1].append(is_covered)
        if token == END:
            documents.append([])
    documents = [document for document in documents if document]
    assert found.val_documents == len(documents)
    assert found.documents_with == sum(any(document) for document in documents)


def test_a_copied_passage_is_found_and_shown():
    passage = random_ids(130, seed=3)
    train = random_ids(5000, seed=1) + passage + random_ids(5000, seed=2)
    val = random_ids(200, seed=4) + [END] + passage + [END] + random_ids(49, seed=5) + [END]
    found = overlap_of(train, val)
    assert found.covered_tokens == 130
    assert (found.val_documents, found.documents_with) == (3, 1)
    (tokens, first_ids), = found.passages
    assert tokens == 130 and first_ids == passage[:overlap_module.PASSAGE_TOKENS]


def test_a_run_shorter_than_the_window_is_not_counted():
    passage = random_ids(WINDOW - 1, seed=3)
    assert overlap_of(random_ids(999, 1) + passage, passage + random_ids(99, 2)).covered_tokens == 0


def test_a_run_beyond_the_end_of_a_document_is_not_counted():
    passage = random_ids(30, seed=3) + [END] + random_ids(30, seed=4)
    assert overlap_of(passage * 2, passage).covered_tokens == 0
    assert overlap_of(passage * 2, passage, end_of_text=None).covered_tokens == 61


def test_equal_passages_are_shown_once_and_the_longest_first():
    short, long = random_ids(60, seed=3), random_ids(90, seed=4)
    val = short + [END] + long + [END] + short
    found = overlap_of(long + [END] + short, val)
    assert [tokens for tokens, _ in found.passages] == [90, 60]
    assert found.covered_tokens == 210


def test_of_a_large_val_a_sample_is_looked_at(monkeypatch):
    monkeypatch.setattr(overlap_module, 'MAX_VAL_TOKENS', 10_000)
    monkeypatch.setattr(overlap_module, 'STRETCHES', 10)
    val = random_ids(50_000, seed=1)
    found = overlap_of(val[:25_000] + random_ids(1000, seed=2), val)
    assert found.is_sample and found.val_tokens == 10_000
    assert found.covered_tokens / found.val_tokens == pytest.approx(0.5, abs=0.1)


def test_stretches_of_a_sample_are_not_joined(monkeypatch):
    """Each has a part of a document of its own, and a passage ends where its stretch does."""
    monkeypatch.setattr(overlap_module, 'MAX_VAL_TOKENS', 400)
    monkeypatch.setattr(overlap_module, 'STRETCHES', 4)
    val = random_ids(1000, seed=1)
    val[450] = END
    found = overlap_of(val, val)
    assert found.is_sample and found.val_tokens == 400
    # The stretches begin at 0, 300, 600 and 900.
    assert (found.val_documents, found.documents_with) == (4, 4)
    assert [tokens for tokens, _ in found.passages] == [100] * 4
    val[350] = END
    assert overlap_of(val, val).val_documents == 5


def test_files_that_are_shorter_than_a_window():
    assert overlap_of(random_ids(30, 1), random_ids(30, 1)).covered_tokens == 0
    assert overlap_of(random_ids(300, 1), [5]).covered_tokens == 0


def test_progress_and_the_chance_of_a_false_hit(monkeypatch):
    monkeypatch.setattr(overlap_module, 'BLOCK', 1000)
    done = []
    train, val = random_ids(3500, 1), random_ids(1000, 2)
    found = find_overlap(Tokens(train), Tokens(val), END, 100, done.append)
    assert done == sorted(done) and done[-1] == 3500
    assert found.false_hit_probability == pytest.approx(951 * 3500 / 2**64)
