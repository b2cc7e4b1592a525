"""
Splitting a corpus into train and val, so that adding documents moves none between the splits.
"""
import hashlib
import json
from typing import NamedTuple

import numpy as np

HASH_BYTES = 8  # of blake2b


def hash_of(text):
    """A hash of a text, an int below 2**64, which is the same on every machine."""
    digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=HASH_BYTES)
    return int.from_bytes(digest.digest(), 'little')


def hashes_of(texts):
    """hash_of() each text: uint64 (len(texts),)."""
    return np.array([hash_of(text) for text in texts], dtype=np.uint64)


def key_of(document):
    """The hash of a Document, or of the whole of which it is a piece."""
    if document.extent is not None:
        return document.extent.key
    if document.messages is not None:
        # The text of two different chats may be the same.
        return hash_of(json.dumps([[message['role'], message['content']]
                                   for message in document.messages]))
    return hash_of(document.text)


class Part(NamedTuple):
    """What of a document goes to one split."""
    text: str
    split: str     # 'train' or 'val'
    is_end: bool   # whether the document ends with it, in that split


class Splitting(NamedTuple):
    """Which part of a corpus goes to val.

    by: 'document': the documents whose hash is in the lowest test_size of all hashes; 'tail': the
    last test_size of the characters of each document."""
    test_size: float
    by: str

    def parts(self, document):
        """The Parts of a Document, in order."""
        is_last = document.extent is None or document.extent.is_last
        if document.split is not None:
            return [Part(document.text, document.split, is_last)]
        if self.by == 'document':
            return [Part(document.text, self.split_of(document), is_last)]

        first, all_chars = 0, len(document.text)
        if document.extent is not None:
            first, all_chars = document.extent.first_char, document.extent.all_chars
        train_chars = int(all_chars * (1 - self.test_size))
        cut = max(0, train_chars - first)
        train = Part(document.text[:cut], 'train', first + len(document.text) >= train_chars)
        val = Part(document.text[cut:], 'val', is_last)
        return [part for part in (train, val) if part.text]

    def split_of(self, document):
        """'train' or 'val', by the hash of a Document."""
        return 'val' if key_of(document) < self.test_size * 2**64 else 'train'
