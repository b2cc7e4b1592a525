"""
Finds documents that repeat an earlier one, exactly or nearly (--dedup=exact, --dedup=near).

Two documents are nearly equal if they share most of their shingles, runs of five words. Their
similarity is Jaccard's: shingles in both, divided by shingles in either. The share of MinHash
values that are equal estimates it: Broder 1997, "On the resemblance and containment of documents".

A document has BANDS bands of ROWS MinHash values, of which we keep 8 bits each. It is compared with
each earlier document that is equal in a whole band, and repeats it if AGREEING of all 128 values
are equal. So of the pairs with a similarity of

    0.9   0.8   0.75   0.7   0.6    0.5
    100%  90%   51%    12%   0.03%  0.000001%

are found; 600 pairs of each similarity agreed with these shares. Comparing bands alone would also
find 6% of the pairs with a similarity of 0.5.
"""
from importlib.util import find_spec

import numpy as np

from plaingpt.corpus.hash_index import GrowingArray, HashIndex, short_key
from plaingpt.corpus.shingles import SHINGLE, shingles_of
from plaingpt.system.messages import UserError

DEDUP_KINDS = ('none', 'exact', 'near')

BANDS = 16
ROWS = 8            # a band is one uint64 of 8 values
VALUES = BANDS * ROWS
AGREEING = 96       # 75%: an estimate from 128 values is off by 3.5% (standard deviation)
SEED = 1            # of the permutations
MAX_CHARS = 10**6   # near duplicates are judged by the beginning of a document


# ---- in a worker: fingerprints ----

def check_kind(kind):
    """UserError if kind is not one of DEDUP_KINDS, or if its package is missing."""
    if kind not in DEDUP_KINDS:
        raise UserError(f'dedup={kind!r} is unknown: choose among {", ".join(DEDUP_KINDS)}')
    if kind == 'near':
        _rensa()


def can_find(kind):
    """Whether the package that finds duplicates of this kind is installed."""
    return kind != 'near' or find_spec('rensa') is not None


def method_of(kind):
    """What a restart must find unchanged to go on with stored fingerprints, as text."""
    if kind != 'near':
        return kind
    version = _rensa().RMinHash.ALGORITHM_VERSION
    return f'near, {SHINGLE} words, {BANDS} x {ROWS} of rensa {version}, seed {SEED}'


def fingerprint_width(kind):
    """How many uint64 the fingerprint of a document has."""
    return 1 + BANDS if kind == 'near' else 1


def fingerprints_of(kind, texts, hashes):
    """The fingerprints of n texts, for FirstOccurrences: uint64 (n, fingerprint_width(kind)).

    hashes: hashes_of(texts), or of the documents of which the texts are the beginnings. Column 0
    holds them; the others of 'near' are the bands.

    UserError if rensa is missing, for 'near'."""
    hashes = np.asarray(hashes, np.uint64)
    if kind != 'near':
        return hashes.reshape(-1, 1)
    if len(texts) == 0:
        return np.empty((0, fingerprint_width(kind)), np.uint64)
    beginnings = [text[:MAX_CHARS] for text in texts]
    shingles, offsets = shingles_of(beginnings, hashes)
    digests = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, VALUES,
                                                                     SEED)
    values = np.array(digests.to_rows(), np.uint32)  # (documents, VALUES)
    low_bytes = np.ascontiguousarray(values & 255, dtype=np.uint8)
    bands = low_bytes.view('<u8')                    # (documents, BANDS)
    return np.column_stack([hashes, bands.astype(np.uint64)])


def _rensa():
    try:
        import rensa
    except ImportError:
        raise UserError('near duplicates (dedup=near) are found by the package rensa: '
                        'pip install rensa') from None
    return rensa


# ---- in the parent: which documents are new ----

MAX_ROWS = 512      # documents treated at once; bounds the memory for comparisons
MAX_CANDIDATES = 100  # kept documents with the same band; more share a template, not a text


