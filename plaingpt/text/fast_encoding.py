"""
Encodes whole corpora with the package gigatoken, which returns the ids of tiktoken and of the
package tokenizers in about a tenth of their time.

It is loaded without special tokens, so nothing in a text is special. Its Unicode tables are one
version ahead of the other packages'. That cuts words differently only next to characters that the
other packages don't know yet.
"""
import base64
import functools
import json
import os
import tempfile

import numpy as np

from plaingpt.system.messages import UserError

# Where tokenizers differ: kinds of spaces, line ends, digits, contractions, capitals, accents,
# characters of two to four bytes, and words that are long.
PROBE = (' Hello  world\n\n I\'LL we\'ve o\'clock\'s \t\r\n  x=1 12345 ½ ٣Ⅷ naïve e\u0301 ÀÉ ǅ ʰ '
         '日本語の、 🙂🙃 👩\u200d🚀\u00a0a\u3000b\u2028c\u0085 /* "#$" */ https://a.b/c?d=e_f '
         '<s>[INST]</s> aB CamelCase HTTPServer don’t ∑≠ \x00\x7f\ufeff' + ' ' * 40 + 'a' * 99
         + '\n   ')

RENEWAL_BYTES = 100_000_000


def utf8_of(text):
    """The UTF-8 bytes of a text. Half a surrogate pair becomes U+FFFD, as tiktoken has it."""
    try:
        return text.encode('utf-8')
    except UnicodeEncodeError:
        return whole_characters(text).encode('utf-8')


def whole_characters(text):
    """The text with U+FFFD in place of halves of surrogate pairs, which have no UTF-8 form."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


class FastEncoder:
    """Encodes texts in which nothing is special with a tokenizer of gigatoken, which load() makes.

    gigatoken keeps each word that it has seen. So it is loaded again, which takes 0.1 s for
    GPT-2's vocabulary, after every 100 MB of text, and before a text that would exceed them. 100 MB
    of random words, all different, take 0.6 to 0.8 GB, and up to 1 GB while a table grows. A text
    beyond 100 MB is encoded at once, and may take ten times its size."""

    def __init__(self, load):
        self.load = load
        self.tokenizer = load()
        self.seen = 0  # bytes

    def encode(self, texts):
        """The ids of each text, a list of uint32 arrays."""
        encoded = []
        for text in texts:  # one call for all of them would save a microsecond for each
            content = utf8_of(text)
            if self.seen > 0 and self.seen + len(content) > RENEWAL_BYTES:
                self.tokenizer = None  # the old one is gone before the new one needs memory
                self.tokenizer = self.load()
                self.seen = 0
            self.seen += len(content)
            encoded.append(self.tokenizer.encode(content))
        return encoded


# ---- loading ----

def import_gigatoken():
    """The package. UserError, with the command that installs it, if it is missing."""
    try:
        import gigatoken
    except ImportError:
        raise UserError('preparing a corpus needs the package gigatoken: '
                        'pip install gigatoken') from None
    return gigatoken


def rank_file(tokens):
    """The content of a file in tiktoken's format, for a list of tokens, each bytes.

    On each line stand a token in base64, and its id: its index in the list."""
    lines = [b'%s %d\n' % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    return b''.join(lines)


def encoder_for_ranks(tokens, words):
    """A FastEncoder for the tokens of one of tiktoken's encodings, a list of bytes.

    words: gigatoken's name for how words are split: 'gpt2', 'cl100k' or 'o200k'."""
    gigatoken = import_gigatoken()

    def load():
        with tempfile.TemporaryDirectory() as folder:  # it reads files only
            path = os.path.join(folder, 'tokens.tiktoken')
            with open(path, 'wb') as file:
                file.write(rank_file(tokens))
            return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=words, special_tokens={})

    return FastEncoder(load)


def encoder_for_json(content, special_tokens, encode):
    """A FastEncoder for the content of a tokenizer.json, or None.

    content: as from hide_names(), so that no text has a special token.
    special_tokens: the names of the special tokens, as they may stand in texts.
    encode: the function that turns a list of texts into a list with the ids of each.

    It is None unless the file holds byte-level byte-pair encoding of a kind that gigatoken knows,
    and both give the same ids to a text in which tokenizers differ."""
    gigatoken = import_gigatoken()
    is_byte_level = (content.get('decoder') or {}).get('type') == 'ByteLevel'
    if not is_byte_level or content['model'].get('type') != 'BPE':
        return None
    plain_tokens = []  # those that are part of a text, such as a tool's name or a run of spaces
    for token in content.get('added_tokens') or []:
        if not token.get('special'):
            plain_tokens.append(token)
    probe = PROBE
    for name in [*special_tokens, *(token['content'] for token in plain_tokens)]:
        probe += f' a{name}b {name}'
    # The post-processor adds tokens around a text.
    changed = content | {'added_tokens': plain_tokens, 'post_processor': None}
    load = functools.partial(gigatoken.Tokenizer.from_json, json.dumps(changed))
    try:
        encoder = FastEncoder(load)
        ids, = encoder.encode([probe])
    except BaseException as error:
        if not is_failure(error):
            raise  # Ctrl-C
        return None  # it raises several kinds for what it does not know
    expected, = encode([probe])
    return encoder if np.array_equal(ids, expected) else None


def is_failure(error):
    """Whether an error comes from a package, and not from a key press.

    Packages in Rust raise plain Exception. Where their code panics, they raise PanicException,
    which is no Exception and can't be imported."""
    return isinstance(error, Exception) or type(error).__name__ == 'PanicException'
