"""The bytes of single tokens, which together are those of the text."""
import json

import pytest
from conftest import or_skip

from plaingpt.text.single_tokens import bytes_of_token
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizer_layout import (BYTE_LEVEL, SPACE, added_token, byte_level_content,
                                            sentencepiece_content)
from plaingpt.text.tokenizers import CharTokenizer, GPT2Tokenizer

TEXT = 'The naïve 😀 <|endoftext|>\n\tcosts 5€ '


def char_tokenizer():
    return CharTokenizer.from_text(TEXT)


def byte_level_tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    vocab['Ġc'] = 256
    added = [added_token('<|endoftext|>', 257, True)]
    content = byte_level_content(vocab, [('Ġ', 'c')], added, BYTE_LEVEL)
    return HuggingFaceTokenizer(json.dumps(content))


def sentencepiece_tokenizer():
    tokens = ['<unk>', *(f'<0x{byte:02X}>' for byte in range(256)), SPACE, 'T', 'h', 'e', 'c',
              SPACE + 'c', '<|endoftext|>']
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [added_token('<|endoftext|>', vocab['<|endoftext|>'], True)]
    content = sentencepiece_content(vocab, [(SPACE, 'c')], added, '<unk>', adds_space=False)
    return HuggingFaceTokenizer(json.dumps(content))


def gpt2_tokenizer():
    return or_skip(GPT2Tokenizer)


@pytest.mark.parametrize('make', [
    char_tokenizer, byte_level_tokenizer, sentencepiece_tokenizer, gpt2_tokenizer])
def test_the_bytes_of_all_tokens_are_those_of_the_text(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    assert b''.join(bytes_of_token(tokenizer, token) for token in ids) == TEXT.encode('utf-8')
    assert bytes_of_token(tokenizer, tokenizer.vocab_size) == b''


def test_half_a_surrogate_pair_has_three_bytes():
    assert bytes_of_token(CharTokenizer(['\ud800']), 0) == b'\xed\xa0\x80'


def test_tokens_that_are_words_are_the_words():
    content = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
               'normalizer': None, 'pre_tokenizer': {'type': 'Whitespace'},
               'post_processor': None, 'decoder': None,
               'model': {'type': 'WordLevel', 'vocab': {'naïve': 0, '<unk>': 1},
                         'unk_token': '<unk>'}}
    assert bytes_of_token(HuggingFaceTokenizer(json.dumps(content)), 0) == 'naïve'.encode()
