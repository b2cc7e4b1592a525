"""
Reads the tokenizer in the metadata of a GGUF file: makes the tokenizer dict of its entries.

llama.cpp has tokenizers of several kinds. Three are read: 'gpt2' is byte-level byte-pair encoding,
'llama' is SentencePiece, and 'rwkv' is a list of tokens of which the longest that fits is taken.
"""
import json
import re
from typing import NamedTuple

from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_json import describe_tokenizer_json
from plaingpt.text.tokenizer_layout import (BYTE_LEVEL, CL100K_WORDS, O200K_WORDS, added_token,
                                            byte_level_content, regex_then_bytes,
                                            sentencepiece_content)
from plaingpt.text.tokenizers import load_tokenizer

# Types of tokens, as GGUF numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

LONGEST_PIECE = 256  # characters; SentencePiece makes tokens of up to 16 unless told otherwise
SOURCE = 'the tokenizer in the GGUF file'
REMEDY = 'use another file, or convert the model again'


# ---- what happens to a text before the merges ----
class WordSplit(NamedTuple):
    """What a value of tokenizer.ggml.pre means, in the terms of a tokenizer.json."""
    pre_tokenizer: dict
    normalizer: dict | None = None
    ignore_merges: bool = False


# The regular expression of Qwen2 is that of cl100k_base and Llama 3, but for the digits that it
# takes at once.
QWEN2_WORDS = regex_then_bytes(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

PRE_TOKENIZERS = {
    'gpt-2': WordSplit(BYTE_LEVEL),
    'smollm': WordSplit({'type': 'Sequence', 'pretokenizers': [
        {'type': 'Digits', 'individual_digits': True}, BYTE_LEVEL]}),
    'llama-bpe': WordSplit(CL100K_WORDS, ignore_merges=True),
    # llama.cpp differs from it in a contraction in capitals after an accent without a letter.
    'gpt-4o': WordSplit(O200K_WORDS),
    # llama.cpp leaves Unicode as it is. The models were trained on texts in form C, though.
    'qwen2': WordSplit(QWEN2_WORDS, normalizer={'type': 'NFC'}),
}
OTHER_NAMES = {'gpt2': 'gpt-2', 'llama3': 'llama-bpe', 'llama-v3': 'llama-bpe'}


# llama.cpp reads no file of kind 'gpt2' without merges. These two bytes occur in no text.
DUMMY_MERGE = 'ÿ ÿ'

# How characters are written in a token of kind 'rwkv'.
ESCAPES = {'\\': '\\\\', '\n': '\\n', '\t': '\\t', '\r': '\\r', '\0': '\\x00'}


# ---- the tokenizer dict ----
def tokenizer_from_gguf(fields):
    """The tokenizer dict for the metadata of a GGUF file.

    fields: {key: value}; arrays are lists. UserError if the entries contradict each other, or if
    the tokenizer is of a kind that is not supported."""
    kind = fields.get('tokenizer.ggml.model')
    if kind not in ('gpt2', 'llama', 'rwkv'):
        raise _refuse(f'has the kind {repr(kind)[:99]}, where this program knows gpt2, llama, rwkv')
    tokens = _list(fields, 'tokens', str)
    if len(set(tokens)) < len(tokens):
        raise _refuse('has two tokens with the same text')
    types = [NORMAL] * len(tokens)
    if 'tokenizer.ggml.token_type' in fields:
        types = _list(fields, 'token_type', int, len(tokens))
    if kind == 'rwkv':
        return _characters(tokens, types)

    if kind == 'gpt2':
        content = _byte_level(fields, tokens, types)
    else:
        content = _sentencepiece(fields, tokens, types)
    bos = _token_named_by(fields, 'bos_token_id', tokens)
    eos = _token_named_by(fields, 'eos_token_id', tokens)
    chat_template = _text_or_none(fields, 'tokenizer.chat_template')
    return describe_tokenizer_json(json.dumps(content, ensure_ascii=False), bos, eos,
                                   chat_template)


def _byte_level(fields, tokens, types):
    """The content of a tokenizer.json for kind 'gpt2'."""
    name = _text_or_none(fields, 'tokenizer.ggml.pre')
    name_here = OTHER_NAMES.get(name, name)
    if name_here not in PRE_TOKENIZERS:
        raise _refuse(f'splits words by the rules of {repr(name)[:99]} (tokenizer.ggml.pre), where '
                      f'this program knows {", ".join(PRE_TOKENIZERS)}')
    split = PRE_TOKENIZERS[name_here]
    vocab = _vocab(tokens, types)
    merges = []
    for merge in _list(fields, 'merges', str):
        if merge == DUMMY_MERGE:
            continue
        left, _, right = merge.partition(' ')
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise _refuse(f'has the merge {repr(merge)[:99]}, whose tokens it lacks')
        merges.append((left, right))
    bos = _bos_of_every_text(fields, tokens, default=name_here == 'llama-bpe')
    return byte_level_content(vocab, merges, _added_tokens(tokens, types), split.pre_tokenizer,
                              split.normalizer, split.ignore_merges, bos)


def _sentencepiece(fields, tokens, types):
    """The content of a tokenizer.json for kind 'llama'."""
    scores = _list(fields, 'scores', float, len(tokens))
    vocab = _vocab(tokens, types)
    # SentencePiece merges any two neighbours that make a token, the token with the best score
    # first. So each way to cut a token in two is a merge.
    merges = []
    best_first = sorted(range(len(tokens)), key=scores.__getitem__, reverse=True)
    for token_id in best_first:
        token = tokens[token_id]
        if types[token_id] != NORMAL:
            continue
        if len(token) > LONGEST_PIECE:
            raise _refuse(f'has a token of {len(token)} characters')
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in vocab and right in vocab:
                merges.append((left, right))
    unknown = None
    if UNKNOWN in types:
        unknown = tokens[types.index(UNKNOWN)]
    adds_space = _flag(fields, 'add_space_prefix', default=True)
    bos = _bos_of_every_text(fields, tokens, default=True)
    return sentencepiece_content(vocab, merges, _added_tokens(tokens, types), unknown, adds_space,
                                 bos)


def _characters(tokens, types):
    """The tokenizer dict for kind 'rwkv' whose tokens are single characters."""
    chars = []
    for token_id, token in enumerate(tokens):
        if types[token_id] == UNUSED:
            continue
        char = _unescape(token)
        if char is None:
            raise _refuse(f'is of the kind rwkv and has the token {repr(token)[:99]}, where this '
                          'program knows single characters')
        if len(chars) < token_id:
            raise _refuse(f'has no characters for the ids from {len(chars)} to {token_id - 1}')
        chars.append(char)
    meta = {'kind': 'char', 'chars': chars}
    load_tokenizer(meta)
    return meta


def _unescape(token):
    """The single character that the text of a token stands for, None if it is none.

    Converters of others may write any byte as \\xHH."""
    if len(token) == 1:
        return None if token == '\\' else token
    for char, escaped in ESCAPES.items():
        if token == escaped:
            return char
    if not re.fullmatch(r'(\\x[0-9a-fA-F]{2}){1,4}', token):
        return None
    encoded = bytes.fromhex(token.replace('\\x', ''))
    try:
        text = encoded.decode('utf-8')
    except UnicodeDecodeError:  # part of a character
        return None
    return text if len(text) == 1 else None


# ---- parts of it ----
def _vocab(tokens, types):
    """{token: id}, without the tokens that only fill up the rows of a model."""
    vocab = {}
    for token_id, token in enumerate(tokens):
        if types[token_id] != UNUSED:
            vocab[token] = token_id
    return vocab


def _added_tokens(tokens, types):
    """The tokens that are found in a text before any other, for a tokenizer.json."""
    added = []
    for token_id, token in enumerate(tokens):
        if types[token_id] in (UNKNOWN, CONTROL, USER_DEFINED):
            added.append(added_token(token, token_id, special=types[token_id] != USER_DEFINED))
    return added


def _bos_of_every_text(fields, tokens, default):
    """(token, id) with which llama.cpp begins each text, or None."""
    if not _flag(fields, 'add_bos_token', default):
        return None
    token = _token_named_by(fields, 'bos_token_id', tokens)
    if token is None:
        raise _refuse('begins each text with a token, but has no tokenizer.ggml.bos_token_id')
    return token, fields['tokenizer.ggml.bos_token_id']


def _token_named_by(fields, key, tokens):
    """The token whose id stands under tokenizer.ggml.KEY, None if nothing does."""
    token_id = fields.get(f'tokenizer.ggml.{key}')
    if token_id is None:
        return None
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise _refuse(f'has the tokenizer.ggml.{key} {repr(token_id)[:99]}, which is none of its '
                      f'{len(tokens)} tokens')
    return tokens[token_id]


def _text_or_none(fields, key):
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise _refuse(f'has the {key} {repr(value)[:99]}, which must be text')
    return value


def _flag(fields, key, default):
    value = fields.get(f'tokenizer.ggml.{key}', default)
    if not isinstance(value, bool):
        raise _refuse(f'has the tokenizer.ggml.{key} {repr(value)[:99]}, which must be a bool')
    return value


def _list(fields, key, kind, length=None):
    """The list under tokenizer.ggml.KEY, whose items must be of one type, and so many if given."""
    values = fields.get(f'tokenizer.ggml.{key}')
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise _refuse(f'has no list of {kind.__name__} as tokenizer.ggml.{key}')
    if length is not None and len(values) != length:
        raise _refuse(f'has {len(values)} items in tokenizer.ggml.{key} for {length} tokens')
    return values


def _refuse(fault):
    return UserError(f'{SOURCE} {fault}: {REMEDY}')
