"""Token files: what they must hold, and which batch comes when."""
import os
import random

import numpy as np
import pytest
import torch

from plaingpt.system.messages import UserError
from plaingpt.text.token_files import DTYPES, TokenFile, pack

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
    x, _ = data.batch(**(WHERE | where), batch_size=batch_size, block_size=block_size, device=CPU)
    return x[:, 0].tolist()


def problem(call, *arguments, **keys):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments, **keys)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---- ids on their way to disk ----

def test_pack_never_wraps_an_id_around():
    assert pack([0, 65535], 65536).dtype == np.dtype('<u2')
    wide = pack([0, 65536], 65537)
    assert wide.dtype == np.dtype('<u4')
    assert wide.tolist() == [0, 65536]
    for wrong in (65536, -1, 100):
        sentence = problem(pack, np.array([1, wrong, 2]), 100)
        assert f'the id {wrong}, but its vocabulary has 100' in sentence


def test_pack_takes_no_ids_at_all():
    assert pack([], 100).tolist() == []


# ---- batches ----

def test_a_batch_depends_on_its_arguments_alone(tokens):
    data = TokenFile(tokens(range(60000)))
    x, y = data.batch(**WHERE, batch_size=8, block_size=4, device=CPU)
    for step in range(3):
        starts(data, step=step)
    np.random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    reopened = TokenFile(data.path, block_size=16)
    x_again, y_again = reopened.batch(**WHERE, batch_size=8, block_size=4, device=CPU)
    assert torch.equal(x, x_again)
    assert torch.equal(y, y_again)


def test_a_batch_differs_with_each_of_its_arguments(tokens):
    data = TokenFile(tokens(range(60000)))
    changes = [dict(), dict(seed=1338), dict(step=6), dict(micro_batch=3), dict(seed=5, step=1337),
               dict(step=2, micro_batch=5), dict(stream='eval-train'), dict(stream='eval-val')]
    drawn = {tuple(starts(data, **change)) for change in changes}
    assert len(drawn) == len(changes)


def test_rows_of_a_batch_differ(tokens):
    assert len(set(starts(TokenFile(tokens(range(60000))), batch_size=16))) == 16


@pytest.mark.parametrize('parts', [1, 2, 3, 6])
def test_parts_share_out_the_rows_of_the_whole(tokens, parts):
    data = TokenFile(tokens(range(60000)))
    size = dict(batch_size=6, block_size=4, device=CPU)
    whole_x, whole_y = data.batch(**WHERE, **size)
    for part in range(parts):
        x, y = data.batch(**WHERE, **size, part=part, parts=parts)
        assert torch.equal(x, whole_x[part::parts])
        assert torch.equal(y, whole_y[part::parts])


@pytest.mark.parametrize('dtype, first', [('uint16', 0), ('uint32', 100_000)])
def test_y_is_x_one_token_later(tokens, dtype, first):
    ids = np.arange(first, first + 1000)
    data = TokenFile(tokens(ids, dtype), dtype, vocab_size=first + 1000, block_size=7)
    x, y = data.batch(**WHERE, batch_size=5, block_size=7, device=CPU)
    assert len(data) == 1000
    assert x.shape == y.shape == (5, 7)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert x.min() >= first
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_every_window_is_reached_and_none_goes_past_the_end(tokens):
    data = TokenFile(tokens(range(7)), block_size=4)
    reached = set()
    for step in range(20):
        reached.update(starts(data, step=step))
    assert reached == {0, 1, 2}


def test_one_window_is_enough(tokens):
    data = TokenFile(tokens(range(5)), block_size=4)
    x, y = data.batch(**WHERE, batch_size=3, block_size=4, device=CPU)
    assert x.tolist() == [[0, 1, 2, 3]] * 3
    assert y.tolist() == [[1, 2, 3, 4]] * 3


def test_numbers_are_little_endian(tmp_path):
    path = tmp_path / 'train.bin'
    path.write_bytes(b'\1\0\2\0\0\1\0\0')
    assert TokenFile(str(path)).rows([0], 4).tolist() == [[1, 2, 256, 0]]
    assert TokenFile(str(path), 'uint32').rows([0], 2).tolist() == [[0x20001, 256]]


