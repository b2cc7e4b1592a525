"""
A data set of Hugging Face's package datasets as the source of a corpus.
"""
from typing import NamedTuple

from plaingpt.corpus.chunks import CHUNK_BYTES, START, Place
from plaingpt.corpus.documents import Document, Skipped


class DatasetSource:
    """The documents of datasets.Datasets, one for each split.

    splits: {'train': Dataset, 'val': Dataset}, memory-mapped. text_column: the one with the texts.
    identity: what tells that the documents are the same as in an earlier run, a value for JSON."""

    def __init__(self, splits, text_column, identity):
        self.splits = splits
        self.text_column = text_column
        self.identity = identity
        self.skipped = Skipped()
        self.documents = sum(len(documents) for documents in splits.values())
        # Shuffled splits share one table, which has all documents.
        self.size = max(documents.data.nbytes for documents in splits.values())

    def chunks(self, first=START):
        """Yields the chunks from a Place on, whose file is the number of a split."""
        documents_per_chunk = max(1, CHUNK_BYTES * self.documents // (self.size + 1))
        done = sum(len(documents) for documents in list(self.splits.values())[:first.file])
        for number, (split, documents) in enumerate(self.splits.items()):
            begin = first.chunk * documents_per_chunk if number == first.file else 0
            if number < first.file:
                continue
            for start in range(begin, len(documents), documents_per_chunk):
                texts = documents[start:start + documents_per_chunk][self.text_column]
                following = Place(number, start // documents_per_chunk + 1)
                read = done + start + len(texts)
                yield Texts(texts, split, start, following, self.size * read // self.documents)
            done += len(documents)


class Texts(NamedTuple):
    """Texts of one split, a chunk as in chunks.py."""
    texts: list
    split: str
    first: int    # number of the first one in its split
    next: Place
    end: int      # in proportion to the documents

    def documents(self, reading):
        """Returns a list of Documents, and nothing Skipped. A null is an empty document."""
        documents = []
        for number, text in enumerate(self.texts, start=self.first):
            documents.append(Document(text or '', f'document {number} of {self.split}',
                                      split=self.split))
        return documents, Skipped()
