"""
What a worker makes of a chunk of a corpus: its tokens, and what has to be known of its documents.
"""
import functools
import itertools
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from plaingpt.corpus.chat_documents import encode_chats
from plaingpt.corpus.chunks import FORMAT
from plaingpt.corpus.documents import Reading, Skipped
from plaingpt.corpus.duplicates import fingerprints_of, method_of
from plaingpt.corpus.splitting import Splitting, key_of
from plaingpt.system.messages import UserError, explained
from plaingpt.text.token_bytes import utf8_length
from plaingpt.text.token_files import pack
from plaingpt.text.tokenizers import load_tokenizer


@dataclass
class Work:
    """What a worker has to know."""
    reading: Reading
    splitting: Splitting
    tokenizer_meta: dict | None = None  # of a tokenizer; None where none is needed yet
    dedup: str = 'none'                 # 'none', 'exact' or 'near'

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.tokenizer_meta)

    def identity(self):
        """What decides the tokens, besides the tokenizer, as a value for JSON."""
        return [FORMAT, asdict(self.reading), list(self.splitting), self.dedup,
                method_of(self.fingerprint)]

    @property
    def fingerprint(self):
        """The kind of fingerprints by which repeated documents are found.

        Without dedup they are counted all the same, which costs little if they are equal."""
        return 'exact' if self.dedup == 'none' else self.dedup


class Tokenized(NamedTuple):
    """The tokens of a chunk, in the order of its documents, and what is known of each document."""
    ids: np.ndarray                     # (tokens,), in the type that they have on disk
    mask: np.ndarray | None             # of a chat: uint8 (tokens,), 1 where there is a loss
    part_document: np.ndarray           # (parts,): the document that a part belongs to
    part_in_val: np.ndarray             # bool (parts,)
    part_is_end: np.ndarray             # bool (parts,): the document has no more in this split
    part_tokens: np.ndarray             # (parts,): number of tokens
    begins: np.ndarray                  # bool (documents,): not the later piece of a large one
    chars: np.ndarray                   # (documents,), of a piece those of the whole document
    bytes: np.ndarray                   # (documents,), in UTF-8
    fingerprints: np.ndarray            # uint64 (documents that begin here, …)
    skipped: Skipped


def tokenize(work, chunk):
    """The Tokenized of a chunk, for WorkerPool.map()."""
    documents, skipped = chunk.documents(work.reading)
    parts = []
    part_document = []
    for number, document in enumerate(documents):
        for part in work.splitting.parts(document):
            parts.append(part)
            part_document.append(number)
    masks = []
    if work.reading.chat:
        pieces, masks = _encode_chats(work, documents)
    else:
        pieces = _encode_texts(work, documents, parts, part_document)

    begins = [document.begins for document in documents]
    firsts = list(itertools.compress(documents, begins))
    keys = np.array([key_of(document) for document in firsts], dtype=np.uint64)
    fingerprints = fingerprints_of(work.fingerprint, [document.text for document in firsts], keys)
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
    return Tokenized(
        ids=pack(ids, work.tokenizer.vocab_size),
        mask=np.concatenate(masks) if masks else None,
        part_document=np.array(part_document, dtype=np.int64),
        part_in_val=np.array([part.split == 'val' for part in parts], dtype=bool),
        part_is_end=np.array([part.is_end for part in parts], dtype=bool),
        part_tokens=np.array([len(piece) for piece in pieces], dtype=np.int64),
        begins=np.array(begins, dtype=bool),
        chars=np.array([document.chars for document in documents], dtype=np.int64),
        bytes=np.array([utf8_length(document.text) for document in documents], dtype=np.int64),
        fingerprints=fingerprints,
        skipped=skipped)


def _encode_texts(work, documents, parts, part_document):
    """The ids of each part, with the end of text where one is due."""
    texts = [part.text for part in parts]
    try:
        pieces = work.tokenizer.encode_corpus(texts)
    except UserError:
        pieces = [_encode_alone(work, documents[number], text)
                  for number, text in zip(part_document, texts, strict=True)]
    if work.tokenizer.end_of_text is None:
        return pieces
    end = np.array([work.tokenizer.end_of_text], np.uint32)
    ended = []
    for piece, part in zip(pieces, parts, strict=True):
        ended.append(np.concatenate([piece, end]) if part.is_end else piece)
    return ended


def _encode_alone(work, document, text):
    """The ids of a text. UserError names the document."""
    with explained(UserError, prefix=f'{document.origin}: '):
        ids, = work.tokenizer.encode_corpus([text])
    return ids


def _encode_chats(work, documents):
    """The ids and the masks of chats, each of which is a part of its own."""
    conversations = [document.messages for document in documents]
    origins = [document.origin for document in documents]
    pieces = []
    masks = []
    for ids, mask in encode_chats(work.tokenizer, conversations, origins):
        pieces.append(ids)
        masks.append(mask)
    return pieces, masks