class FirstOccurrences:
    """Tells which documents of a corpus are new, and which repeat an earlier one.

    What a document repeats is always one that is new: a text that is similar to a mere repetition
    is not dropped for that. The result depends on the order of the documents, but not on how many
    are added at a time.

    kind: 'exact' or 'near'. Measured memory: 23 bytes a document that is new, 26 at the peak, for
    4 million documents; 'near' 278, for 1 million. It holds up to 2**32 documents."""

    def __init__(self, kind):
        self.kind = kind
        self.documents = 0  # that are new
        self.hashes = GrowingArray(())
        self.by_hash = HashIndex()
        if kind == 'near':
            self.bands = GrowingArray((BANDS,))
            self.by_band = [HashIndex() for _ in range(BANDS)]

    def add(self, fingerprints):
        """Adds the next documents: bool (n,), whether each is new.

        fingerprints: from fingerprints_of(), (n, fingerprint_width(kind))."""
        before = self.documents
        groups = self.groups(fingerprints)
        # A new document has the next free number; a repetition never exceeds those before it.
        highest = np.maximum.accumulate(np.concatenate([[before - 1], groups]))
        return groups > highest[:-1]

    def groups(self, fingerprints):
        """Adds the next documents: int64 (n,), the number of the new document that each one is or
        repeats, counted from 0."""
        groups = np.empty(len(fingerprints), np.int64)
        for first in range(0, len(fingerprints), MAX_ROWS):
            rows = fingerprints[first:first + MAX_ROWS]
            if self.kind == 'near':
                groups[first:first + MAX_ROWS] = self._near_groups(rows)
            else:
                groups[first:first + MAX_ROWS] = self._exact_groups(rows[:, 0])
        return groups

    def _exact_groups(self, hashes):
        groups = self._known(hashes)
        # Those that are new here: the first of each hash gets a number, in order.
        rows = np.flatnonzero(groups < 0)
        different, firsts, inverse = np.unique(hashes[rows], return_index=True,
                                               return_inverse=True)
        order = np.argsort(firsts)
        numbers = np.empty(len(different), np.int64)
        numbers[order] = self.documents + np.arange(len(different))
        groups[rows] = numbers[inverse]
        self._keep(hashes[rows][firsts[order]])
        return groups

    def _known(self, hashes):
        """The numbers of the kept documents with these hashes: int64 (n,); -1 for a new hash."""
        groups = np.full(len(hashes), -1, np.int64)
        rows, candidates = self.by_hash.find(short_key(hashes))
        equal = self.hashes.array[candidates] == hashes[rows]
        groups[rows[equal]] = candidates[equal]
        return groups

    def _keep(self, hashes):
        """Gives the next numbers to documents with these hashes."""
        numbers = np.arange(self.documents, self.documents + len(hashes))
        self.hashes.append(hashes)
        self.by_hash.add(short_key(hashes), numbers)
        self.documents += len(hashes)

    def _near_groups(self, fingerprints):
        hashes = fingerprints[:, 0]
        bands = np.ascontiguousarray(fingerprints[:, 1:])
        keys = short_key(bands)
        groups, kept_per_key = self._groups_of_earlier(hashes, bands, keys)

        # The others may repeat each other: one after another, each looks among those that are kept
        # before it and share a key with it.
        rows = np.flatnonzero(groups < 0)
        kept = _Kept(bands, may_be_found=kept_per_key < MAX_CANDIDATES)
        number_by_hash = {}
        shared_keys = _shared_keys(rows, keys)
        for row, exact_hash in zip(rows.tolist(), hashes[rows].tolist(), strict=True):
            number = number_by_hash.get(exact_hash)
            if number is None:
                number = kept.number_like(row, shared_keys.get(row, ()))
            if number is None:
                number = kept.add(row, shared_keys.get(row, ()), kept_per_key)
                number_by_hash[exact_hash] = number
            groups[row] = self.documents + number

        new = kept.rows
        numbers = self.documents + np.arange(len(new))
        for band, index in enumerate(self.by_band):
            may_be_found = kept.may_be_found[new, band]
            index.add(keys[new, band][may_be_found], numbers[may_be_found])
        self.bands.append(bands[new])
        self._keep(hashes[new])
        return groups

    def _groups_of_earlier(self, hashes, bands, keys):
        """Compares a batch with the documents that were kept before it.

        Returns the number of the first document that each repeats, or -1, and how many have the
        same key in each band: int64 (n,), (n, BANDS)."""
        groups = self._known(hashes)
        pairs = []
        kept_per_key = np.zeros(keys.shape, np.int64)
        for band, index in enumerate(self.by_band):
            rows, candidates = index.find(keys[:, band])
            kept_per_key[:, band] = np.bincount(rows, minlength=len(keys))
            pairs.append(rows * 2**32 + candidates)
        pairs = np.unique(np.concatenate(pairs))  # sorted by row, then by number
        rows, candidates = pairs >> 32, pairs & (2**32 - 1)
        alike = _are_alike(bands[rows], self.bands.array[candidates])
        # In reverse, so that the smallest number of each row is written last.
        rows, candidates = rows[alike][::-1], candidates[alike][::-1]
        is_open = groups[rows] < 0
        groups[rows[is_open]] = candidates[is_open]
        return groups, kept_per_key


class _Kept:
    """The new documents of a batch, numbered from 0 in their order.

    may_be_found: bool (n, BANDS): whether a document is found by its key in this band."""

    def __init__(self, bands, may_be_found):
        self.bands = bands
        self.may_be_found = may_be_found
        self.rows = []            # their places in the batch
        self.numbers_by_key = {}  # (band, key): list of those that are found by it

    def number_like(self, row, shared_keys):
        """The first that the document at `row` repeats, or None."""
        candidates = set()
        for shared_key in shared_keys:
            candidates.update(self.numbers_by_key.get(shared_key, ()))
        if not candidates:
            return None
        numbers = sorted(candidates)
        rows = [self.rows[number] for number in numbers]
        alike = np.flatnonzero(_are_alike(self.bands[row], self.bands[rows]))
        return numbers[alike[0]] if len(alike) > 0 else None

    def add(self, row, shared_keys, kept_per_key):
        """Keeps the document at `row`. Returns its number."""
        number = len(self.rows)
        self.rows.append(row)
        for band, key in shared_keys:
            numbers = self.numbers_by_key.setdefault((band, key), [])
            if kept_per_key[row, band] + len(numbers) < MAX_CANDIDATES:
                numbers.append(number)
            else:
                self.may_be_found[row, band] = False
        return number


def _shared_keys(rows, keys):
    """The keys that occur in several of these rows, as {row: [(band, key), …]}.

    rows: int64 (m,). keys: uint64 (n, BANDS), of 32 bits."""
    with_band = keys[rows] | np.arange(BANDS, dtype=np.uint64) << np.uint64(32)
    _, inverse, counts = np.unique(with_band, return_inverse=True, return_counts=True)
    is_shared = counts[inverse].reshape(with_band.shape) > 1
    shared = {}
    for place, band in np.argwhere(is_shared).tolist():
        row = int(rows[place])
        shared.setdefault(row, []).append((band, int(keys[row, band])))
    return shared


def _are_alike(bands, others):
    """Whether the bands of documents, uint64 (…, BANDS), agree in enough values: bool (n,)."""
    differences = np.ascontiguousarray(bands ^ others)
    agreeing = (differences.view(np.uint8) == 0).sum(axis=-1)
    return agreeing >= AGREEING
