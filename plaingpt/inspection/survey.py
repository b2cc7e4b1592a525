"""
Looks at all documents of a corpus: workers look at its chunks, and a Survey adds up what they saw.
"""
import heapq
import sys

import numpy as np

from plaingpt.corpus.documents import Skipped
from plaingpt.corpus.duplicates import can_find
from plaingpt.corpus.lengths import Lengths
from plaingpt.corpus.progress import Progress
from plaingpt.inspection.characters import CLASSES, FIRST_ODD, FIRST_SCRIPT, SCRIPT_NAMES
from plaingpt.inspection.chunk_survey import (EXCERPTS, EXTREMES, HEAD_CHARS, Look, OddCount,
                                              Passage, survey_chunk)
from plaingpt.inspection.document_groups import Groups
from plaingpt.inspection.large_document import LargeDocument
from plaingpt.inspection.repeated_lines import LineCounts, find_lines

# Near duplicates are looked for among so many documents, which takes up to 0.7 GB of memory. A
# preparation with dedup='near' has remembered all documents, so then its report does, too.
MAX_NEAR_DOCUMENTS = 2_000_000

FREQUENT_LINES = 15
MIN_REPEATS = 10        # documents with a line, for it to count as repeated
MIN_REPEAT_SHARE = 0.01

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


