"""
Overlap between the splits of a data set: which runs of WINDOW tokens of val occur in train, too.

A model that has seen a passage in training predicts it well without having learned anything else,
so the validation loss of an overlapping data set is too low.
"""
from dataclasses import dataclass

import numpy as np

from plaingpt.corpus.stretch_hashes import StretchHashes

WINDOW = 50                # tokens
MAX_VAL_TOKENS = 2**22     # of a larger val, this many are looked at, in STRETCHES
STRETCHES = 256
BLOCK = 2**20              # tokens of train at a time
LONGEST = 5                # passages that are kept as examples
PASSAGE_TOKENS = 100


@dataclass
class Overlap:
    """What val has in common with train.

    Two different windows have the same hash of 64 bits with a probability of about 2**-64, so
    false_hit_probability is at most that of one false window among all."""
    val_tokens: int             # that were looked at
    covered_tokens: int         # in a window that is in train, too
    val_documents: int          # that were looked at, or parts; 0 where nothing ends a document
    documents_with: int         # that have a window of train
    is_sample: bool             # whether val has more tokens than were looked at
    false_hit_probability: float
    passages: list              # the longest runs of covered tokens: (tokens, first ids)


def find_overlap(train, val, end_of_text, vocab_size, progress=None):
    """The Overlap of two TokenFiles.

    end_of_text: the id that ends documents, or None. A window never goes beyond an end.
    vocab_size: all ids are below it.
    progress: is called with the number of train's tokens that are done."""
    # Ids are replaced by random numbers, so that similar windows have no similar hashes.
    numbers = np.random.default_rng(0).integers(2**64, size=vocab_size, dtype=np.uint64)
    stretches, hashes, is_sample = _val_windows(val, end_of_text, numbers)
    sought = Sought(hashes[hashes != NO_WINDOW])
    for start in range(0, max(len(train) - WINDOW + 1, 0), BLOCK):
        length = min(BLOCK + WINDOW - 1, len(train) - start)
        block = train.rows([start], length)[0]
        sought.look_in(StretchHashes(numbers[block]).windows(WINDOW))
        if progress is not None:
            progress(start + length)

    covered = _covered(sought.found(hashes))
    documents, documents_with = 0, 0
    if end_of_text is not None:
        documents, documents_with = _documents(stretches, covered, end_of_text)
    return Overlap(
        val_tokens=stretches.size,
        covered_tokens=int(covered.sum()),
        val_documents=documents,
        documents_with=documents_with,
        is_sample=is_sample,
        false_hit_probability=min(1.0, len(sought.hashes) * len(train) / 2**64),
        passages=_longest_passages(stretches, covered))


NO_WINDOW = np.uint64(0)  # in place of the hash of a window that is not looked for


def _val_windows(val, end_of_text, numbers):
    """Returns the ids of val that are looked at, int64 (stretches, length); in the same shape, the
    hash of the window that begins at each one, or NO_WINDOW, uint64; and whether val has more."""
    length = len(val)
    is_sample = length > MAX_VAL_TOKENS
    starts = [0]
    if is_sample:
        length = MAX_VAL_TOKENS // STRETCHES
        starts = np.linspace(0, len(val) - length, STRETCHES).astype(np.int64)
    stretches = val.rows(starts, length)  # (stretches, length)
    hashes = np.full(stretches.shape, NO_WINDOW, np.uint64)
    if length >= WINDOW:
        for stretch, row in zip(stretches, hashes, strict=True):
            row[:length - WINDOW + 1] = StretchHashes(numbers[stretch]).windows(WINDOW)
            if end_of_text is not None:
                # A window with an end in it begins at the end or up to WINDOW - 1 tokens before.
                ends = np.cumsum(np.concatenate([[0], stretch == end_of_text]))
                ends_within = ends[WINDOW:] - ends[:-WINDOW]
                row[:length - WINDOW + 1][ends_within > 0] = NO_WINDOW
    return stretches, hashes, is_sample


class Sought:
    """The hashes that are looked for in train.

    Most hashes of train are none of them. A table, indexed by the first bits of a hash, says so at
    once; only the rest is looked up in the sorted array."""

    def __init__(self, hashes):
        self.hashes = np.unique(hashes)
        self.was_seen = np.zeros(len(self.hashes), bool)
        bits = min(max(16 * len(self.hashes), 2**16).bit_length(), 26)
        self.shift = np.uint64(64 - bits)
        self.may_be_sought = np.zeros(2**bits, bool)
        self.may_be_sought[self.hashes >> self.shift] = True

    def look_in(self, hashes):
        """Notes which of the sought hashes are among these, uint64 (n,)."""
        if len(self.hashes) == 0:
            return
        # Sorted, because looking up neighbours one after another is several times as fast.
        candidates = np.sort(hashes[self.may_be_sought[hashes >> self.shift]])
        places = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        self.was_seen[places[self.hashes[places] == candidates]] = True

    def found(self, hashes):
        """Whether each of these is sought and was seen: bool, in the shape of hashes."""
        if len(self.hashes) == 0:
            return np.zeros(hashes.shape, bool)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return self.was_seen[places] & (self.hashes[places] == hashes)


def _covered(is_found):
    """Which tokens are in a window that was found: bool (stretches, length).

    is_found: for each token, whether the window that begins with it was."""
    begun = np.cumsum(is_found, axis=1, dtype=np.int64)
    begun_before_window = np.zeros_like(begun)
    begun_before_window[:, WINDOW:] = begun[:, :-WINDOW]
    return begun > begun_before_window


def _documents(stretches, covered, end_of_text):
    """How many documents the stretches have, and how many of those have a covered token.

    Different stretches are of different documents, or of parts far from each other."""
    begins = np.ones(stretches.shape, bool)
    begins[:, 1:] = stretches[:, :-1] == end_of_text
    document = np.cumsum(begins)  # its number, for each token of all stretches
    return int(begins.sum()), len(np.unique(document[covered.reshape(-1)]))


def _longest_passages(stretches, covered):
    """The longest runs of covered tokens, different ones: a list of (tokens, first ids)."""
    edges = np.diff(covered.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)  # in the same order
    lengths = ends - starts
    passages = {}
    for run in np.argsort(-lengths, kind='stable').tolist():
        first = int(starts[run])
        shown = min(int(lengths[run]), PASSAGE_TOKENS)
        first_ids = tuple(stretches[rows[run], first:first + shown].tolist())
        passages.setdefault(first_ids, int(lengths[run]))
        if len(passages) == LONGEST:
            break
    return [(tokens, list(first_ids)) for first_ids, tokens in passages.items()]
