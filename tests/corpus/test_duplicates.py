"""Tests of exact and near duplicates."""
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from plaingpt.corpus import duplicates
from plaingpt.corpus.duplicates import (FirstOccurrences, check_kind, fingerprint_width,
                                        fingerprints_of, method_of)
from plaingpt.corpus.hash_index import MIXER, short_key
from plaingpt.corpus.splitting import hashes_of
from plaingpt.system.messages import UserError

rensa = pytest.importorskip('rensa')


def fingerprints(kind, texts):
    return fingerprints_of(kind, texts, hashes_of(texts))


def are_new(kind, texts):
    """Whether each of the texts is new, as a list."""
    return FirstOccurrences(kind).add(fingerprints(kind, texts)).tolist()


def words(number, seed=0):
    """A list of random words, of which hardly two are equal."""
    random = np.random.default_rng(seed)
    return [f'w{value}' for value in random.integers(10**9, size=number)]


def text_of(number, seed=0):
    return ' '.join(words(number, seed))


def pair_of_similarity(similarity, seed):
    """Two texts whose shingles have about this Jaccard similarity."""
    shingles = 2000
    # Cut off the end of both, and let others follow: each has `own` shingles of its own.
    own = round(shingles * (1 - similarity) / (1 + similarity))
    common = words(shingles - own, seed)
    return (' '.join(common + words(own, seed + 10**6)),
            ' '.join(common + words(own, seed + 2 * 10**6)))


# ---- exact ----

def test_the_first_of_equal_texts_is_new():
    assert are_new('exact', ['a', 'b', 'a', 'a ', 'c', 'b']) == [True, True, False, True, True,
                                                                 False]


def test_no_documents():
    for kind in ('exact', 'near'):
        assert fingerprints(kind, []).shape == (0, fingerprint_width(kind))
        assert are_new(kind, []) == []


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(1, 9))
def test_exact_occurrences_in_batches_against_a_set(numbers, size):
    texts = [str(number) for number in numbers]
    occurrences = FirstOccurrences('exact')
    seen = set()
    for first in range(0, len(texts), size):
        batch = texts[first:first + size]
        expected = []
        for text in batch:
            expected.append(text not in seen)
            seen.add(text)
        assert occurrences.add(fingerprints('exact', batch)).tolist() == expected
    assert occurrences.documents == len(seen)


def test_many_documents_through_all_sizes_of_the_index():
    random = np.random.default_rng(0)
    hashes = random.integers(2**64, size=30_000, dtype=np.uint64).reshape(-1, 1)
    occurrences = FirstOccurrences('exact')
    for first in range(0, 30_000, 700):
        assert occurrences.add(hashes[first:first + 700]).all()
    groups = occurrences.groups(hashes[::-1])
    assert groups.tolist() == list(range(29_999, -1, -1))


def test_hashes_with_equal_short_keys_stay_apart():
    inverse = pow(MIXER, -1, 2**64)
    values = [(7 << 32 | low) * inverse % 2**64 for low in range(39)]
    hashes = np.array(values, np.uint64).reshape(-1, 1)
    assert (short_key(hashes) == 7).all()
    occurrences = FirstOccurrences('exact')
    assert occurrences.add(hashes[:20]).all() and occurrences.add(hashes[20:]).all()
    assert not occurrences.add(hashes).any()


def test_bands_that_differ_in_two_values_have_different_keys():
    """Folding the halves of a band onto each other would lose what differs in both alike."""
    band = np.array([0x0123456789ABCDEF], np.uint64)
    others = band ^ np.arange(1, 256, dtype=np.uint64) * np.uint64(2**32 + 1)
    assert not (short_key(others) == short_key(band)).any()


# ---- near ----

def test_a_text_with_some_words_changed_is_a_near_duplicate():
    original = words(1000)
    changed = list(original)
    changed[100:110] = words(10, seed=1)
    changed[800] = 'other'
    assert are_new('near', [' '.join(original), text_of(1000, seed=2), ' '.join(changed)]) == [
        True, True, False]


def test_case_punctuation_and_space_do_not_matter():
    assert are_new('near', ['The fox, at last, saw a hen.', 'the  FOX at last\nsaw a “hen”!',
                            'The fox, at last, saw a cat.']) == [True, False, True]


def test_texts_without_spaces_between_words():
    text = '敏捷的棕色狐狸跳过了那只懒惰的狗，然后在太阳落山之前回到了森林里的家。'
    assert are_new('near', [text, text + '完', text[:20]]) == [True, False, True]


def test_short_texts_are_compared_as_a_whole():
    assert are_new('near', ['Yes.', 'yes', 'no', 'yes, yes', '?', '!', '']) == [
        True, False, True, True, True, True, True]


@pytest.mark.parametrize('similarity, least, most', [(0.95, 99, 100), (0.8, 75, 99), (0.7, 1, 30),
                                                     (0.5, 0, 0)])
def test_share_of_pairs_that_are_found(similarity, least, most):
    found = 0
    for seed in range(100):
        found += not are_new('near', pair_of_similarity(similarity, seed))[1]
    assert least <= found <= most


def test_what_repeats_only_a_repetition_is_kept():
    original = words(1000, seed=4)
    end_changed = original[:920] + words(80, seed=1)    # a similarity of 0.85
    both_changed = words(80, seed=2) + end_changed[80:]  # to the original, one of 0.73
    texts = [' '.join(text) for text in (original, end_changed, both_changed)]
    assert are_new('near', [texts[0], texts[1]]) == [True, False]
    assert are_new('near', [texts[1], texts[2]]) == [True, False]
    assert are_new('near', [texts[0], texts[2]]) == [True, True]
    assert are_new('near', texts) == [True, False, True]


