"""Text to ids and back: characters, GPT-2, and the dicts in which tokenizers are stored."""
import json
import pickle
import sys

import numpy as np
import pytest
from conftest import or_skip
from hypothesis import given
from hypothesis import strategies as st
from pools import sent

from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_export import tokenizer_json_of
from plaingpt.text.tokenizer_json import describe_tokenizer_json
from plaingpt.text.tokenizers import (CharTokenizer, GPT2Tokenizer, load_tokenizer,
                                      same_vocabulary)


@pytest.fixture(scope='module')
def gpt2():
    return or_skip(GPT2Tokenizer)


# ---- characters ----

def test_characters_are_numbered_in_the_order_of_their_code_points():
    tokenizer = CharTokenizer.from_text('hello\nwörld')
    assert tokenizer.chars == ['\n', 'd', 'e', 'h', 'l', 'o', 'r', 'w', 'ö']
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode('wo\nö') == [7, 5, 0, 8]
    assert tokenizer.end_of_text is None


@pytest.mark.parametrize('text', ['', 'a', 'hello\n\tworld', 'naïve 日本 🙂'])
def test_characters_come_back(text):
    tokenizer = CharTokenizer.from_text('hello\n\tworld naïve 日本 🙂')
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.decoder()
    assert ''.join(decoder([i]) for i in ids) == text


@pytest.mark.parametrize('char, point', [
    ('é', 'U+00E9'), ('🙂', 'U+1F642'), ('\n', 'U+000A'), ('A', 'U+0041')])
def test_an_unknown_character_is_named_with_its_code_point(char, point):
    with pytest.raises(UserError) as error:
        CharTokenizer('abc').encode(f'ab{char}?')
    sentence = str(error.value)
    assert f'{char!r} ({point})' in sentence
    assert "'abc'" in sentence
    assert '\n' not in sentence


ANY_TEXT = st.text(max_size=40)  # also halves of surrogate pairs


