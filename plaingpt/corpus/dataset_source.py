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
        self.splits_itself = True
        self.total = sum(len(dataset) for dataset in splits.values())  # of documents
        # Shuffled splits share one table, which has all documents.
        self.size = max(dataset.data.nbytes for dataset in splits.values())

    def chunks(self, first=START):
        """Yields the chunks from a Place on, whose file is the number of a split."""
        documents_per_chunk = max(1, CHUNK_BYTES * self.total // (self.size + 1))
        done = 0  # documents in the splits so far
        for number, (split, dataset) in enumerate(self.splits.items()):
            if number < first.file:
                done += len(dataset)
                continue
            begin = first.chunk * documents_per_chunk if number == first.file else 0
            for start in range(begin, len(dataset), documents_per_chunk):
                texts = dataset[start:start + documents_per_chunk][self.text_column]
                following = Place(number, start // documents_per_chunk + 1)
                bytes_read = self.size * (done + start + len(texts)) // self.total
                yield Texts(texts, split, start, following, bytes_read)
            done += len(dataset)


class Texts(NamedTuple):
    """Texts of one split, a chunk as in chunks.py."""
    texts: list
    split: str
    first: int         # number of the first one in its split
    next_place: Place
    bytes_read: int    # in proportion to the documents

    def documents(self, reading):
        """Returns a list of Documents, and nothing Skipped. A null is an empty document."""
        documents = []
        for number, text in enumerate(self.texts, start=self.first):
            documents.append(Document(text or '', f'document {number} of {self.split}',
                                      split=self.split))
        return documents, Skipped()
