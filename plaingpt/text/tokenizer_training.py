"""
Makes byte-level tokenizers: byte-pair encoding that is trained on a text, and bare bytes.

The first 256 ids are the bytes, each with its own value. The merges follow in the order in which
they were found, and special tokens come last.
"""
import contextlib
import json
import os
import re
import sys

from plaingpt.system.messages import UserError
from plaingpt.text.fast_encoding import import_gigatoken, utf8_of
from plaingpt.text.tokenizer_json import END_OF_TEXT, HuggingFaceTokenizer
from plaingpt.text.tokenizer_layout import (BYTE_CHARACTERS, BYTE_LEVEL, added_token,
                                            byte_level_content, written_bytes)

SEPARATOR = b'\xff'  # between documents: a byte that no text in UTF-8 has

# Training takes quadratic time in the length of a word: a million letters in a row, as in DNA, take
# 20 seconds. So text without white space is cut after so many characters.
LONGEST_RUN = 10_000
LONG_RUN = re.compile(rf'(?<!\S)\S{{{LONGEST_RUN},}}')


def byte_tokenizer():
    """A HuggingFaceTokenizer with a token for each byte, and END_OF_TEXT."""
    return _tokenizer([], [END_OF_TEXT])


def train_tokenizer(texts, vocab_size, special_tokens=(END_OF_TEXT,)):
    """Trains byte-level byte-pair encoding. Returns a HuggingFaceTokenizer.

    texts: iterable of str. Words are split as GPT-2's, so no token has parts of two words, and
        none has parts of two texts.
    vocab_size: number of tokens, with the 256 bytes and the special tokens; at least one more.
    special_tokens: the first one begins and ends a text.

    The merges are those that the package tokenizers finds (a test compares them); gigatoken takes
    an eighth of its time. UserError if the texts are too short for so many tokens."""
    pieces = []
    for text in texts:
        pieces += _pieces_of(text)
    wanted = vocab_size - 256 - len(special_tokens)
    merges = _train(SEPARATOR.join(pieces), wanted)
    tokenizer = _tokenizer(merges, special_tokens)

    # Where no two tokens are neighbours any more, gigatoken goes on with merges that no text needs.
    # The last one of use makes a token that no later merge takes away, so it is in the pieces.
    found = 0
    for piece in pieces:  # one by one, so that the ids of just one are in memory
        ids, = tokenizer.encode_corpus([piece.decode('utf-8')])
        if len(ids) > 0:
            found = max(found, int(ids.max()) - 255)
    if found < wanted:
        size = sum(len(piece) for piece in pieces)
        works = 256 + found + len(special_tokens)
        remedy = f'use bpe:{works} or fewer, or more text'
        if found == 0:
            remedy = 'use byte, or more text'
        raise UserError(f'{size:,} bytes of text are too few for {vocab_size:,} tokens, because '
                        f'they give {found:,} merges, where {wanted:,} are needed: {remedy}')
    return tokenizer


def _pieces_of(text):
    """The text in UTF-8, as a list of one piece, or of more where a run of characters is long."""
    pieces = []
    begin = 0
    for run in LONG_RUN.finditer(text):
        for end in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            pieces.append(utf8_of(text[begin:end]))
            begin = end
    pieces.append(utf8_of(text[begin:]))
    return pieces


def _train(data, merges):
    """So many merges, or fewer, of the texts in data: a list of (left, right), each bytes."""
    gigatoken = import_gigatoken()
    with _silence():
        _, found = gigatoken.train_bpe(data, 256 + merges, [], separator=SEPARATOR)
    distinct = {}  # {token: (left, right)}
    for left, right in found:
        if left + right in distinct:
            break  # it makes a token once more, which only a merge without use does
        distinct[left + right] = (left, right)
    return list(distinct.values())


def _tokenizer(merges, special_tokens):
    """The HuggingFaceTokenizer of 256 bytes, these merges, and these special tokens."""
    vocab = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    pairs = []
    for left, right in merges:
        vocab[written_bytes(left + right)] = len(vocab)
        pairs.append((written_bytes(left), written_bytes(right)))
    added = []
    for token in special_tokens:
        added.append(added_token(token, len(vocab), special=True))
        vocab[token] = len(vocab)
    content = byte_level_content(vocab, pairs, added, BYTE_LEVEL)
    text = json.dumps(content, ensure_ascii=False, separators=(',', ':'))
    return HuggingFaceTokenizer(text, special_tokens[0], special_tokens[0])


@contextlib.contextmanager
def _silence():
    """Sends what this process prints to nowhere, also from Rust, which writes to its own files."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, or closed
            stream.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = {}  # {descriptor: copy}
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if descriptor != nowhere:
                kept[descriptor] = os.dup(descriptor)
    try:
        for descriptor in kept:
            os.dup2(nowhere, descriptor)
        yield
    finally:
        os.close(nowhere)
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
