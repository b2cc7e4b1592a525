"""Splits in shards: the same stream as one file, few files open, and folders that are refused."""
import os

import numpy as np
import pytest
import torch
from conftest import problem

from plaingpt.text import shards
from plaingpt.text.data_sets import check_fit, open_data_set
from plaingpt.text.token_files import DTYPES, TokenFile

CPU = torch.device('cpu')


def write_shards(folder, ids, sizes, dtype='uint16', digits=3, split='train'):
    """Writes ids in shards of these sizes; returns the path of the split."""
    folder.mkdir(exist_ok=True)
    rest = np.asarray(ids).astype(DTYPES[dtype])
    for number, size in enumerate(sizes):
        rest[:size].tofile(folder / f'{split}_{number:0{digits}d}.bin')
        rest = rest[size:]
    assert len(rest) == 0
    return str(folder / f'{split}.bin')


def write_file(folder, ids, dtype='uint16'):
    folder.mkdir(exist_ok=True)
    path = folder / 'train.bin'
    np.asarray(ids).astype(DTYPES[dtype]).tofile(path)
    return str(path)


def open_files():
    """The number of files that this process has open."""
    return len(os.listdir('/proc/self/fd'))


# ---- the same as one file ----

@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
@pytest.mark.parametrize('sizes', [
    [500, 500], [1, 998, 1], [3, 2, 1, 4, 2, 3, 985], [1000], [10] * 100, [1] * 20 + [980]])
def test_shards_give_exactly_the_batches_of_one_file(tmp_path, dtype, sizes):
    """Windows of 17 tokens lie across up to 17 shards."""
    ids = np.random.default_rng(0).integers(0, 60_000, 1000)
    whole = TokenFile(write_file(tmp_path / 'whole', ids, dtype), dtype, 60_000, 16, 1000)
    cut = TokenFile(write_shards(tmp_path / 'cut', ids, sizes, dtype), dtype, 60_000, 16, 1000)
    assert len(cut) == len(whole) == 1000
    for step in range(20):
        for part in range(2):
            where = dict(seed=3, stream='train', step=step, micro_batch=1, batch_size=8,
                         block_size=16, device=CPU, part=part, parts=2)
            for ours, theirs in zip(cut.batch(**where), whole.batch(**where), strict=True):
                assert torch.equal(ours, theirs)
    assert cut.rows([0], 1000)[0].tolist() == ids.tolist()
    for start in range(984):
        assert cut.rows([start], 16)[0].tolist() == ids[start:start + 16].tolist()
    cut.check_ids(60_000)


def test_shards_may_have_more_digits(tmp_path):
    path = write_shards(tmp_path, range(30), [10, 10, 10], digits=6)
    assert TokenFile(path).rows([5], 20).tolist() == [list(range(5, 25))]
    assert shards.shard_path(path, 7) == str(tmp_path / 'train_007.bin')
    assert shards.shard_path(f'{path}.part', 1234) == str(tmp_path / 'train_1234.bin.part')


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    path = write_shards(tmp_path, range(1002), [1] * 1002)  # train_1000.bin sorts before train_101
    assert TokenFile(path, block_size=16).rows([990], 12)[0].tolist() == list(range(990, 1002))


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='counts open files in /proc')
def test_few_of_many_shards_are_open_and_the_least_recent_one_is_closed(tmp_path):
    path = write_shards(tmp_path, range(200), [1] * 200)
    before = open_files()
    data = TokenFile(path)
    data.rows(range(199), 2)
    assert open_files() - before == shards.MOST_OPEN
    for start in range(100):
        data.rows([start, 199], 1)  # shard 199 is used again and again
    numbers = set(data.shards.open_files)
    assert numbers == {199, *range(100 - shards.MOST_OPEN + 1, 100)}


def test_a_shard_that_was_replaced_in_use_is_not_read_by_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'MOST_OPEN', 2)
    path = write_shards(tmp_path, range(40), [10] * 4)
    data = TokenFile(path)
    data.rows([10, 20], 1)  # shard 0 is closed
    os.truncate(tmp_path / 'train_000.bin', 4)
    sentence = problem(data.rows, [0], 1)
    assert f'{tmp_path}/train_000.bin has changed while it was in use' in sentence
    os.remove(tmp_path / 'train_003.bin')
    assert f'{tmp_path}/train_003.bin not found' in problem(data.rows, [30], 1)


# ---- folders that are refused ----

def test_a_shard_missing_in_the_middle_or_at_the_start_is_named(tmp_path):
    path = write_shards(tmp_path, range(50), [10] * 5)
    os.remove(tmp_path / 'train_002.bin')
    sentence = problem(TokenFile, path)
    assert sentence.startswith(f'{tmp_path}/train_002.bin is missing, although there is '
                               'train_003.bin: restore it, or prepare the data set again')
    os.remove(tmp_path / 'train_000.bin')
    assert f'{tmp_path}/train_000.bin is missing' in problem(TokenFile, path)


