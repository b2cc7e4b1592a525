"""
The survey of one chunk, which a worker makes: counts, characters, lines, fingerprints, passages.
"""
import heapq
import re
from typing import Any, NamedTuple

import numpy as np

from plaingpt.corpus.documents import Extent, Skipped
from plaingpt.corpus.duplicates import fingerprints_of
from plaingpt.corpus.file_search import suffix_of
from plaingpt.corpus.splitting import hash_of, key_of
from plaingpt.corpus.words import code_points
from plaingpt.inspection.characters import (CLASSES, FIRST_ODD, MOJIBAKE, MOJIBAKE_PATTERN, ODD,
                                            class_table)
from plaingpt.inspection.repeated_lines import line_counts
from plaingpt.text.token_bytes import utf8_length

EXTREMES = 5           # longest lines, longest and shortest documents
EXCERPTS = 10
EXCERPT_CHARS = 400
HEAD_CHARS = 120       # of examples
LONG_LINE = 10_000     # characters; prose and code that people wrote stay below
SHORT = 50             # characters of a document


class Passage(NamedTuple):
    """A part of a document, to be shown."""
    rank: int     # by which passages are ordered
    origin: str
    text: str


class OddCount(NamedTuple):
    """Characters of one kind that are seldom meant."""
    characters: int
    documents: int   # with one
    example: str     # origin of one


class LongLines(NamedTuple):
    """The longest lines of a chunk; those of a piece that its ends may have cut stand apart."""
    longest: list           # of Passage: the longest line of a document, for EXTREMES of them
    chars: int              # in lines of more than LONG_LINE
    first: Passage | None   # of a piece, what precedes its first line break
    last: Passage | None    # of a piece, what follows its last line break; None: it has none


class ChunkSurvey(NamedTuple):
    """What is in a chunk: several documents, or one piece of a large one.

    Arrays and lists of documents hold those that begin in it."""
    extent: Extent | None       # where the piece lies; None: there are whole documents
    chars: np.ndarray           # int64 (documents,)
    fingerprints: np.ndarray    # uint64 (documents, …)
    in_val: np.ndarray          # bool (documents,)
    origins: list
    heads: list                 # beginnings of the documents
    blank: int                  # documents without anything but space
    short: int                  # others with less than SHORT characters
    all_chars: int              # of the chunk
    all_bytes: int              # in UTF-8
    kinds: dict                 # kind of file: [documents, characters]
    classes: np.ndarray         # int64 (CLASSES,): how many characters of each class
    odd: dict                   # name: OddCount
    long_lines: LongLines
    excerpts: list              # of Passage
    line_hashes: np.ndarray
    line_counts: np.ndarray
    skipped: Skipped


class Look(NamedTuple):
    """A chunk to look at."""
    chunk: Any
    fingerprints: str  # of which duplicates: 'exact' or 'near'


def survey_chunk(work, look):
    """The ChunkSurvey of a Look, for WorkerPool.map(). work: has reading and splitting."""
    documents, skipped = look.chunk.documents(work.reading)
    texts = [document.text for document in documents]
    firsts = [document for document in documents if document.begins]
    first_texts = [document.text for document in firsts]
    keys = np.array([key_of(document) for document in firsts], np.uint64)
    in_val = [(document.split or work.splitting.split_of(document)) == 'val'
              for document in firsts]
    blank, short = _blank_and_short(firsts)
    classes, odd = _characters(texts, documents)
    hashes, counts = line_counts(texts)
    return ChunkSurvey(
        extent=documents[0].extent if documents else None,
        chars=np.array([document.chars for document in firsts], np.int64),
        fingerprints=fingerprints_of(look.fingerprints, first_texts, keys),
        in_val=np.array(in_val, bool),
        origins=[document.origin for document in firsts],
        heads=[text[:HEAD_CHARS] for text in first_texts],
        blank=blank,
        short=short,
        all_chars=sum(map(len, texts)),
        all_bytes=sum(map(utf8_length, texts)),
        kinds=_kinds(documents),
        classes=classes,
        odd=odd,
        long_lines=_long_lines(documents),
        excerpts=_excerpts(documents),
        line_hashes=hashes,
        line_counts=counts,
        skipped=skipped)


def _blank_and_short(documents):
    """How many documents are nothing but space, and how many others are short."""
    blank, short = 0, 0
    for document in documents:
        is_piece = document.extent is not None
        if not is_piece and not document.text.strip():
            blank += 1
        elif document.chars < SHORT:
            short += 1
    return blank, short


def kind_of_file(origin):
    """What kind of file an origin names: the end of its name, without a compression's."""
    path = re.sub(r'^record \d+ of ', '', origin)
    return suffix_of(path) or 'without extension'


def _kinds(documents):
    kinds = {}
    for document in documents:
        counts = kinds.setdefault(kind_of_file(document.origin), [0, 0])
        counts[0] += int(document.begins)
        counts[1] += len(document.text)
    return kinds


def _characters(texts, documents):
    """Counts the characters of each class, and those that are odd: an array, {name: OddCount}."""
    classes = class_table()[code_points(''.join(texts))]
    counts = np.bincount(classes, minlength=CLASSES)
    ends = np.cumsum([len(text) for text in texts])
    odd = {}
    for number, name in enumerate(ODD, start=FIRST_ODD):
        if counts[number] > 0:
            places = np.flatnonzero(classes == number)
            rows = np.unique(np.searchsorted(ends, places, side='right'))
            odd[name] = OddCount(len(places), len(rows), documents[rows[0]].origin)

    found = {}
    for row, text in enumerate(texts):
        number = 0 if text.isascii() else len(MOJIBAKE_PATTERN.findall(text))
        if number > 0:
            found[row] = number
    if found:
        first = documents[min(found)].origin
        odd[MOJIBAKE] = OddCount(sum(found.values()), len(found), first)
    return counts, odd


def _long_lines(documents):
    """The LongLines of a chunk."""
    passages = []
    long_chars = 0
    first, last = None, None
    for document in documents:
        lines = document.text.split('\n')
        if document.extent is not None:
            # LargeDocument joins what the ends of the piece have cut.
            first = _passage(lines[0], document.origin)
            if len(lines) > 1:
                last = _passage(lines[-1], document.origin)
            lines = lines[1:-1]
        longest = max(lines, key=len, default='')
        passages.append(_passage(longest, document.origin))
        if len(longest) > LONG_LINE:
            long_chars += sum(len(line) for line in lines if len(line) > LONG_LINE)
    return LongLines(heapq.nlargest(EXTREMES, passages), long_chars, first, last)


def _passage(line, origin):
    return Passage(len(line), origin, line[:HEAD_CHARS])


def _excerpts(documents):
    """The excerpts of a chunk with the smallest ranks, which are as good as random."""
    chosen = {}
    for document in documents:
        if document.text.strip():
            # The lowest keys are those of val, and the pieces of a document share one.
            first_char = document.extent.first_char if document.extent else 0
            rank = hash_of(f'{key_of(document)} {first_char}')
            chosen.setdefault(rank, document)
    excerpts = []
    for rank, document in heapq.nsmallest(EXCERPTS, chosen.items(), key=lambda item: item[0]):
        excerpts.append(Passage(rank, document.origin, _excerpt(document.text, rank)))
    return excerpts


def _excerpt(text, rank):
    """EXCERPT_CHARS characters from a place that the rank decides, from a line's start if near."""
    start = rank % max(len(text) - EXCERPT_CHARS, 1)
    line_start = text.rfind('\n', max(start - HEAD_CHARS, 0), start) + 1
    if line_start > 0:
        start = line_start
    return text[start:start + EXCERPT_CHARS]
