"""Token files: what they must hold, and which batch comes when."""
import json
import os
import pickle
import random

import numpy as np
import pytest
import torch

from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import DTYPES, read_meta
from plaingpt.text.token_files import TokenFile

CPU = torch.device('cpu')
WHERE = dict(seed=1337, stream='train', step=5, micro_batch=2)


@pytest.fixture
def tokens(tmp_path):
    """tokens(ids, dtype, name): the path of a token file with these ids."""
    def write(ids, dtype='uint16', name='train.bin'):
        path = tmp_path / name
        path.write_bytes(np.asarray(ids).astype(DTYPES[dtype]).tobytes())
        return str(path)
    return write


def starts(data, batch_size=8, block_size=4, **where):
    """The first token of each row of a batch: its offset, in a file that holds 0, 1, 2, …"""
    return data.batch(**{**WHERE, **where}, batch_size=batch_size, block_size=block_size, device=CPU)[0][:, 0].tolist()


def problem(call, *arguments, **keys):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments, **keys)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---- batches ----

def test_a_batch_depends_on_its_arguments_alone(tokens):
    data = TokenFile(tokens(range(60000)))
    first = data.batch(**WHERE, batch_size=8, block_size=4, device=CPU)
    for step in range(3):
        starts(data, step=step)
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    again = TokenFile(data.path, block_size=16).batch(**WHERE, batch_size=8, block_size=4, device=CPU)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_batch_differs_with_each_of_its_arguments(tokens):
    data = TokenFile(tokens(range(60000)))
    others = [dict(seed=1338), dict(step=6), dict(micro_batch=3), dict(seed=5, step=1337), dict(step=2, micro_batch=5),
              dict(stream='eval-train'), dict(stream='eval-val')]
    drawn = [tuple(starts(data, **other)) for other in [{}, *others]]
    assert len(set(drawn)) == len(drawn)


def test_rows_of_a_batch_differ(tokens):
    assert len(set(starts(TokenFile(tokens(range(60000))), batch_size=16))) == 16


@pytest.mark.parametrize('parts', [1, 2, 3, 6])
def test_parts_share_out_the_rows_of_the_whole(tokens, parts):
    data = TokenFile(tokens(range(60000)))
    whole = data.batch(**WHERE, batch_size=6, block_size=4, device=CPU)
    for part in range(parts):
        x, y = data.batch(**WHERE, batch_size=6, block_size=4, device=CPU, part=part, parts=parts)
        assert torch.equal(x, whole[0][part::parts]) and torch.equal(y, whole[1][part::parts])


@pytest.mark.parametrize('dtype, first', [('uint16', 0), ('uint32', 100_000)])
def test_y_is_x_one_token_later(tokens, dtype, first):
    ids = np.arange(first, first + 1000)
    data = TokenFile(tokens(ids, dtype), dtype, vocab_size=first + 1000, block_size=7)
    x, y = data.batch(**WHERE, batch_size=5, block_size=7, device=CPU)
    assert len(data) == 1000 and x.shape == y.shape == (5, 7) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous() and x.min() >= first
    assert torch.equal(y, x + 1) and torch.equal(x[:, 1:], y[:, :-1])


def test_every_window_is_reached_and_none_goes_past_the_end(tokens):
    data = TokenFile(tokens(range(7)), block_size=4)
    assert {start for step in range(20) for start in starts(data, step=step)} == {0, 1, 2}


def test_one_window_is_enough(tokens):
    data = TokenFile(tokens(range(5)), block_size=4)
    x, y = data.batch(**WHERE, batch_size=3, block_size=4, device=CPU)
    assert x.tolist() == [[0, 1, 2, 3]] * 3 and y.tolist() == [[1, 2, 3, 4]] * 3


def test_numbers_are_little_endian(tmp_path):
    (tmp_path / 'train.bin').write_bytes(b'\1\0\2\0\0\1\0\0')
    assert TokenFile(str(tmp_path / 'train.bin')).rows([0], 4).tolist() == [[1, 2, 256, 0]]
    assert TokenFile(str(tmp_path / 'train.bin'), 'uint32').rows([0], 2).tolist() == [[0x20001, 256]]


@pytest.mark.skipif(os.name != 'posix', reason='elsewhere an open file cannot be removed')
def test_a_file_is_opened_once(tokens):
    data = TokenFile(tokens(range(60000)))
    before = starts(data)
    os.remove(data.path)
    assert starts(data) == before


# ---- files that can't be used ----

@pytest.mark.parametrize('folder, script, remedy', [
    ('openwebtext', True, '(54 GB), or start with python train.py config/train_shakespeare_char.py'),
    ('mine', True, 'prepare.py'), ('mine', False, 'put train.bin, val.bin and meta.json into ')])
def test_a_missing_or_empty_file_is_refused_with_the_way_to_get_it(tmp_path, folder, script, remedy):
    path = tmp_path / folder / 'train.bin'
    path.parent.mkdir()
    if script:
        (tmp_path / folder / 'prepare.py').touch()
        remedy = f'run python {tmp_path / folder / "prepare.py"}' + (f' {remedy}' if folder == 'openwebtext' else '')
    assert problem(TokenFile, str(path)) == f'{path} not found: {remedy}' + ('' if script else str(path.parent))
    path.touch()
    assert problem(TokenFile, str(path)) == f'{path} is empty: {remedy}' + ('' if script else str(path.parent))


def test_a_folder_is_no_token_file(tmp_path):
    assert problem(TokenFile, str(tmp_path)).startswith(f'{tmp_path} is not a file: ')


