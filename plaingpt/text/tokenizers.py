"""
Tokenizers turn text into ids and back: by character, with the vocabulary of GPT-2, or with that of
another model.

A tokenizer is stored as a small dict, in meta.json beside the token files and in checkpoints:

    {'kind': 'char', 'chars': [...]}              one id a character
    {'kind': 'gpt2'}                              GPT-2's byte-pair encoding
    {'kind': 'tiktoken', 'name': 'cl100k_base'}   another of tiktoken's encodings
    {'kind': 'tokenizer.json', 'json': '...'}     the text of a Hugging Face tokenizer.json

The last kind may also have 'bos' and 'eos', the tokens that begin and end a text, and
'chat_template', the Jinja template of a chat; each is text, or None.

load_tokenizer() makes the object from the dict (see tiktoken_encodings.py and tokenizer_json.py),
and the object's to_meta() returns the dict. All have encode(text), encode_corpus(texts) for many
texts in which nothing is special, decode(ids), decoder() for text that arrives token by token,
vocab_size (all ids are below it), and end_of_text (an id, or None).
"""
import functools
import sys

import numpy as np

from plaingpt.system.messages import UserError, counted
from plaingpt.text.tiktoken_encodings import (ENCODINGS, GPT2_VOCAB_SIZE, GPT2Tokenizer,
                                              TiktokenTokenizer)
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer, describe_tokenizer_json

__all__ = ['GPT2_VOCAB_SIZE', 'CharTokenizer', 'GPT2Tokenizer', 'load_tokenizer',
           'same_vocabulary']

UNKNOWN = 2 ** 32 - 1  # stands where a character has no id


def load_tokenizer(meta):
    """The tokenizer that a tokenizer dict describes. UserError if its kind is unknown."""
    kind = meta.get('kind')
    if kind == 'gpt2':
        return GPT2Tokenizer()
    name = meta.get('name')
    if kind == 'tiktoken' and isinstance(name, str) and name in ENCODINGS:
        return GPT2Tokenizer() if name == 'gpt2' else TiktokenTokenizer(name)
    if kind == 'char' and _are_chars(meta.get('chars')):
        return CharTokenizer(meta['chars'])
    if kind == 'tokenizer.json' and isinstance(meta.get('json'), str):
        bos = _text_or_none(meta, 'bos')
        eos = _text_or_none(meta, 'eos')
        chat_template = _text_or_none(meta, 'chat_template')
        return HuggingFaceTokenizer(meta['json'], bos, eos, chat_template)
    raise UserError(f'the tokenizer is incomplete or has an unknown kind, {repr(kind)[:99]}: this '
                    "program knows 'char' with its chars, 'gpt2', 'tiktoken' with the name "
                    f"{' or '.join(ENCODINGS)}, and 'tokenizer.json' with its json")


def same_vocabulary(meta, other):
    """Whether two tokenizer dicts give the same ids to every text.

    Which tokens begin and end a text does not matter, nor does the chat template. UserError if one
    of them is damaged."""
    return meta == other or _vocabulary(meta) == _vocabulary(other)


def _vocabulary(meta):
    """A tokenizer dict without bos, eos and chat template.

    A tokenizer.json with the vocabulary of one of tiktoken's encodings becomes the dict of that
    encoding."""
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

    def __reduce__(self):  # the table of code points, 4 MB, is made again in another process
        return CharTokenizer, (self.chars,)

    @classmethod
    def from_text(cls, text):
        """A tokenizer for the characters that occur in text, sorted by code point."""
        return cls(sorted(set(text)))

    def encode(self, text):
        """list of int ids. UserError names the first character that is not in the set."""
        ids, = self.encode_corpus([text])
        return ids.tolist()

    def encode_corpus(self, texts):
        """Encodes texts: a list with a uint32 array for each. UserError as from encode()."""
        encoded = []
        for text in texts:
            code_points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
            ids = self._ids_of_code_points[code_points]
            unknown = np.flatnonzero(ids == UNKNOWN)
            if len(unknown) > 0:
                raise self._refusal(text[unknown[0]])
            encoded.append(ids)
        return encoded

    @functools.cached_property
    def _ids_of_code_points(self):
        """The id of each code point, UNKNOWN for all but the set: uint32 (1114112,)."""
        table = np.full(sys.maxunicode + 1, UNKNOWN, np.uint32)
        for char, token_id in self.ids.items():
            table[ord(char)] = token_id
        return table

    def _refusal(self, char):
        known = ''.join(self.chars)
        if len(known) > 200:
            known = known[:200] + '…'
        return UserError(f'the character {char!r} (U+{ord(char):04X}) is not in this vocabulary of '
                         f'{counted(self.vocab_size, "character")}, {known!r}: remove it from the '
                         'text, or use a tokenizer that has it')

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids)

    def decoder(self):
        """A function that turns the next ids of a text, a list, into the next characters."""
        return self.decode

    def to_meta(self):
        return {'kind': 'char', 'chars': self.chars}