def test_groups_name_the_document_that_is_repeated():
    texts = [text_of(100, seed=1), 'a', text_of(100, seed=2), text_of(100, seed=2) + ' more', 'b',
             text_of(100, seed=1), 'A!']
    groups = FirstOccurrences('near').groups(fingerprints('near', texts))
    assert groups.tolist() == [0, 1, 2, 2, 3, 0, 1]


def bands_of_few_values(random, documents):
    """Fingerprints, many of which share bands, and some of which are near duplicates."""
    bases = random.integers(256, size=(3, duplicates.VALUES), dtype=np.uint8)
    values = bases[random.integers(3, size=documents)].copy()
    for row in values:
        changed = random.choice(duplicates.VALUES, random.integers(10, 50), replace=False)
        row[changed] = random.integers(256, size=len(changed))
    hashes = random.integers(2**64, size=(documents, 1), dtype=np.uint64)
    # Some documents are exactly equal.
    again = random.integers(documents, size=documents // 10)
    fingerprints = np.concatenate([hashes, values.view('<u8')], axis=1)
    fingerprints[again] = fingerprints[0]
    return fingerprints


def groups_one_by_one(fingerprints):
    """What groups() has to return while MAX_CANDIDATES is not reached."""
    kept = []
    groups = []
    for row in fingerprints:
        found = None
        for number, other in enumerate(kept):
            shares_a_band = (row[1:] == other[1:]).any()
            agreeing = (row[1:].view(np.uint8) == other[1:].view(np.uint8)).sum()
            if row[0] == other[0] or (shares_a_band and agreeing >= duplicates.AGREEING):
                found = number
                break
        if found is None:
            found = len(kept)
            kept.append(row)
        groups.append(found)
    return groups


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 60), limit=st.sampled_from([2, 5, 10**6]))
def test_near_groups_do_not_depend_on_the_batches(seed, size, limit):
    fingerprints = bands_of_few_values(np.random.default_rng(seed), 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, 'MAX_CANDIDATES', limit)
        at_once = FirstOccurrences('near').groups(fingerprints)
        occurrences = FirstOccurrences('near')
        in_batches = [occurrences.groups(fingerprints[first:first + size])
                      for first in range(0, 60, size)]
    assert np.concatenate(in_batches).tolist() == at_once.tolist()
    if limit == 10**6:
        assert at_once.tolist() == groups_one_by_one(fingerprints)


def test_the_test_above_has_duplicates_and_new_documents():
    groups = groups_one_by_one(bands_of_few_values(np.random.default_rng(0), 60))
    assert 5 < len(set(groups)) < 55


@pytest.mark.parametrize('kind', ['exact', 'near'])
def test_stored_fingerprints_restore_the_state(kind):
    texts = [text_of(50, seed) for seed in (1, 2, 1, 3, 2, 4, 3)]
    expected = are_new(kind, texts)
    stored = np.frombuffer(fingerprints(kind, texts[:4]).tobytes(), np.uint64)
    occurrences = FirstOccurrences(kind)
    occurrences.add(stored.reshape(-1, fingerprint_width(kind)))
    assert occurrences.add(fingerprints(kind, texts[4:])).tolist() == expected[4:]


# ---- fingerprints ----

def test_other_processes_compute_the_same_fingerprints():
    texts = ['a b c d e f g', '狐狸', 'x\ud800']
    program = ('from plaingpt.corpus.duplicates import fingerprints_of\n'
               'from plaingpt.corpus.splitting import hashes_of\n'
               f'texts = {texts!a}\n'
               'print(fingerprints_of("near", texts, hashes_of(texts)).tolist())')
    environment = {**os.environ, 'PYTHONHASHSEED': '7', 'PYTHONPATH': str(ROOT)}
    finished = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                              env=environment)
    assert finished.stdout.strip() == str(fingerprints('near', texts).tolist()), finished.stderr


def test_a_fingerprint_does_not_depend_on_the_texts_beside_it():
    texts = [text_of(30), '', 'one', text_of(7), '…']
    alone = [fingerprints('near', [text])[0].tolist() for text in texts]
    assert fingerprints('near', texts).tolist() == alone


def test_hashes_that_are_given_are_used():
    hashes = np.array([5, 6], np.uint64)
    assert fingerprints_of('exact', ['a', 'a'], hashes)[:, 0].tolist() == [5, 6]
    near = fingerprints_of('near', ['a', 'a'], hashes)
    assert near[:, 0].tolist() == [5, 6] and near[0, 1:].tolist() == near[1, 1:].tolist()


def test_only_the_beginning_of_a_very_long_text_counts(monkeypatch):
    monkeypatch.setattr(duplicates, 'MAX_CHARS', 400)
    start = text_of(60)[:400]
    assert are_new('near', [start + text_of(100, 1), start + text_of(100, 2)]) == [True, False]


# ---- kinds ----

def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="dedup='fuzzy' is unknown: choose among none, exact, near"):
        check_kind('fuzzy')
    for kind in duplicates.DEDUP_KINDS:
        check_kind(kind)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'rensa', None)
    for call in (lambda: check_kind('near'), lambda: fingerprints('near', ['a'])):
        with pytest.raises(UserError, match='pip install rensa'):
            call()
    check_kind('exact')
    assert fingerprints('exact', ['a']).shape == (1, 1)


def test_the_method_names_what_decides_fingerprints():
    assert method_of('exact') == 'exact'
    assert f'rensa {rensa.RMinHash.ALGORITHM_VERSION}' in method_of('near')