@pytest.mark.skipif(os.name != 'posix', reason='elsewhere an open file cannot be removed')
def test_a_file_is_opened_once(tokens):
    data = TokenFile(tokens(range(60000)))
    before = starts(data)
    os.remove(data.path)
    assert starts(data) == before


# ---- files that can't be used ----

@pytest.mark.parametrize('name, has_script, remedy', [
    ('openwebtext', True, 'run python {folder}/prepare.py (54 GB), or start with python train.py '
                          'config/train_shakespeare_char.py'),
    ('mine', True, 'run python {folder}/prepare.py'),
    ('mine', False, 'put train.bin, val.bin and meta.json into {folder}, or make them of your own '
                    'text with python data/prepare.py'),
])
def test_a_missing_or_empty_file_is_refused_with_the_way_to_get_it(tmp_path, name, has_script,
                                                                    remedy):
    folder = tmp_path / name
    folder.mkdir()
    if has_script:
        (folder / 'prepare.py').touch()
    remedy = remedy.format(folder=folder)
    path = folder / 'train.bin'
    assert problem(TokenFile, str(path)) == f'{path} not found: {remedy}'
    path.touch()
    assert problem(TokenFile, str(path)) == f'{path} is empty: {remedy}'


def test_a_folder_is_no_token_file(tmp_path):
    assert problem(TokenFile, str(tmp_path)).startswith(f'{tmp_path} is not a file: ')


@pytest.mark.parametrize('dtype, size', [('uint16', 7), ('uint32', 10)])
def test_half_a_token_is_refused(tmp_path, dtype, size):
    path = tmp_path / 'train.bin'
    path.write_bytes(bytes(size))
    expected = f'{path} has {size} bytes, which is not a whole number of {dtype} tokens'
    assert expected in problem(TokenFile, str(path), dtype)


def test_a_count_that_differs_from_meta_json_is_refused(tokens):
    path = tokens(range(8))
    assert len(TokenFile(path, expected_tokens=8)) == 8
    sentence = problem(TokenFile, path, expected_tokens=9)
    assert 'has 8 uint16 tokens, but the meta.json beside it says 9' in sentence


@pytest.mark.parametrize('expected_tokens, refused', [(None, True), (1000, False)])
def test_uint32_is_told_from_uint16_unless_the_count_proves_it(tokens, expected_tokens, refused):
    # 500 small uint32 numbers are the same bytes as 1000 uint16 of which every other is 0.
    path = tokens(range(500), 'uint32')
    if refused:
        assert 'looks like uint32' in problem(TokenFile, path)
    else:
        assert len(TokenFile(path, expected_tokens=expected_tokens)) == 1000


def test_a_text_shorter_than_a_window_is_refused_with_what_fits(tokens):
    path = tokens(range(8))
    sentence = problem(TokenFile, path, block_size=8)
    expected = f'{path} has 8 tokens, but block_size=8 needs 9: use --block_size=7 or less'
    assert sentence.startswith(expected)
    assert len(TokenFile(path, block_size=7)) == 8


def test_no_block_size_is_offered_for_one_token(tokens):
    sentence = problem(TokenFile, tokens([0]), block_size=8)
    assert 'more text' in sentence
    assert '--block_size=0' not in sentence


def test_an_id_beyond_the_vocabulary_is_refused_with_its_place(tokens):
    path = tokens([0, 1, 2, 1, 0, 3, 1])
    data = TokenFile(path, vocab_size=3, block_size=6)
    for sentence in (problem(starts, data, batch_size=1, block_size=6),
                     problem(data.rows, np.array([0, 4]), 3)):
        assert f'{path} holds the id 3 at token 5, ' in sentence
        assert 'the vocabulary has 3' in sentence


@pytest.mark.parametrize('vocab_size', [4, None])
def test_ids_within_the_vocabulary_are_read(tokens, vocab_size):
    data = TokenFile(tokens([0, 1, 2, 1, 0, 3, 1]), vocab_size=vocab_size, block_size=6)
    assert starts(data, batch_size=1, block_size=6) == [0]


@pytest.mark.parametrize('left', [0, 5, 8])
def test_a_file_that_is_cut_short_while_open_is_refused(tokens, left):
    path = tokens(range(5))
    data = TokenFile(path, block_size=4)
    os.truncate(path, left)
    expected = f'{path} ends before token 5, although it had 5 tokens'
    assert problem(starts, data).startswith(expected)
