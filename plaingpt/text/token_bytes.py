"""
How many bytes of text each token of a tokenizer stands for.

A loss per token depends on how long the tokens are. Divided by the bytes of the text, losses of
models with different tokenizers can be compared.
"""
import json
import re

import numpy as np

from plaingpt.text.tiktoken_encodings import TiktokenTokenizer
from plaingpt.text.tokenizer_layout import SPACE
from plaingpt.text.tokenizers import CharTokenizer

BYTE_TOKEN = re.compile(r'<0x[0-9A-F]{2}>')  # a byte that is a token: <0x0A>


def token_bytes(tokenizer):
    """UTF-8 bytes that each id stands for: an int64 array (vocab_size,), 0 for special tokens.

    The sum over the ids of a text is the length of the text in UTF-8, after the tokenizer has
    normalised it. Some tokenizers put a space before each text, which counts as one byte of it.

    None for a tokenizer.json whose tokens do not tell, such as BERT's. It must be a byte-level one,
    as GPT-2's and Llama 3's, or in SentencePiece's form, as Llama 2's, or have tokens that are
    plain text."""
    if isinstance(tokenizer, CharTokenizer):
        lengths = [utf8_length(char) for char in tokenizer.chars]
        return np.array(lengths, dtype=np.int64)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _of_tiktoken(tokenizer)
    return _of_tokenizer_json(tokenizer)


def utf8_length(text):
    """How many bytes a text has in UTF-8; halves of surrogate pairs have 3 each."""
    return len(text) if text.isascii() else len(text.encode('utf-8', 'surrogatepass'))


def _of_tiktoken(tokenizer):
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token_id, token in enumerate(tokenizer.tokens()):
        lengths[token_id] = len(token)
    return lengths


def _of_tokenizer_json(tokenizer):
    content = json.loads(tokenizer.json_text)
    decoders = _kinds(content.get('decoder'))
    if 'ByteLevel' in decoders:
        length_of = len  # each byte is one character of the token, in an alphabet of 256
    elif 'ByteFallback' in decoders or 'Metaspace' in decoders:
        length_of = _sentencepiece_length
    elif decoders == {'Fuse'}:
        length_of = utf8_length
    else:
        return None

    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=False)
    for token, token_id in vocabulary.items():
        lengths[token_id] = length_of(token)
    # Added tokens stand in the text as they are written.
    for token_id, token in tokenizer.tokenizer.get_added_tokens_decoder().items():
        lengths[token_id] = utf8_length(token.content)
    lengths[list(tokenizer.special_ids.values())] = 0
    return lengths


def _kinds(decoder):
    """The types of the steps of a decoder in a tokenizer.json, a set."""
    if decoder is None:
        return set()
    if decoder['type'] != 'Sequence':
        return {decoder['type']}
    kinds = set()
    for step in decoder['decoders']:
        kinds |= _kinds(step)
    return kinds


def _sentencepiece_length(token):
    if BYTE_TOKEN.fullmatch(token):
        return 1
    return utf8_length(token.replace(SPACE, ' '))
