"""
Groups of documents that repeat each other: how large they are, where they stand, and whether they
are in both splits.
"""
import bisect
import zlib

import numpy as np

from plaingpt.corpus.duplicates import FirstOccurrences

MAX_EXAMPLES = 20_000  # of groups; beyond it, the examples of the smaller half are dropped
SHOWN = 5              # the largest groups, and documents of val that are in train, too


class Groups:
    """The documents of a corpus in groups: a new one, and all that repeat it.

    kind: 'exact' or 'near'. Memory, besides that of FirstOccurrences: 24 bytes a group, and its
    compressed origin."""

    def __init__(self, kind):
        self.occurrences = FirstOccurrences(kind)
        self.documents = 0
        self.sizes = _Counts()
        self.in_train = _Counts()  # those that the preparation keeps
        self.in_val = _Counts()
        self.origins = _Origins()  # of the new document of each group
        self.examples = {}         # number of a group: (origin of a repetition, its beginning)

    def place(self, fingerprints):
        """Places the next documents. Returns the number of each one's group, and who is new."""
        before = self.occurrences.documents
        numbers = self.occurrences.groups(fingerprints)
        is_new = np.zeros(len(numbers), bool)
        different, firsts = np.unique(numbers, return_index=True)
        is_new[firsts[different >= before]] = True
        return numbers, is_new

    def count(self, numbers, is_new, is_kept, in_val, origins, heads):
        """Counts documents that place() has placed.

        is_kept: whether the preparation uses each one. in_val: whether it is in val.
        origins, heads: where each stands, and how it begins."""
        self.documents += len(numbers)
        self.sizes.add(numbers)
        self.in_train.add(numbers[is_kept & ~in_val])
        self.in_val.add(numbers[is_kept & in_val])
        self.origins.append([origins[row] for row in np.flatnonzero(is_new)])
        for row in np.flatnonzero(~is_new):
            self.examples.setdefault(int(numbers[row]), (origins[row], heads[row]))
        if len(self.examples) > MAX_EXAMPLES:
            # A group whose example is dropped gets another one with its next document.
            by_size = sorted(self.examples, key=lambda number: -self.sizes.of(number))
            self.examples = {number: self.examples[number]
                             for number in by_size[:MAX_EXAMPLES // 2]}

    def summary(self):
        """What the report says of repetitions: a dict for JSON."""
        repeated = self.documents - self.occurrences.documents
        by_size = sorted(self.examples, key=lambda number: (-self.sizes.of(number), number))
        groups = []
        for number in by_size[:SHOWN]:
            another, head = self.examples[number]
            groups.append({'documents': self.sizes.of(number),
                           'origins': [self.origins[number], another], 'text': head})
        return {'documents': self.documents, 'repeated': repeated,
                'share': repeated / max(self.documents, 1), 'largest_groups': groups}

    def in_both_splits(self):
        """Which documents of val repeat one of train, or are repeated there: a dict for JSON."""
        in_train, in_val = self.in_train.array, self.in_val.array
        counted_in_both = min(len(in_train), len(in_val))  # later groups are in one split at most
        groups = np.flatnonzero((in_train[:counted_in_both] > 0) & (in_val[:counted_in_both] > 0))
        documents = int(in_val.sum())
        in_both = int(in_val[groups].sum())
        return {'val_documents': documents, 'also_in_train': in_both,
                'share': in_both / max(documents, 1),
                'examples': [self.origins[number] for number in groups[:SHOWN].tolist()]}


class _Counts:
    """A count for each group; those of new groups begin at 0."""

    def __init__(self):
        self.array = np.zeros(1024, np.int64)

    def add(self, numbers):
        """Adds 1 to the count of each group, as often as its number occurs."""
        if len(numbers) == 0:
            return
        missing = int(numbers.max()) + 1 - len(self.array)
        if missing > 0:
            more = max(missing, len(self.array) // 2)
            self.array = np.concatenate([self.array, np.zeros(more, np.int64)])
        np.add.at(self.array, numbers, 1)

    def of(self, number):
        return int(self.array[number])


class _Origins:
    """A list of texts in little memory: it is compressed, in blocks as they were appended."""

    def __init__(self):
        self.begins = []
        self.blocks = []
        self.count = 0

    def append(self, origins):
        if not origins:
            return
        text = '\0'.join(origins)  # which no path contains
        self.begins.append(self.count)
        self.blocks.append(zlib.compress(text.encode('utf-8', 'surrogatepass'), level=1))
        self.count += len(origins)

    def __getitem__(self, number):
        block = bisect.bisect_right(self.begins, number) - 1
        text = zlib.decompress(self.blocks[block]).decode('utf-8', 'surrogatepass')
        return text.split('\0')[number - self.begins[block]]