@pytest.mark.parametrize('dtype, size', [('uint16', 7), ('uint32', 10)])
def test_half_a_token_is_refused(tmp_path, dtype, size):
    path = tmp_path / 'train.bin'
    path.write_bytes(bytes(size))
    assert f'{path} has {size} bytes, no whole number of {dtype} tokens' in problem(TokenFile, str(path), dtype)


def test_a_text_shorter_than_a_window_is_refused_with_what_fits(tokens):
    path = tokens(range(8))
    sentence = problem(TokenFile, path, block_size=8)
    assert sentence.startswith(f'{path} has 8 tokens, but block_size=8 needs 9: use --block_size=7 or less')
    assert len(TokenFile(path, block_size=7)) == 8


def test_no_block_size_is_offered_for_one_token(tokens):
    sentence = problem(TokenFile, tokens([0]), block_size=8)
    assert 'more text' in sentence and '--block_size=0' not in sentence


@pytest.mark.parametrize('vocab_size, refused', [(3, True), (4, False), (None, False)])
def test_an_id_beyond_the_vocabulary_is_refused_with_its_place(tokens, vocab_size, refused):
    path = tokens([0, 1, 2, 1, 0, 3, 1])
    data = TokenFile(path, vocab_size=vocab_size, block_size=6)
    if refused:
        sentence = problem(starts, data, batch_size=1, block_size=6)
        assert f'{path} holds the id 3 at token 5, ' in sentence and 'vocabulary has 3' in sentence
        assert f'{path} holds the id 3 at token 5, ' in problem(data.rows, np.array([0, 4]), 3)
    else:
        assert starts(data, batch_size=1, block_size=6) == [0]


@pytest.mark.parametrize('left', [0, 5, 8])
def test_a_file_that_is_cut_short_while_open_is_refused(tokens, left):
    path = tokens(range(5))
    data = TokenFile(path, block_size=4)
    os.truncate(path, left)
    assert problem(starts, data).startswith(f'{path} ends before token 5, although it had 5 tokens')


# ---- what the files hold ----

GOOD = {'format_version': 1, 'dtype': 'uint32', 'vocab_size': 70000, 'tokenizer': {'kind': 'gpt2'}, 'later': 'addition'}


def test_meta_json_says_what_the_files_hold(tmp_path, char_data, text):
    (tmp_path / 'meta.json').write_text(json.dumps(GOOD))
    (tmp_path / 'meta.pkl').write_bytes(b'not looked at')
    assert read_meta(tmp_path) == GOOD | {'tokens': {}}
    chars = sorted(set(text))
    assert read_meta(str(char_data)).items() >= {
        'dtype': 'uint16', 'vocab_size': len(chars), 'tokenizer': {'kind': 'char', 'chars': chars}}.items()


@pytest.mark.parametrize('content', [
    '', '{', '[]', '{}', '3', b'\xff\xfe', *({**GOOD, **change} for change in (
        {'dtype': 'float'}, {'vocab_size': 0}, {'vocab_size': None}, {'vocab_size': '65'}, {'tokenizer': 'gpt2'},
        {'dtype': ['uint16']})), *({k: v for k, v in GOOD.items() if k != gone} for gone in list(GOOD)[:4])], ids=repr)
def test_a_broken_meta_json_is_refused(tmp_path, content):
    content = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / 'meta.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = problem(read_meta, str(tmp_path))
    assert sentence.startswith(str(tmp_path / 'meta.json')) and sentence.endswith('prepare the data set again')


@pytest.mark.parametrize('content', [{**GOOD, 'format_version': 2}, {'format_version': 2, 'splits': ['train', 'val']}])
def test_a_later_format_is_refused_as_such(tmp_path, content):
    (tmp_path / 'meta.json').write_text(json.dumps(content))
    sentence = problem(read_meta, str(tmp_path))
    assert 'has format version 2, this program reads 1' in sentence and 'update the program' in sentence


def test_the_meta_pkl_of_nanogpt_is_read(tmp_path):
    chars = ['\n', 'a', 'é']
    content = {'vocab_size': 3, 'itos': dict(enumerate(chars)), 'stoi': {char: i for i, char in enumerate(chars)}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(content))
    meta = {'dtype': 'uint16', 'vocab_size': 3, 'tokenizer': {'kind': 'char', 'chars': chars}, 'tokens': {}}
    assert read_meta(str(tmp_path)) == meta


def test_a_folder_without_meta_holds_the_tokens_of_gpt2(tmp_path):
    meta = {'dtype': 'uint16', 'vocab_size': None, 'tokenizer': {'kind': 'gpt2'}, 'tokens': {}}
    assert read_meta(str(tmp_path)) == meta


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('function, code', [(os.system, 'echo > {}'), (eval, 'open({!r}, "w")'), (os.mkdir, '{}')])
def test_a_meta_pkl_with_code_is_refused_and_does_nothing(tmp_path, function, code):
    canary = tmp_path / 'canary'
    call = Call(function, code.format(str(canary)))
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 1, 'itos': {0: 'a'}, 'stoi': call}))
    sentence = problem(read_meta, str(tmp_path))
    assert not canary.exists()
    assert str(tmp_path / 'meta.pkl') in sentence and function.__name__ in sentence and 'prepare.py' in sentence


@pytest.mark.parametrize('content', [b'', b'text', pickle.dumps([1]), pickle.dumps({'itos': {0: 'a'}}),
                                     pickle.dumps({'itos': {1: 'a'}, 'vocab_size': 1})])
def test_a_broken_meta_pkl_is_refused(tmp_path, content):
    (tmp_path / 'meta.pkl').write_bytes(content)
    assert problem(read_meta, str(tmp_path)).startswith(str(tmp_path / 'meta.pkl'))
