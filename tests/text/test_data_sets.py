"""Data set folders: where they are, what their files hold, and whether they fit a model."""
import json
import os
import pickle

import numpy as np
import pytest
from conftest import ROOT
from forgery import Call

from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import (check_fit, folder_of, open_data_set, read_meta,
                                     rounded_vocab_size)
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizers import CharTokenizer

GOOD = {'format_version': 1, 'dtype': 'uint32', 'vocab_size': 70000, 'tokenizer': {'kind': 'gpt2'},
        'later': 'addition'}


def problem(call, *arguments, **keys):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments, **keys)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_dataset_is_a_folder_in_data_or_an_absolute_path(tmp_path):
    assert folder_of('mine') == str(ROOT / 'data' / 'mine')
    assert folder_of(str(tmp_path)) == str(tmp_path)


# ---- meta.json ----

def test_meta_json_says_what_the_files_hold(tmp_path, char_data, text):
    (tmp_path / 'meta.json').write_text(json.dumps(GOOD))
    (tmp_path / 'meta.pkl').write_bytes(b'is not read')
    assert read_meta(tmp_path) == GOOD | {'tokens': {}}
    chars = sorted(set(text))
    meta = read_meta(str(char_data))
    assert meta['dtype'] == 'uint16'
    assert meta['vocab_size'] == len(chars)
    assert meta['tokenizer'] == {'kind': 'char', 'chars': chars}


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


BROKEN = [
    b'', b'{', b'[]', b'{}', b'3', b'\xff\xfe',
    GOOD | {'dtype': 'float'},
    GOOD | {'dtype': ['uint16']},
    GOOD | {'vocab_size': 0},
    GOOD | {'vocab_size': None},
    GOOD | {'vocab_size': '65'},
    GOOD | {'vocab_size': 2**32 + 1},
    GOOD | {'tokenizer': 'gpt2'},
    GOOD | {'tokens': {'train': True}},
    without('format_version'), without('dtype'), without('vocab_size'), without('tokenizer'),
]


@pytest.mark.parametrize('content', BROKEN, ids=repr)
def test_a_broken_meta_json_is_refused(tmp_path, content):
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    path = tmp_path / 'meta.json'
    path.write_bytes(content)
    sentence = problem(read_meta, str(tmp_path))
    assert sentence.startswith(str(path))
    assert sentence.endswith('prepare the data set again')


@pytest.mark.parametrize('content', [
    GOOD | {'format_version': 2},
    {'format_version': 2, 'splits': ['train', 'val']},
])
def test_a_later_format_is_refused_as_such(tmp_path, content):
    (tmp_path / 'meta.json').write_text(json.dumps(content))
    sentence = problem(read_meta, str(tmp_path))
    assert 'has format version 2, but this program reads 1' in sentence
    assert 'update the program' in sentence


# ---- nanoGPT's folders ----

def test_the_meta_pkl_of_nanogpt_is_read(tmp_path):
    chars = ['\n', 'a', 'é']
    stoi = {char: i for i, char in enumerate(chars)}
    content = {'vocab_size': 3, 'itos': dict(enumerate(chars)), 'stoi': stoi}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(content))
    assert read_meta(str(tmp_path)) == {
        'dtype': 'uint16', 'vocab_size': 3, 'tokenizer': {'kind': 'char', 'chars': chars},
        'tokens': {}}


def test_a_folder_without_meta_holds_the_tokens_of_gpt2(tmp_path):
    assert read_meta(str(tmp_path)) == {
        'dtype': 'uint16', 'vocab_size': None, 'tokenizer': {'kind': 'gpt2'}, 'tokens': {}}


@pytest.mark.parametrize('function, code', [
    (os.system, 'echo > {}'), (eval, 'open({!r}, "w")'), (os.mkdir, '{}')])