@given(st.lists(ANY_TEXT))
def test_many_texts_of_characters_have_the_ids_of_each(texts):
    tokenizer = CharTokenizer(sorted(set('a').union(*texts)))
    encoded = tokenizer.encode_corpus(texts)
    assert len(encoded) == len(texts)
    for ids, text in zip(encoded, texts, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == [tokenizer.chars.index(char) for char in text]
        assert tokenizer.decode(ids.tolist()) == text


def test_the_first_of_all_unknown_characters_is_named():
    with pytest.raises(UserError, match="the character 'x' "):
        CharTokenizer('abc').encode_corpus(['abc', 'abxy', 'z'])


def test_a_long_list_of_known_characters_is_cut():
    chars = [chr(i) for i in range(0x4e00, 0x4e00 + 5000)]
    with pytest.raises(UserError) as error:
        CharTokenizer(chars).encode('a')
    assert 'vocabulary of 5,000 characters, ' in str(error.value)
    assert len(str(error.value)) < 400


def test_a_character_tokenizer_travels_to_another_process():
    tokenizer = CharTokenizer('bca')
    tokenizer.encode('abc')
    assert len(pickle.dumps(tokenizer)) < 1000
    assert sent(tokenizer).encode('abc') == [2, 0, 1]


# ---- GPT-2 ----

@pytest.mark.parametrize('text, ids', [
    ('Hello world', [15496, 995]), ('', []), ('\n', [198]), (' the', [262])])
def test_gpt2_ids_are_those_of_the_published_vocabulary(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text
    assert gpt2.vocab_size == 50257
    assert gpt2.end_of_text == 50256


def test_gpt2_text_comes_back(gpt2):
    text = 'naïve 日本 🙂\r\n\tdef f(x): return x  # 123'
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_decoder_holds_back_half_a_character(gpt2):
    ids = gpt2.encode('a🙂b')
    assert len(ids) > 3
    assert '\N{REPLACEMENT CHARACTER}' in gpt2.decode(ids[:2])
    decoder = gpt2.decoder()
    pieces = [decoder([i]) for i in ids]
    assert '' in pieces
    assert [piece for piece in pieces if piece] == ['a', '🙂', 'b']


def test_gpt2_decoders_are_independent(gpt2):
    ids = gpt2.encode('🙂')
    gpt2.decoder()(ids[:1])
    assert gpt2.decoder()(ids) == '🙂'


def test_gpt2_end_of_text_is_a_token_only_where_it_is_special(gpt2):
    text = 'a<|endoftext|>b'
    special = gpt2.encode(text)
    plain = gpt2.encode(text, special=False)
    assert special == [64, 50256, 65]
    assert 50256 not in plain
    assert len(plain) > 3
    assert gpt2.decode(special) == gpt2.decode(plain) == text


def test_a_missing_package_is_one_sentence_with_the_command(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(UserError, match='pip install tiktoken'):
        GPT2Tokenizer()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, 'gigatoken', None)
    with pytest.raises(UserError, match='pip install gigatoken'):
        GPT2Tokenizer().encode_corpus(['a'])


# ---- as dicts ----

def test_a_character_tokenizer_survives_its_dict():
    again = load_tokenizer(CharTokenizer('bca').to_meta())
    assert isinstance(again, CharTokenizer)
    assert again.encode('abc') == [2, 0, 1]


def test_a_gpt2_tokenizer_survives_its_dict(gpt2):
    again = load_tokenizer(gpt2.to_meta())
    assert gpt2.to_meta() == {'kind': 'gpt2'}
    assert again.encode('Hello world') == [15496, 995]


@pytest.mark.parametrize('meta', [
    {}, {'kind': 'bytes'}, {'kind': None}, {'kind': ['char']},
    {'chars': ['a']}, {'kind': 'char'}, {'kind': 'char', 'chars': None},
    {'kind': 'char', 'chars': ['ab']}, {'kind': 'char', 'chars': [1]},
    {'kind': 'char', 'chars': 'abc'}, {'kind': 'char', 'chars': ['a', 'b', 'a']},
    {'kind': 'char', 'chars': [['a']]},
    {'kind': 'tiktoken'}, {'kind': 'tiktoken', 'name': 'cl100k'}, {'kind': 'tiktoken', 'name': []},
    {'kind': 'tokenizer.json'}, {'kind': 'tokenizer.json', 'json': {}},
], ids=repr)
def test_a_tokenizer_of_unknown_kind_is_refused(meta):
    with pytest.raises(UserError) as error:
        load_tokenizer(meta)
    assert repr(meta.get('kind')) in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('key', ['bos', 'eos', 'chat_template'])
@pytest.mark.parametrize('value', [0, True, ['</s>'], {}], ids=repr)
def test_what_a_tokenizer_dict_says_beside_its_json_must_be_text(key, value):
    with pytest.raises(UserError) as error:
        load_tokenizer({'kind': 'tokenizer.json', 'json': LETTERS, key: value})
    assert f'invalid {key}, {value!r}' in str(error.value)


LETTERS = json.dumps({
    'version': '1.0', 'added_tokens': [], 'normalizer': None, 'pre_tokenizer': None,
    'post_processor': None, 'decoder': None,
    'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, '</s>': 2}, 'merges': []}})


def test_two_dicts_name_one_vocabulary_whatever_they_say_beside_it():
    letters = {'kind': 'tokenizer.json', 'json': LETTERS}
    others = {'kind': 'tokenizer.json', 'json': LETTERS.replace('"b"', '"c"')}
    for beside in ({'bos': 'a'}, {'eos': '</s>'}, {'chat_template': 'x'}, {'eos': None}):
        assert same_vocabulary(letters, letters | beside)
        assert same_vocabulary(letters | beside, letters)
        assert not same_vocabulary(letters | beside, others)
    chars = CharTokenizer('ab').to_meta()
    assert same_vocabulary(chars, CharTokenizer('ab').to_meta())
    assert not same_vocabulary(chars, CharTokenizer('ba').to_meta())
    assert not same_vocabulary(chars, letters)
    assert not same_vocabulary(chars, {'kind': 'gpt2'})


def test_a_tokenizer_json_of_gpt2_with_a_chat_template_names_gpt2s_vocabulary(gpt2):
    template = {'chat_template': '{{ messages }}'}
    text = tokenizer_json_of({'kind': 'gpt2'})
    meta = describe_tokenizer_json(text, **template)
    assert meta['kind'] == 'tokenizer.json'
    assert same_vocabulary(meta, {'kind': 'gpt2'})
    assert same_vocabulary({'kind': 'gpt2'}, meta)