class Survey:
    """What is in a corpus, added up from its chunks in their order.

    dedup: how the preparation treats duplicates, 'none', 'exact' or 'near'."""

    def __init__(self, dedup):
        self.dedup = dedup
        self.lengths = Lengths()
        self.exact = Groups('exact')
        self.near = Groups('near') if can_find('near') else None
        self.near_alone = 0           # documents that repeat another one nearly, but not exactly
        self.large = None             # the LargeDocument whose pieces came last
        self.blank = 0
        self.short = 0                # and not blank
        self.chars = 0
        self.bytes = 0
        self.kinds = {}
        self.classes = np.zeros(CLASSES, np.int64)
        self.odd = {}
        self.longest_lines = []
        self.long_line_chars = 0
        self.longest_documents = []   # of Passage
        self.shortest_documents = []
        self.excerpts = {}            # rank: Passage
        self.line_counts = LineCounts()
        self.repeated_lines = []      # dicts for JSON
        self.skipped = Skipped()

    def looks(self, source):
        """Yields a Look at each chunk of a source."""
        for chunk in source.chunks():
            yield Look(chunk, 'near' if self._room_for_near() > 0 else 'exact')

    def _room_for_near(self):
        """Among how many documents more near duplicates are looked for."""
        if self.near is None:
            return 0
        if self.dedup == 'near':
            return sys.maxsize
        return MAX_NEAR_DOCUMENTS - self.near.documents

    def add(self, chunk):
        """Adds the next ChunkSurvey."""
        if chunk.extent is not None:
            chunk = self._new_in_piece(chunk)
        self.lengths.add(chunk.chars)
        self._add_documents(chunk)
        self.blank += chunk.blank
        self.short += chunk.short
        self.chars += chunk.all_chars
        self.bytes += chunk.all_bytes
        for kind, (documents, chars) in chunk.kinds.items():
            counts = self.kinds.setdefault(kind, [0, 0])
            counts[0] += documents
            counts[1] += chars
        self.classes += chunk.classes
        for name, more in chunk.odd.items():
            before = self.odd.get(name, OddCount(0, 0, more.example))
            self.odd[name] = OddCount(before.characters + more.characters,
                                      before.documents + more.documents, before.example)
        lines = chunk.long_lines
        self.longest_lines = heapq.nlargest(EXTREMES, self.longest_lines + lines.longest)
        self.long_line_chars += lines.chars
        for excerpt in chunk.excerpts:
            self.excerpts.setdefault(excerpt.rank, excerpt)
        smallest = heapq.nsmallest(EXCERPTS, self.excerpts)
        self.excerpts = {rank: self.excerpts[rank] for rank in smallest}
        self.line_counts.add(chunk.line_hashes, chunk.line_counts)
        self.skipped.merge(chunk.skipped)

    def _new_in_piece(self, chunk):
        """The ChunkSurvey of a piece, without what its document has been counted for already."""
        if chunk.extent.first_char == 0:
            self.large = LargeDocument(chunk.origins[0])
        was_full = self.large.is_full
        chunk = self.large.new_in(chunk)
        if self.large.is_full and not was_full:
            self.line_counts.max_missing += 1  # this document
        return chunk

    def _add_documents(self, chunk):
        """Adds what is counted for each document: duplicates, and the longest and shortest."""
        # Empty documents are counted as such, and not as repetitions of each other.
        rows = np.flatnonzero(chunk.chars > 0)
        fingerprints = chunk.fingerprints[rows]
        in_val = chunk.in_val[rows]
        origins = [chunk.origins[row] for row in rows]
        heads = [chunk.heads[row] for row in rows]

        numbers, is_new = self.exact.place(fingerprints[:, :1])
        compared = min(self._room_for_near(), len(rows))  # the first of them, for near duplicates
        near_numbers, near_is_new = None, None
        if compared > 0:
            near_numbers, near_is_new = self.near.place(fingerprints[:compared])
            self.near_alone += int(np.count_nonzero(is_new[:compared] & ~near_is_new))
        is_kept = np.ones(len(rows), bool)
        if self.dedup == 'exact':
            is_kept = is_new
        elif self.dedup == 'near' and compared > 0:
            is_kept = near_is_new
        self.exact.count(numbers, is_new, is_kept, in_val, origins, heads)
        if compared > 0:
            self.near.count(near_numbers, near_is_new, is_kept[:compared], in_val[:compared],
                            origins[:compared], heads[:compared])

        by_length = np.argsort(chunk.chars, kind='stable')
        chosen = {*by_length[:EXTREMES].tolist(), *by_length[-EXTREMES:].tolist()}
        passages = [Passage(int(chunk.chars[row]), chunk.origins[row], chunk.heads[row])
                    for row in sorted(chosen)]
        self.longest_documents = heapq.nlargest(EXTREMES, self.longest_documents + passages)
        self.shortest_documents = heapq.nsmallest(EXTREMES, self.shortest_documents + passages)

    def add_repeated_lines(self, pool, source):
        """Finds the lines that occur in many documents."""
        at_least = max(MIN_REPEATS, MIN_REPEAT_SHARE * self.lengths.documents)
        frequent = self.line_counts.most_frequent(FREQUENT_LINES, at_least)
        found = find_lines(pool, source, frequent.keys())
        for line_hash, documents in frequent.items():
            if line_hash not in found:
                continue  # the files have changed since the first reading
            line, origin = found[line_hash]
            self.repeated_lines.append({
                'documents': documents, 'share': documents / self.lengths.documents,
                'characters': documents * len(line), 'origin': origin, 'line': line[:HEAD_CHARS]})

    def facts(self, splits_documents):
        """What the report says of the documents: a dict for JSON.

        Each bar of lengths['histogram'] is [from, to before, documents].
        splits_documents: whether each document is in one split as a whole."""
        lengths = self.lengths
        quantiles = {f'{share:.0%}': lengths.quantile(share) for share in QUANTILES}
        return {
            'documents': lengths.documents,
            'characters': self.chars,
            'bytes': self.bytes,
            'lengths': {'mean': lengths.mean, 'smallest': lengths.smallest,
                        'largest': lengths.largest, 'quantiles': quantiles,
                        'histogram': lengths.bars()},
            'blank_documents': self.blank,
            'short_documents': self.short,
            'longest_documents': _listed(self.longest_documents),
            'shortest_documents': _listed(self.shortest_documents),
            'kinds_of_files': self._kinds(),
            'scripts': self._scripts(),
            'odd_characters': {name: count._asdict() for name, count in self.odd.items()},
            'exact_duplicates': self.exact.summary(),
            'near_duplicates': self._near_duplicates(),
            'exact_overlap': self.exact.in_both_splits() if splits_documents else None,
            'near_overlap': self.near.in_both_splits() if splits_documents and self.near else None,
            'longest_lines': _listed(self.longest_lines),
            'long_line_characters': self.long_line_chars,
            'repeated_lines': self.repeated_lines,
            'repeated_lines_may_lack': self.line_counts.max_missing,
            'skipped': {reason: {'documents': count, 'example': self.skipped.examples[reason]}
                        for reason, count in self.skipped.counts.items()},
            'excerpts': [{'origin': excerpt.origin, 'text': excerpt.text}
                         for _, excerpt in sorted(self.excerpts.items())],
        }

    def _near_duplicates(self):
        """What the report says of near duplicates: a dict for JSON, or None."""
        if self.near is None:
            return None
        # If not all documents were compared, those that were are the first ones.
        return {**self.near.summary(), 'not_exact': self.near_alone,
                'all_compared': self.near.documents == self.exact.documents}

    def _kinds(self):
        """Documents and characters of each kind of file, the largest first."""
        by_chars = sorted(self.kinds.items(), key=lambda item: -item[1][1])
        return [{'kind': kind, 'documents': documents, 'characters': chars}
                for kind, (documents, chars) in by_chars]

    def _scripts(self):
        """The share of each script among all letters, the largest first."""
        counts = self.classes[FIRST_SCRIPT:FIRST_ODD]
        letters = max(int(counts.sum()), 1)
        order = np.argsort(-counts, kind='stable')
        return [{'script': SCRIPT_NAMES[number], 'share': int(counts[number]) / letters}
                for number in order if counts[number] > 0]


def _listed(passages):
    return [{'characters': passage.rank, 'origin': passage.origin, 'text': passage.text}
            for passage in passages]


def take_survey(pool, source, dedup):
    """The Survey of a source.

    pool: a WorkerPool whose shared value has reading and splitting, such as a Work.
    dedup: how the preparation treats duplicates, 'none', 'exact' or 'near'."""
    survey = Survey(dedup)
    survey.skipped.merge(source.skipped)
    with Progress('looking', source.size) as progress:
        for look, result in pool.map(survey_chunk, survey.looks(source)):
            survey.add(result)
            progress.show(look.chunk.bytes_read)
    survey.add_repeated_lines(pool, source)
    return survey
