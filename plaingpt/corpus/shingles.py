"""
Shingles: the overlapping runs of SHINGLE words by which texts are compared.

Words have no case and no punctuation. Of Chinese, Japanese, Thai and other scripts without spaces,
each character is a word. A text of fewer words is one shingle.
"""
import numpy as np

from plaingpt.corpus.stretch_hashes import StretchHashes
from plaingpt.corpus.words import BETWEEN_WORDS, IN_WORD, WORD, code_points, word_table

SHINGLE = 5


def shingles_of(texts, hashes):
    """Hashes of the shingles of all texts, and where those of each text begin, and the last end.

    A text without words has its own hash, of hashes, as its only shingle. Returns uint64 arrays."""
    words, words_in_text = _words(texts)
    shingles_in_text = np.maximum(words_in_text - SHINGLE + 1, 1)
    offsets = np.concatenate([[0], np.cumsum(shingles_in_text)])
    first_words = np.cumsum(words_in_text) - words_in_text

    # The number of each shingle within its text, then of its first word among all words.
    within_text = np.arange(offsets[-1]) - np.repeat(offsets[:-1], shingles_in_text)
    starts = np.repeat(first_words, shingles_in_text) + within_text
    ends = starts + np.repeat(np.minimum(words_in_text, SHINGLE), shingles_in_text)
    shingles = StretchHashes(words).of(starts, ends)
    without_words = words_in_text == 0
    shingles[offsets[:-1][without_words]] = hashes[without_words]
    return shingles, offsets.astype(np.uint64)


def _words(texts):
    """Hashes of the words of all texts, uint64, and how many each text has, int64."""
    lowered = [text.lower() for text in texts]
    ends = np.cumsum([len(text) + 1 for text in lowered])
    codes = code_points('\n'.join(lowered) + '\n')
    kinds = word_table()[codes]

    # A word starts at each character that is one, and at the first of a run of IN_WORD.
    kind_before = np.concatenate([[BETWEEN_WORDS], kinds[:-1]])
    starts_run = (kinds == IN_WORD) & (kind_before != IN_WORD)
    starts = np.flatnonzero(starts_run | (kinds == WORD))
    kind_after = np.concatenate([kinds[1:], [BETWEEN_WORDS]])
    ends_run = (kinds == IN_WORD) & (kind_after != IN_WORD)
    word_ends = np.flatnonzero(ends_run | (kinds == WORD)) + 1
    words = StretchHashes(codes.astype(np.uint64)).of(starts, word_ends)
    words_up_to = np.searchsorted(starts, ends)
    return words, np.diff(words_up_to, prepend=0)
