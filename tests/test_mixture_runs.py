"""train.py and others on a mixture of data sets, and on shards."""
import json
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY, read_tokens, refused, run, run_here, succeeded
from runs import (TWO_RANKS, assert_same_curve, equal_states, losses, metrics, outcome, state,
                  train)

from plaingpt.text.publishing import write_data_set
from plaingpt.text.shards import shard_path
from plaingpt.text.tokenizers import CharTokenizer
from plaingpt.training.trackers import figures_of

CPU = dict(device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def reversed_data(tmp_path_factory, text):
    """A data set of the same characters as char_data in other words."""
    folder = tmp_path_factory.mktemp('more') / 'reversed'
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text[::-1])
    write_data_set(str(folder), tokenizer, {'train': ids[:9000], 'val': ids[9000:]}, 'reversed',
                   None)
    return folder


@pytest.fixture
def mixture(char_data, reversed_data):
    return f'{char_data}:0.75,{reversed_data}:0.25'


def in_shards(folder, copy, count):
    """A copy of a data set whose splits are cut into so many shards."""
    shutil.copytree(folder, copy)
    for split in 'train', 'val':
        path = copy / f'{split}.bin'
        for number, ids in enumerate(np.array_split(np.fromfile(path, '<u2'), count)):
            ids.tofile(shard_path(str(path), number))
        os.remove(path)
    return copy


# ---- shards ----

def test_a_run_on_shards_is_the_run_on_one_file(tmp_path, char_data):
    cut = in_shards(char_data, tmp_path / 'cut', 40)
    succeeded(train(tmp_path / 'one', char_data))
    stdout = succeeded(train(tmp_path / 'out', cut))
    assert f'{len(read_tokens(char_data, "train")):,} training' in stdout
    assert metrics(tmp_path / 'out') == metrics(tmp_path / 'one')
    assert equal_states(state(tmp_path / 'out' / 'last.pt'), state(tmp_path / 'one' / 'last.pt'))
    evaluated = []
    for data in char_data, cut:
        output = tmp_path / 'figures.json'
        succeeded(run_here('evaluate.py', **CPU, out_dir=tmp_path / 'one', dataset=data,
                           output=output))
        [figures] = json.loads(output.read_text(encoding='utf-8'))
        evaluated.append({**figures, 'dataset': None})
    assert evaluated[0] == evaluated[1]


def test_a_missing_shard_ends_a_run_before_it_starts(tmp_path, char_data):
    cut = in_shards(char_data, tmp_path / 'cut', 5)
    os.remove(cut / 'val_002.bin')
    assert f'{cut}/val_002.bin is missing' in refused(train(tmp_path / 'out', cut))
    assert not (tmp_path / 'out').exists()


# ---- mixtures ----

def test_a_mixture_is_trained_on_and_each_data_set_is_evaluated(tmp_path, char_data, reversed_data,
                                                                mixture):
    stdout = succeeded(train(tmp_path / 'out', mixture))
    first, *_, last = [line for line in metrics(tmp_path / 'out') if 'val_loss' in line]
    for line in first, last:
        by_data = line['val_loss_by_data']
        assert list(by_data) == [char_data.name, 'reversed']
        mean = 0.75 * by_data[char_data.name] + 0.25 * by_data['reversed']
        assert line['val_loss'] == pytest.approx(mean, rel=1e-12)
    # Each is the loss that a run on this data set alone finds.
    for data in char_data, reversed_data:
        succeeded(train(tmp_path / data.name, data, max_iters=1))
        assert losses(tmp_path / data.name)[0] == first['val_loss_by_data'][data.name]
        assert 'val_loss_by_data' not in metrics(tmp_path / data.name)[0]

    tokens = len(read_tokens(char_data, 'train'))
    epochs = 0.75 * 6 * 128 / tokens
    assert f'768 tokens, {epochs:.2f} epochs of {char_data} ({tokens:,}), ' in stdout
    assert f'0.25 from {reversed_data} (9,000 training and ' in stdout
    val_loss, by_data = last['val_loss'], last['val_loss_by_data']
    assert (f"val loss {val_loss:.4f} ({char_data.name} {by_data[char_data.name]:.4f}, "
            f"reversed {by_data['reversed']:.4f})") in stdout
    assert state(tmp_path / 'out' / 'ckpt.pt')['best_val_loss'] == val_loss
    assert figures_of(last)['val_loss_by_data/reversed'] == by_data['reversed']


