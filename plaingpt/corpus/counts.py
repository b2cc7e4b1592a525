"""
Counts what a preparation has read, left out and written.
"""
from dataclasses import asdict, dataclass, field

import numpy as np

from plaingpt.corpus.documents import Skipped
from plaingpt.corpus.lengths import Lengths
from plaingpt.system.messages import counted
from plaingpt.text.data_sets import SPLITS


def _none_yet():
    return dict.fromkeys(SPLITS, 0)


@dataclass
class Counts:
    """Counts of documents, text and tokens; a document is one that is used, unless said."""
    documents: dict = field(default_factory=_none_yet)  # with text in a split
    tokens: dict = field(default_factory=_none_yet)
    learned: int = 0                                    # of a chat: tokens that have a loss
    bytes: int = 0                                      # of text, in UTF-8
    duplicates: int = 0                                 # documents that repeat an earlier one
    lengths: Lengths = field(default_factory=Lengths)   # of the documents, in characters
    skipped: Skipped = field(default_factory=Skipped)

    def add(self, tokenized, is_kept):
        """Counts a Tokenized, of whose documents those are used for which is_kept is true."""
        self.lengths.add(tokenized.chars[tokenized.begins & is_kept])
        self.bytes += int(tokenized.bytes[is_kept].sum())
        self.skipped.merge(tokenized.skipped)
        part_is_kept = is_kept[tokenized.part_document]
        for split in SPLITS:
            parts = part_is_kept & (tokenized.part_in_val == (split == 'val'))
            self.tokens[split] += int(tokenized.part_tokens[parts].sum())
            self.documents[split] += int(np.count_nonzero(parts & tokenized.part_is_end))
        if tokenized.mask is not None:
            of_tokens = np.repeat(part_is_kept, tokenized.part_tokens)
            self.learned += int(tokenized.mask[of_tokens].sum())

    def to_json(self):
        """A dict for JSON, from which from_json() makes equal Counts."""
        return {**vars(self), 'lengths': self.lengths.to_json(), 'skipped': asdict(self.skipped)}

    @classmethod
    def from_json(cls, saved):
        """The Counts that to_json() described."""
        return cls(**{**saved, 'lengths': Lengths.from_json(saved['lengths']),
                      'skipped': Skipped(**saved['skipped'])})

    def describe(self, dedup, names_flags=True):
        """Lines for people: what was read, left out and written.

        dedup: as in Work. names_flags: whether advice names flags of data/prepare.py."""
        lines = [f'documents  {self._documents_and_lengths()}']
        for reason, count in sorted(self.skipped.counts.items()):
            lines.append(f'left out   {count:,}: {reason}, such as '
                         f'{self.skipped.examples[reason]}')
        if self.lengths.documents == 0:
            return lines
        if self.duplicates and dedup == 'none':
            verb = 'equals' if self.duplicates == 1 else 'equal'
            remedy = ': --dedup=exact drops repetitions' if names_flags else ''
            lines.append(f'repeated   {self.duplicates:,} {verb} an earlier one{remedy}')
        elif self.duplicates:
            verb = 'repeats' if self.duplicates == 1 else 'repeat'
            lines.append(f'dropped    {self.duplicates:,} that {verb} an earlier one')
        tokens = sum(self.tokens.values())
        size = f'text       {self.bytes / 1e6:,.1f} MB, {tokens:,} tokens'
        if self.learned:
            size += f', {self.learned:,} of them in replies, which are learned'
        else:
            size += f', {self.bytes / max(tokens, 1):.2f} bytes a token'
        lines.append(size)
        for split in SPLITS:
            share = self.tokens[split] / max(tokens, 1)
            lines.append(f'{split:<11}{self.tokens[split]:,} tokens ({share:.1%}) of '
                         f'{counted(self.documents[split], "document")}')
        return lines

    def _documents_and_lengths(self):
        lengths = self.lengths
        if lengths.documents == 0:
            return '0'
        if lengths.documents == 1:
            return f'1, with {counted(lengths.largest, "character")}'
        if lengths.smallest == lengths.largest:
            return f'{lengths.documents:,}, with {counted(lengths.largest, "character")} each'
        return (f'{lengths.documents:,}, with {lengths.smallest:,} to {lengths.largest:,} '
                f'characters, {lengths.quantile(0.5):,} in the median')
