"""
What a single token stands for, outside a text: its bytes, which may be a part of a character.
"""
import functools
import json

from plaingpt.text.tiktoken_encodings import TiktokenTokenizer
from plaingpt.text.token_bytes import BYTE_TOKEN
from plaingpt.text.tokenizer_layout import BYTE_CHARACTERS, SPACE
from plaingpt.text.tokenizers import CharTokenizer

BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def bytes_of_token(tokenizer, token_id):
    """The bytes of one id as it stands within a text; those of its name for a special token.

    Half a surrogate pair, which a vocabulary of characters may have, has 3. b'' for an id without
    a token; a model may have more ids than its tokenizer."""
    if token_id >= tokenizer.vocab_size:
        return b''
    if isinstance(tokenizer, CharTokenizer):
        return tokenizer.chars[token_id].encode('utf-8', 'surrogatepass')
    if isinstance(tokenizer, TiktokenTokenizer):
        return _of_tiktoken(tokenizer, token_id)
    return _of_tokenizer_json(tokenizer, token_id)


def _of_tiktoken(tokenizer, token_id):
    has_token = token_id < tokenizer.num_ranks or token_id in tokenizer.special_ids.values()
    if not has_token:
        return b''
    return tokenizer.bpe.decode_single_token_bytes(token_id)


def _of_tokenizer_json(tokenizer, token_id):
    if token_id in _added_ids(tokenizer):  # it stands in the text as it is written
        return tokenizer.decode([token_id]).encode('utf-8', 'surrogatepass')
    token = tokenizer.tokenizer.id_to_token(token_id)
    if token is None:
        return b''
    decoder = _decoder_of(tokenizer)
    if '"ByteLevel"' in decoder:
        return bytes(BYTE_OF_CHARACTER[character] for character in token
                     if character in BYTE_OF_CHARACTER)
    if '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, ' ').encode('utf-8', 'surrogatepass')
    return tokenizer.decode([token_id]).encode('utf-8', 'surrogatepass')


@functools.lru_cache(maxsize=8)
def _added_ids(tokenizer):
    return frozenset(tokenizer.tokenizer.get_added_tokens_decoder())


@functools.lru_cache(maxsize=8)
def _decoder_of(tokenizer):
    """The decoder in a tokenizer.json, as JSON."""
    return json.dumps(json.loads(tokenizer.json_text).get('decoder'))