def test_a_mixture_resumes_exactly(tmp_path, mixture):
    keys = dict(eval_interval=3, dropout=0.1)
    succeeded(train(tmp_path / 'out', mixture, **keys, max_iters=3))
    succeeded(train(tmp_path / 'out', mixture, **keys, resume='auto'))
    succeeded(train(tmp_path / 'whole', mixture, **keys))
    assert outcome(tmp_path / 'out') == outcome(tmp_path / 'whole')


def test_a_checkpoint_of_a_mixture_names_its_data_sets(tmp_path, named_data):
    """Resumed, sampled and evaluated by the names in it."""
    other = ROOT / 'data' / f'{named_data}_too'
    shutil.copytree(ROOT / 'data' / named_data, other)
    dataset = f'{named_data}:1, {other.name}:3'
    out_dir = tmp_path / 'out'
    try:
        succeeded(train(out_dir, dataset, max_iters=3))
        resumed = train(out_dir, 'elsewhere', resume='always')
        assert f'dataset=elsewhere is not used: the loaded checkpoint has dataset={dataset}' in (
            resumed.stderr)
        assert '0.75 from ' in succeeded(resumed)
        sentence = refused(run_here('evaluate.py', **CPU, out_dir=out_dir))
        assert f'was trained on a mixture, {dataset}: name one of its data sets' in sentence
        succeeded(run_here('evaluate.py', **CPU, out_dir=out_dir, dataset=other.name))
    finally:
        shutil.rmtree(other)
    succeeded(run_here('sample.py', **CPU, out_dir=out_dir, num_samples=1, max_new_tokens=5))


def test_other_shares_draw_other_batches(tmp_path, char_data, reversed_data):
    for name, shares in ('one', (3, 1)), ('two', (1, 3)), ('three', (6, 2)):
        dataset = f'{char_data}:{shares[0]},{reversed_data}:{shares[1]}'
        succeeded(train(tmp_path / name, dataset))
    assert losses(tmp_path / 'one', 'loss') != losses(tmp_path / 'two', 'loss')
    assert metrics(tmp_path / 'one') == metrics(tmp_path / 'three')


@pytest.mark.slow
@pytest.mark.parametrize('accumulation', [1, 2])
def test_two_ranks_draw_the_loss_curve_of_one_on_a_mixture(tmp_path, mixture, accumulation):
    """1 micro-batch is cut by rows, and 2 are dealt out."""
    keys = {**TINY, 'dataset': mixture, 'gradient_accumulation_steps': accumulation,
            'eval_iters': 3}
    succeeded(run('train.py', out_dir=tmp_path / 'one', **keys))
    succeeded(run('train.py', out_dir=tmp_path / 'two', launcher=TWO_RANKS, **keys))
    assert_same_curve(tmp_path / 'one', tmp_path / 'two')
    ours = losses(tmp_path / 'one', 'val_loss_by_data')
    theirs = losses(tmp_path / 'two', 'val_loss_by_data')
    assert set(ours) == set(theirs) == {0, 6}
    for step, by_data in ours.items():
        assert by_data == pytest.approx(theirs[step], rel=1e-5)


def test_a_mixture_is_evaluated_alone_and_planned(tmp_path, char_data, reversed_data, mixture):
    keys = dict(TINY, dataset=mixture, out_dir=tmp_path / 'out')
    assert '(on 128 tokens)' in succeeded(run_here('train.py', **keys, eval_only=True))
    on_card = keys | dict(device_name='H100 SXM', device='cuda')
    both = succeeded(run_here('train.py', **on_card, plan=True))
    assert f'epochs of {reversed_data} (9,000)' in both
    alone = succeeded(run_here('train.py', **on_card | dict(dataset=char_data), plan=True))
    flops = {}
    for name, text in ('both', both), ('alone', alone):
        flops[name] = float(text.split('forward and backward, ')[1].split(' in evaluations')[0])
    assert flops['both'] == pytest.approx(1.5 * flops['alone'], rel=0.01)  # three splits, not two
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('dataset, sentence', [
    ('{}:1,nowhere:1', 'nowhere/train.bin not found'),
    ('{}:1,nowhere:none', "the share of nowhere is 'none', but must be a number above 0"),
    ('{}:1,{}:1', 'twice: give it one share'),
])
def test_a_wrong_mixture_ends_in_one_sentence(tmp_path, char_data, dataset, sentence):
    ended = train(tmp_path / 'out', dataset.replace('{}', str(char_data)))
    assert sentence in refused(ended)
    assert not (tmp_path / 'out').exists()


def test_evaluate_refuses_a_mixture(tmp_path):
    sentence = refused(run_here('evaluate.py', **CPU, dataset='a:1,b:2', out_dir=tmp_path))
    assert 'dataset=a:1,b:2 is a mixture: name one of its data sets, without a share' in sentence