def test_a_meta_pkl_with_code_is_refused_and_does_nothing(tmp_path, function, code):
    canary = tmp_path / 'canary'
    call = Call(function, code.format(str(canary)))
    content = {'vocab_size': 1, 'itos': {0: 'a'}, 'stoi': call}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(content))
    sentence = problem(read_meta, str(tmp_path))
    assert not canary.exists()
    assert str(tmp_path / 'meta.pkl') in sentence
    assert function.__name__ in sentence
    assert 'prepare.py' in sentence


@pytest.mark.parametrize('content', [
    b'', b'text', pickle.dumps(3), pickle.dumps([1]), pickle.dumps({'itos': {0: 'a'}}),
    pickle.dumps({'itos': {1: 'a'}, 'vocab_size': 1}), pickle.dumps({'itos': 3, 'vocab_size': 1}),
    pickle.dumps({'itos': {0: 'a'}, 'vocab_size': 2}), pickle.dumps({'itos': {}, 'vocab_size': 0})])
def test_a_broken_meta_pkl_is_refused(tmp_path, content):
    path = tmp_path / 'meta.pkl'
    path.write_bytes(content)
    assert problem(read_meta, str(tmp_path)).startswith(str(path))


# ---- opening and checking ----

@pytest.fixture
def abc_data(tmp_path):
    """A data set of the characters a, b and c."""
    folder = str(tmp_path / 'abc')
    ids = {'train': [0, 1, 2] * 9, 'val': [2, 1, 0]}
    write_data_set(folder, CharTokenizer('abc'), ids, 'a test', None)
    return folder


def test_both_token_files_of_a_data_set_are_opened(abc_data):
    meta, train, val = open_data_set(abc_data, block_size=2)
    assert meta['source'] == 'a test'
    assert train.rows([0], 3).tolist() == [[0, 1, 2]]
    assert val.rows([0], 3).tolist() == [[2, 1, 0]]
    assert 'block_size=3 needs 4' in problem(open_data_set, abc_data, 3)


def test_a_missing_data_set_is_refused_unless_it_may_be_missing(tmp_path, capsys):
    assert 'train.bin not found' in problem(open_data_set, str(tmp_path), 2)
    meta, train, val = open_data_set(str(tmp_path), 2, may_be_missing=True)
    assert meta['tokenizer'] == {'kind': 'gpt2'}
    assert train is None and val is None
    assert 'has no train.bin: the number of epochs is unknown' in capsys.readouterr().err


@pytest.mark.parametrize('kind, vocab_size, rounded', [
    ('gpt2', None, 50304), ('gpt2', 50257, 50304), ('tokenizer.json', 50259, 50304),
    ('tokenizer.json', 257, 320), ('tokenizer.json', 4096, 4096), ('tiktoken', 100277, 100288),
    ('char', 65, 65)])
def test_a_new_model_rounds_up_every_vocabulary_but_that_of_characters(kind, vocab_size, rounded):
    meta = {'vocab_size': vocab_size, 'tokenizer': {'kind': kind}}
    assert rounded_vocab_size(meta) == rounded


def test_a_data_set_that_does_not_fit_the_model_is_refused(abc_data):
    meta, train, val = open_data_set(abc_data, block_size=2)
    check_fit(abc_data, meta, [train, val], 3)
    check_fit(abc_data, meta, [train, val], 4, meta['tokenizer'])
    sentence = problem(check_fit, abc_data, meta, [train, val], 2)
    assert 'has 3 tokens in its vocabulary, but the model has 2' in sentence
    other = {'kind': 'char', 'chars': ['x', 'y', 'z']}
    sentence = problem(check_fit, abc_data, meta, [train, val], 3, other)
    assert 'another vocabulary than the model was trained with' in sentence


def test_ids_outside_the_vocabulary_are_found_before_training(abc_data):
    np.full(27, 9, '<u2').tofile(os.path.join(abc_data, 'train.bin'))
    meta, train, val = open_data_set(abc_data, block_size=2)
    sentence = problem(check_fit, abc_data, meta, [train, val], 50304)
    assert 'train.bin holds the id 9 at token 0' in sentence
