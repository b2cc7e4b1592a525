"""Mixtures of data sets: their names and shares, which rows they draw, and what they refuse."""
import os
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import problem

from plaingpt.text import data_sets
from plaingpt.text.mixtures import Mixture, is_mixture, open_run_data, prepare_missing, shares_of
from plaingpt.text.publishing import write_data_set
from plaingpt.text.token_files import TokenFile
from plaingpt.text.tokenizers import CharTokenizer

CPU = torch.device('cpu')


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty folder in place of data/."""
    monkeypatch.setattr(data_sets, 'DATA_FOLDER', str(tmp_path))
    return tmp_path


def write(folder, train, val=range(9), chars='abcdefghij'):
    ids = {'train': list(train), 'val': list(val)}
    write_data_set(str(folder), CharTokenizer(chars), ids, 'a test', None)


# ---- names and shares ----

@pytest.mark.parametrize('dataset, shares', [
    ('owt', {'owt': 1.0}),
    ('owt:0.75,code:0.25', {'owt': 0.75, 'code': 0.25}),
    ('code:0.25,owt:0.75', {'code': 0.25, 'owt': 0.75}),
    (' owt : 3 , code: 1e0 ', {'owt': 0.75, 'code': 0.25}),
    ('owt:5', {'owt': 1.0}),
    ('/a/b:1,c/d:1', {'/a/b': 0.5, 'c/d': 0.5}),
    (r'C:\data\owt:1,D:\code:3', {r'C:\data\owt': 0.25, r'D:\code': 0.75}),
    ('a:1e-12,b:1e12', {'a': 1e-24, 'b': 1.0}),
])
def test_shares_are_read_and_add_up_to_one(dataset, shares):
    found = shares_of(dataset)
    assert list(found) == list(shares)
    assert found == pytest.approx(shares)
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize('dataset, sentence', [
    ('a,b', 'names several data sets without their shares: write them as in'),
    ('a:1,b', "'b' is not a data set with its share"),
    ('a:1,', "'' is not a data set with its share"),
    (':1,b:1', "':1' is not a data set with its share"),
    ('a:1,b:x', "the share of b is 'x', but must be a number above 0"),
    ('a:1,b:', "the share of b is '', but must be"),
    ('a:0,b:1', "the share of a is '0', but must be"),
    ('a:-1,b:1', "the share of a is '-1', but must be"),
    ('a:nan,b:1', "the share of a is 'nan', but must be"),
    ('a:inf,b:1', "the share of a is 'inf', but must be"),
    ('a:1e400,b:1', 'must be'),
    ('a:1,b:1,a:2', 'names a twice: give it one share'),
    ('a:1,./b/../a:2', 'names ./b/../a twice'),
])
def test_a_bad_mixture_is_refused(dataset, sentence):
    said = problem(shares_of, dataset)
    assert said.startswith(f'dataset={dataset}')
    assert sentence in said


@pytest.mark.parametrize('name', ['a:1', 'a,b', 'a:x,b'])
def test_a_folder_of_such_a_name_is_one_data_set(data_folder, name):
    os.mkdir(data_folder / name)
    assert not is_mixture(name)
    assert shares_of(name) == {name: 1.0}
    os.rmdir(data_folder / name)
    assert is_mixture(name) == (':' in name)


# ---- batches ----

@pytest.fixture
def files(tmp_path):
    """TokenFiles of 3000 ids from 0, 70 from 10,000, and 200 from 20,000."""
    opened = []
    for first, count in (0, 3000), (10_000, 70), (20_000, 200):
        path = tmp_path / f'{first}.bin'
        np.arange(first, first + count).astype('<u2').tofile(path)
        opened.append(TokenFile(str(path), vocab_size=60_000, block_size=16))
    return opened


def batch(mixture, **where):
    keys = dict(seed=1, stream='train', step=0, micro_batch=0, batch_size=12, block_size=16,
                device=CPU)
    return mixture.batch(**{**keys, **where})


def drawn(mixture, steps):
    """How many rows came from each file, and the set of all starts."""
    counts = Counter()
    starts = set()
    for step in range(steps):
        first = batch(mixture, step=step)[0][:, 0].tolist()
        counts.update(start // 10_000 for start in first)
        starts.update(first)
    return counts, starts


def test_rows_come_by_share_and_from_every_place_of_each_file(files):
    shares = [0.7, 0.1, 0.2]
    counts, starts = drawn(Mixture(files, shares), steps=2000)
    rows = 2000 * 12
    assert counts.total() == rows
    for number, share in enumerate(shares):
        deviation = (share * (1 - share) / rows) ** 0.5
        assert abs(counts[number] / rows - share) < 4 * deviation
    # A window of 17 tokens fits 54 times into 70.
    assert {start for start in starts if start // 10_000 == 1} == set(range(10_000, 10_054))
    assert {start for start in starts if start // 10_000 == 2} == set(range(20_000, 20_184))
    assert len(Mixture(files, shares)) == 3270


def test_a_row_is_a_window_of_one_file_with_its_targets(files):
    x, y = batch(Mixture(files, [0.4, 0.3, 0.3]), batch_size=200)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (200, 16)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(16))
    for first in x[:, 0].tolist():
        begin = first // 10_000 * 10_000
        length = {0: 3000, 10_000: 70, 20_000: 200}[begin]
        assert begin <= first < begin + length - 16


@pytest.mark.parametrize('parts', [1, 2, 3, 12])
def test_parts_share_out_the_rows_of_the_whole(files, parts):
    mixture = Mixture(files, [0.5, 0.25, 0.25])
    for step in range(5):
        whole_x, whole_y = batch(mixture, step=step)
        for part in range(parts):
            x, y = batch(mixture, step=step, part=part, parts=parts)
            assert torch.equal(x, whole_x[part::parts])
            assert torch.equal(y, whole_y[part::parts])


def test_a_batch_depends_on_its_arguments_alone_and_on_each_of_them(files):
    mixture = Mixture(files, [0.5, 0.25, 0.25])
    first = batch(mixture)[0]
    np.random.seed(0)
    drawn(mixture, 3)
    assert torch.equal(batch(Mixture(files, [0.5, 0.25, 0.25]))[0], first)
    changes = [dict(seed=2), dict(step=1), dict(micro_batch=1), dict(stream='eval-train')]
    for change in changes:
        assert not torch.equal(batch(mixture, **change)[0], first)


# ---- what a run reads ----

def test_a_data_set_alone_is_drawn_from_as_ever(data_folder):
    write(data_folder / 'one', [0, 1, 2, 3] * 20)
    for dataset in ('one', 'one:2'):
        data = open_run_data(dataset, 8)
        assert isinstance(data.train, TokenFile)
        assert data.describe() == 'a test: 80 training and 9 validation tokens'
        assert data.losses(2.0, [2.5]) == {'train_loss': 2.0, 'val_loss': 2.5}


def test_the_validation_loss_of_a_mixture_is_weighted_by_the_shares(data_folder):
    write(data_folder / 'one', [0, 1] * 40)
    write(data_folder / 'sub' / 'two', [2, 3] * 50)
    data = open_run_data('one:3,sub/two:1', 8)
    assert isinstance(data.train, Mixture)
    assert [len(val_file) for val_file in data.val_files] == [9, 9]
    assert data.losses(2.0, [1.0, 5.0]) == {
        'train_loss': 2.0, 'val_loss': 2.0, 'val_loss_by_data': {'one': 1.0, 'two': 5.0}}
    assert data.describe() == (
        '0.75 from one (80 training and 9 validation tokens), '
        '0.25 from sub/two (100 training and 9 validation tokens)')


def test_folders_of_one_name_are_told_apart_by_their_paths(data_folder):
    for name in 'a/text', 'b/text':
        write(data_folder / name, [0, 1] * 40)
    losses = open_run_data('a/text:1,b/text:1', 8).losses(2.0, [1.0, 5.0])
    assert losses['val_loss_by_data'] == {'a/text': 1.0, 'b/text': 5.0}


def test_one_of_several_vocabularies_is_refused(data_folder):
    write(data_folder / 'one', [0, 1] * 40)
    write(data_folder / 'two', [0, 1] * 40)
    write(data_folder / 'other', [0, 1] * 40, chars='zyxwvutsrq')
    sentence = problem(open_run_data, 'one:1,two:1,other:1', 8)
    assert f'{data_folder}/one and {data_folder}/other have different vocabularies' in sentence


def test_an_unknown_or_short_data_set_of_a_mixture_is_named(data_folder):
    write(data_folder / 'one', [0, 1] * 40)
    write(data_folder / 'two', [0, 1] * 40, val=[0, 1, 2])
    assert f'{data_folder}/none/train.bin not found' in problem(open_run_data, 'one:1,none:1', 8)
    sentence = problem(open_run_data, 'one:1,two:1', 8)
    assert f'{data_folder}/two/val.bin has 3 tokens, but block_size=8' in sentence


def test_a_plan_does_without_some_data_sets(data_folder, capsys):
    write(data_folder / 'one', [0, 1] * 40)
    data = open_run_data('none:1,one:1', 8, may_be_missing=True)
    assert 'none has no train.bin' in capsys.readouterr().err
    assert data.train is None
    assert [part.tokens for part in data.parts] == [None, 80]
    assert data.meta['vocab_size'] == 10  # of the one that is there
    data.check_fit(10, None)
    assert 'the model has 9' in problem(data.check_fit, 9, None)


def test_every_data_set_must_fit_the_model(data_folder):
    write(data_folder / 'one', [0, 1] * 40)
    write(data_folder / 'two', [0, 1] * 40)
    np.full(80, 12, '<u2').tofile(data_folder / 'two' / 'train.bin')
    data = open_run_data('one:1,two:1', 8)
    assert f'{data_folder}/two/train.bin holds the id 12' in problem(data.check_fit, 10, None)


def test_each_missing_data_set_is_prepared_but_openwebtext(data_folder):
    script = 'import os; open(os.path.join(os.path.dirname(__file__), "train.bin"), "x").close()'
    for name in ('one', 'two', 'openwebtext'):
        (data_folder / name).mkdir()
        (data_folder / name / 'prepare.py').write_text(script)
    (data_folder / 'two' / 'train_000.bin').write_bytes(b'\0\0')
    prepare_missing('openwebtext:1,two:1,one:1')
    assert os.listdir(data_folder / 'openwebtext') == ['prepare.py']
    assert not (data_folder / 'two' / 'train.bin').exists()  # it has shards
    assert (data_folder / 'one' / 'train.bin').exists()