def test_a_shard_missing_at_the_end_is_told_by_the_count(tmp_path):
    path = write_shards(tmp_path, range(50), [10] * 5)
    os.remove(tmp_path / 'train_004.bin')
    sentence = problem(TokenFile, path, expected_tokens=50)
    assert (f'{tmp_path}/train_000.bin to train_003.bin together have 40 uint16 tokens, but the '
            'meta.json beside it says 50') in sentence
    assert len(TokenFile(path, expected_tokens=40)) == 40


def test_a_file_and_shards_together_are_refused(tmp_path):
    path = write_shards(tmp_path, range(20), [10, 10])
    write_file(tmp_path, range(20))
    assert f'{path} and {tmp_path}/train_000.bin both exist' in problem(TokenFile, path)
    os.rename(tmp_path / 'train_000.bin', tmp_path / 'train_00000.bin')
    assert 'train_00000.bin both exist' in problem(TokenFile, path)


def test_other_names_are_no_shards(tmp_path):
    path = write_file(tmp_path, range(20))
    for name in ('train_2024.bin', 'train_00.bin', 'train_mask_000.bin', 'train_000.bin.part',
                 'train_000_bin', 'xtrain_000.bin'):
        (tmp_path / name).write_bytes(b'\0\0')
    assert len(TokenFile(path)) == 20
    os.remove(path)
    os.remove(tmp_path / 'train_2024.bin')
    assert f'{path} not found' in problem(TokenFile, path)


def test_two_shards_of_one_number_are_refused(tmp_path):
    path = write_shards(tmp_path, range(20), [10, 10])
    (tmp_path / 'train_0001.bin').write_bytes(bytes(20))
    sentence = problem(TokenFile, path)
    assert 'two shards of number 1, train_0001.bin and train_001.bin' in sentence


@pytest.mark.parametrize('content, complaint', [
    (b'', 'is empty'),
    (bytes(7), 'has 7 bytes, which is not a whole number of uint16 tokens'),
    (b'First Citizen:\n' * 99, 'looks like text'),
    (b'\x93NUMPY' + bytes(100), 'looks like a NumPy file'),
])
@pytest.mark.parametrize('number', [0, 2])
def test_a_bad_shard_is_named(tmp_path, number, content, complaint):
    path = write_shards(tmp_path, range(30), [10] * 3)
    bad = tmp_path / f'train_{number:03d}.bin'
    bad.write_bytes(content)
    sentence = problem(TokenFile, path, expected_tokens=30)
    assert sentence.startswith(str(bad))
    assert complaint in sentence


@pytest.mark.skipif(os.name != 'posix', reason='makes a pipe')
@pytest.mark.usefixtures('ends_in_time')
@pytest.mark.parametrize('make', [os.mkdir, getattr(os, 'mkfifo', None)])
def test_a_shard_that_is_no_file_is_refused(tmp_path, make):
    path = write_shards(tmp_path, range(20), [10, 10])
    os.remove(tmp_path / 'train_001.bin')
    make(tmp_path / 'train_001.bin')
    assert f'{tmp_path}/train_001.bin is not a file' in problem(TokenFile, path)


def test_an_id_outside_is_named_with_its_shard(tmp_path):
    ids = np.zeros(30, np.int64)
    ids[13] = 9
    data = TokenFile(write_shards(tmp_path, ids, [10, 10, 10]), vocab_size=5)
    sentence = problem(data.rows, [2, 8], 10)
    assert f'{tmp_path}/train_001.bin holds the id 9 at token 3, ' in sentence


def test_a_shard_that_is_cut_short_while_open_is_named(tmp_path):
    data = TokenFile(write_shards(tmp_path, range(30), [10, 10, 10]))
    os.truncate(tmp_path / 'train_001.bin', 8)
    sentence = problem(data.rows, [5], 20)
    assert sentence.startswith(f'{tmp_path}/train_001.bin ends before token 10, although it had 10 '
                               'tokens')


def test_too_short_shards_are_refused_with_what_fits(tmp_path):
    path = write_shards(tmp_path, range(8), [5, 3])
    sentence = problem(TokenFile, path, block_size=8)
    assert 'train_000.bin to train_001.bin together have 8 tokens, but block_size=8' in sentence
    assert '--block_size=7' in sentence


# ---- whole data sets ----

def test_a_data_set_in_shards_opens_also_without_meta_json(tmp_path):
    write_shards(tmp_path, range(50), [20, 30])
    write_shards(tmp_path, range(10), [4, 6], split='val')
    meta, train, val = open_data_set(str(tmp_path), block_size=8)
    assert (len(train), len(val)) == (50, 10)
    check_fit(str(tmp_path), meta, (train, val), 50304)
    assert 'holds the id 49' in problem(check_fit, str(tmp_path), meta, (train, val), 49)
