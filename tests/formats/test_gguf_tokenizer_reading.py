"""Tokenizers of GGUF files that others wrote: the ids of llama.cpp, and refusals."""
import pytest
from llama_cpp_tokenizer import TEXTS, LlamaCppTokenizer, write_tiny_gguf

from plaingpt.formats.gguf_tokenizer_reading import (BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED,
                                                     tokenizer_from_gguf)
from plaingpt.system.messages import UserError
from plaingpt.text.tokenizers import load_tokenizer


def refusal(fields):
    with pytest.raises(UserError) as error:
        tokenizer_from_gguf(fields)
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


# ---- SentencePiece ----

def sentencepiece_fields(**changes):
    """The metadata of a small SentencePiece vocabulary, with a token for each byte."""
    tokens = ['<unk>', '<s>', '</s>']
    types = [UNKNOWN, CONTROL, CONTROL]
    for byte in range(256):
        tokens.append(f'<0x{byte:02X}>')
        types.append(BYTE)
    words = ['▁t', 'he', '▁the', 'in', 'an', '▁a', '▁k', 'ing', '▁king', '▁▁', '▁an', 'aa', 'aaa',
             'll', '▁q', 'ue', 'een', 'en', '▁and', 'nd', '日本']
    scores = [0.0] * len(tokens)
    for rank, word in enumerate(words):
        tokens.append(word)
        scores.append(-float(rank))
    for char in '▁abcdefghijklmnopqrstuvwxyzHWI\'.,日本':
        tokens.append(char)
        scores.append(-1000.0)
    types += [NORMAL for _ in tokens[len(types):]]
    fields = {
        'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.scores': scores, 'tokenizer.ggml.token_type': types,
        'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2}
    return fields | {f'tokenizer.ggml.{key}': value for key, value in changes.items()}


@pytest.mark.parametrize('adds_space', [True, False])
def test_sentencepiece_gives_the_ids_of_llama_cpp(tmp_path, adds_space):
    fields = sentencepiece_fields(add_space_prefix=adds_space)
    write_tiny_gguf(tmp_path / 'tiny.gguf', fields)
    theirs = LlamaCppTokenizer(tmp_path / 'tiny.gguf')
    meta = tokenizer_from_gguf(fields)
    ours = load_tokenizer(meta)
    assert meta['bos'] == '<s>'
    assert ours.end_of_text == 2
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode('the king')[-1] == fields['tokenizer.ggml.tokens'].index('▁king')
    assert ours.encode('🙂')[-4:] == [3 + byte for byte in '🙂'.encode()]
    assert ours.tokenizer.encode('a').ids == [1, *ours.encode('a')]
    assert ours.tokenizer.encode('a').ids == theirs.encode_with_beginning('a')


# ---- other files ----

def byte_level_fields(**changes):
    fields = {
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'gpt-2',
        'tokenizer.ggml.tokens': ['a', 'b', 'ab', '<end>', '[PAD4]'],
        'tokenizer.ggml.token_type': [NORMAL, NORMAL, NORMAL, CONTROL, UNUSED],
        'tokenizer.ggml.merges': ['a b'], 'tokenizer.ggml.eos_token_id': 3}
    fields |= {f'tokenizer.ggml.{key}': value for key, value in changes.items()}
    return {key: value for key, value in fields.items() if value is not None}


def test_a_small_vocabulary_is_read():
    tokenizer = load_tokenizer(tokenizer_from_gguf(byte_level_fields()))
    assert tokenizer.encode('abba<end>') == [2, 1, 0, 3]
    assert tokenizer.encode('[PAD4]') == []
    assert tokenizer.end_of_text == 3
    assert tokenizer.vocab_size == 4


@pytest.mark.parametrize('other, name', [('gpt2', 'gpt-2'), ('llama3', 'llama-bpe')])
def test_a_pre_tokenizer_may_have_two_names(other, name):
    def read(pre):
        return tokenizer_from_gguf(byte_level_fields(pre=pre, add_bos_token=False))

    assert read(other) == read(name)


@pytest.mark.parametrize('changes, named', [
    ({'model': 't5'}, "'t5'"),
    ({'model': ['gpt2']}, "['gpt2']"),
    ({'model': None}, 'None'),
    ({'pre': 'deepseek-llm'}, "'deepseek-llm'"),
    ({'pre': 'default'}, "'default'"),
    ({'pre': None}, 'None'),
    ({'pre': ['gpt-2']}, 'tokenizer.ggml.pre'),
    ({'tokens': None}, 'tokenizer.ggml.tokens'),
    ({'tokens': 'abc'}, 'tokenizer.ggml.tokens'),
    ({'tokens': [1, 2]}, 'tokenizer.ggml.tokens'),
    ({'tokens': ['a', 'b', 'ab', 'a', 'c']}, 'two tokens'),
    ({'token_type': [1]}, '1 items in tokenizer.ggml.token_type for 5 tokens'),
    ({'token_type': [1.0] * 5}, 'tokenizer.ggml.token_type'),
    ({'merges': None}, 'tokenizer.ggml.merges'),
    ({'merges': ['a c']}, "'a c'"),
    ({'merges': ['ab']}, "'ab'"),
    ({'merges': ['b a']}, "'b a'"),
    ({'merges': ['x' * 100_000]}, 'merge'),
    ({'eos_token_id': 5}, 'eos_token_id 5'),
    ({'eos_token_id': -1}, 'eos_token_id -1'),
    ({'eos_token_id': True}, 'eos_token_id True'),
    ({'bos_token_id': '<s>'}, 'bos_token_id'),
    ({'eos_token_id': 4}, "'[PAD4]'"),
    ({'add_bos_token': True}, 'bos_token_id'),
    ({'add_bos_token': 1}, 'add_bos_token'),
    ({'tokens': ['a', 'b', 'ab', 'half \ud800', 'c']}, 'tokenizer'),
    ({'tokens': [], 'token_type': [], 'merges': [], 'eos_token_id': None}, 'empty vocabulary'),
], ids=lambda value: str(value)[:40])
def test_a_bad_byte_level_vocabulary_is_one_sentence(changes, named):
    assert named in refusal(byte_level_fields(**changes))


@pytest.mark.parametrize('changes, named', [
    ({'scores': [0.0]}, '1 items in tokenizer.ggml.scores'),
    ({'scores': None}, 'tokenizer.ggml.scores'),
    ({'add_space_prefix': 'no'}, 'add_space_prefix'),
    ({'tokens': ['x' * 1_000_000], 'scores': [0.0], 'token_type': [1], 'bos_token_id': 0},
     '1000000 characters'),
], ids=lambda value: str(value)[:40])
def test_a_bad_sentencepiece_vocabulary_is_one_sentence(changes, named):
    assert named in refusal(sentencepiece_fields(**changes))


def test_a_chat_template_must_be_text():
    assert 'chat_template' in refusal(byte_level_fields() | {'tokenizer.chat_template': 1})


# ---- characters ----

def rwkv_fields(tokens, types=None):
    return {'tokenizer.ggml.model': 'rwkv', 'tokenizer.ggml.tokens': tokens,
            'tokenizer.ggml.token_type': types or [NORMAL] * len(tokens)}


def test_characters_may_be_escaped():
    meta = tokenizer_from_gguf(rwkv_fields(['a', '\\n', '\\\\', '\\x0d', '\\xc3\\xa9', '日']))
    assert meta == {'kind': 'char', 'chars': ['a', '\n', '\\', '\r', 'é', '日']}


@pytest.mark.parametrize('tokens, types, named', [
    (['a', 'bc'], None, "'bc'"),
    (['\\'], None, 'single characters'),
    (['\\xc3'], None, 'single characters'),
    (['\\n', '\\x0a'], None, 'unknown kind'),
    ([''], None, 'single characters'),
    (['a', 'b', 'c'], [NORMAL, UNUSED, NORMAL], 'ids from 1 to 1'),
])
def test_other_tokens_than_characters_are_refused(tokens, types, named):
    assert named in refusal(rwkv_fields(tokens, types))
