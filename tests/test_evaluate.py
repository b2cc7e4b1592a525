"""evaluate.py as a user runs it: figures, comparisons, several ranks, and refusals."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, or_skip, refused, run, run_here, succeeded
from runs import TWO_RANKS, state, train
from torch.nn import functional as F

from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizers import CharTokenizer, GPT2Tokenizer
from plaingpt.training import checkpoints
from plaingpt.training.trained_model import open_trained

CPU = dict(device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, char_data):
    """A folder with two runs on char_data: 'short' of 6 steps, and 'long' of 60."""
    folder = tmp_path_factory.mktemp('trained')
    succeeded(train(folder / 'short', char_data))
    succeeded(train(folder / 'long', char_data, max_iters=60, lr_decay_iters=60, eval_interval=60))
    return folder


def evaluate(out_dir, dataset, **keys):
    return run_here('evaluate.py', **{**CPU, 'out_dir': out_dir, 'dataset': dataset, **keys})


def figures(out_dir, data, tmp_path, **keys):
    """The figures that evaluate.py writes for one model."""
    output = tmp_path / 'figures.json'
    succeeded(evaluate(out_dir, data, output=output, **keys))
    [entry] = json.loads(output.read_text(encoding='utf-8'))
    return entry


def compare(names, data, tmp_path, **keys):
    """(figures of each model, stdout) of a comparison."""
    output = tmp_path / 'figures.json'
    models = ','.join(map(str, names))
    stdout = succeeded(run_here('evaluate.py', **CPU, compare=models, dataset=data, output=output,
                                **keys))
    return json.loads(output.read_text(encoding='utf-8')), stdout


def disjoint_loss(out_dir, data):
    """The mean loss over disjoint windows of 16 tokens, and the number of tokens they cover."""
    gpt = open_trained('resume', str(out_dir)).gpt.eval()
    ids = torch.from_numpy(np.fromfile(data / 'val.bin', '<u2').astype(np.int64))
    windows = (len(ids) - 1) // 16
    with torch.no_grad():
        logits, _ = gpt(ids[:16 * windows].view(-1, 16), ids[1:16 * windows + 1].view(-1, 16))
    losses = F.cross_entropy(logits.flatten(0, 1), ids[1:16 * windows + 1])
    return losses.item(), 16 * windows


# ---- figures ----

def test_the_loss_is_that_of_the_whole_split(trained, char_data, tmp_path):
    expected, covered = disjoint_loss(trained / 'long', char_data)
    found = figures(trained / 'long', char_data, tmp_path, stride=16, max_tokens=covered + 1)
    assert found['loss'] == pytest.approx(expected, rel=1e-5)
    assert found['tokens'] == covered
    # In this text a character is a byte.
    assert found['bytes'] == covered
    assert found['bits_per_byte'] == pytest.approx(found['loss'] / math.log(2))
    assert found['perplexity'] == pytest.approx(math.exp(found['loss']))


def test_windows_overlap_by_half_unless_told_otherwise(trained, char_data, tmp_path):
    tokens = len(np.fromfile(char_data / 'val.bin', '<u2'))
    found = figures(trained / 'long', char_data, tmp_path)
    assert (found['context_size'], found['stride'], found['tokens']) == (16, 8, tokens - 1)
    disjoint = figures(trained / 'long', char_data, tmp_path, stride=16)
    assert disjoint['tokens'] == tokens - 1
    assert disjoint['loss'] != found['loss']


def test_what_is_printed_is_what_is_written(trained, char_data, tmp_path):
    ended = evaluate(trained / 'short', char_data, output=tmp_path / 'f.json')
    [entry] = json.loads((tmp_path / 'f.json').read_text(encoding='utf-8'))
    assert f"loss {entry['loss']:.4f} ± {entry['loss_standard_error']:.4f}" in succeeded(ended)
    assert 'short/ckpt.pt, step 6: val of ' in ended.stdout
    assert f"{entry['tokens']:,} predicted tokens" in ended.stdout


def test_the_data_set_is_the_models_own_unless_one_is_named(tmp_path, named_data):
    succeeded(train(tmp_path / 'run', named_data))
    ended = run_here('evaluate.py', **CPU, out_dir=tmp_path / 'run', split='train',
                     max_tokens=100)
    assert f'train of {named_data}, 100 tokens' in succeeded(ended)


def test_two_ranks_find_the_same_figures_bit_for_bit(trained, char_data, tmp_path):
    keys = {**CPU, 'out_dir': trained / 'long', 'dataset': char_data, 'batch_size': 5}
    one = run('evaluate.py', **keys, output=tmp_path / 'one.json')
    two = run('evaluate.py', **keys, output=tmp_path / 'two.json', launcher=TWO_RANKS)
    assert succeeded(one) == succeeded(two)  # and one rank speaks
    assert (tmp_path / 'one.json').read_bytes() == (tmp_path / 'two.json').read_bytes()


@pytest.mark.slow
def test_a_compiled_model_has_the_same_loss(trained, char_data, tmp_path):
    eager = figures(trained / 'long', char_data, tmp_path)
    output = tmp_path / 'compiled.json'
    ended = evaluate(trained / 'long', char_data, output=output, compile=True)
    assert 'float32, compiled' in succeeded(ended)
    [compiled] = json.loads(output.read_text(encoding='utf-8'))
    assert compiled['loss'] == pytest.approx(eager['loss'], rel=1e-5)


def test_an_adapter_is_measured_with_its_base(trained, char_data, tmp_path):
    succeeded(train(tmp_path / 'run', char_data, init_from=trained / 'short', lora_rank=2))
    merged = figures(tmp_path / 'run', char_data, tmp_path)
    adapted = figures('', char_data, tmp_path, adapter=tmp_path / 'run' / 'adapter')
    assert adapted['loss'] == merged['loss']
    assert adapted['model'].endswith(f" with {tmp_path / 'run' / 'adapter'}")
    assert adapted['loss'] < figures(trained / 'short', char_data, tmp_path)['loss']


# ---- comparisons ----

def test_a_model_equals_itself_and_a_better_one_is_better(trained, char_data, tmp_path):
    names = [trained / 'short', trained / 'short', trained / 'long']
    (first, same, better), stdout = compare(names, char_data, tmp_path)
    assert 'difference' not in first
    assert same['difference'] == {'of': 'loss', 'value': 0.0, 'standard_error': 0.0,
                                  'is_paired': True, 'exceeds_noise': False}
    assert better['difference']['exceeds_noise']
    assert better['difference']['value'] == better['loss'] - first['loss'] < -0.1
    assert 0 < better['difference']['standard_error'] < 0.1
    rows = [line for line in stdout.splitlines() if 'ckpt.pt  ' in line]
    assert [row.split()[-1] for row in rows[1:]] == ['no', 'yes']


def test_models_are_compared_in_the_shortest_context(trained, char_data, tmp_path):
    succeeded(train(tmp_path / 'run', char_data, block_size=10))
    results, _ = compare([trained / 'short', tmp_path / 'run'], char_data, tmp_path)
    assert [result['context_size'] for result in results] == [10, 10]


def test_models_of_different_tokenizers_are_compared_by_bytes(trained, char_data, text, tmp_path):
    """The second one has a vocabulary with a needless character, in another order."""
    tokenizer = CharTokenizer(['é', *reversed(sorted(set(text)))])
    ids = tokenizer.encode(text)
    cut = len(ids) * 9 // 10
    folder = tmp_path / 'other_data'
    folder.mkdir()
    write_data_set(str(folder), tokenizer, {'train': ids[:cut], 'val': ids[cut:]}, 'a test', None)
    succeeded(train(tmp_path / 'run', folder))
    names = [trained / 'long', tmp_path / 'run']
    (first, second), _ = compare(names, f'{char_data},{folder}', tmp_path)
    difference = second['difference']
    assert difference['of'] == 'bits per byte'
    assert difference['is_paired']
    assert difference['value'] == second['bits_per_byte'] - first['bits_per_byte'] > 0
    assert difference['exceeds_noise']


def test_tokens_of_several_bytes_are_paired_with_characters(trained, char_data, text, tmp_path):
    tokenizer = or_skip(GPT2Tokenizer)
    cut = len(text) * 9 // 10
    splits = {'train': tokenizer.encode(text[:cut]), 'val': tokenizer.encode(text[cut:])}
    folder = tmp_path / 'bpe_data'
    folder.mkdir()
    write_data_set(str(folder), tokenizer, splits, 'a test', None)
    succeeded(train(tmp_path / 'run', folder, eval_iters=1))
    names = [trained / 'short', tmp_path / 'run']
    (first, second), _ = compare(names, f'{char_data},{folder}', tmp_path)
    assert second['tokens'] < first['tokens'] / 2
    first_token = len(tokenizer.decode(splits['val'][:1]))
    assert second['bytes'] == first['bytes'] + 1 - first_token  # the first token is no target
    assert second['difference']['is_paired']
    assert second['bits_per_byte'] == pytest.approx(
        second['loss'] * second['tokens'] / math.log(2) / second['bytes'])


# ---- refusals ----

@pytest.mark.parametrize('keys, sentence', [
    (dict(dataset='nowhere'), 'nowhere/val.bin not found: put train.bin, val.bin and meta.json'),
    (dict(split='test'), 'test.bin not found'),
    (dict(split='../val'), "split='../val' must be the name of a .bin file in the data set"),
    (dict(stride=17), 'stride=17 would leave out tokens: use at most 16, the length of a window'),
    (dict(stride=9, context_size=8), 'stride=9 would leave out tokens: use at most context_size=8'),
    (dict(stride=0), 'stride=0: must be >= 1'),
    (dict(stride=-1), 'stride=-1: must be >= 1'),
    (dict(context_size=17), 'context_size=17 is too long: use 16 or less'),
    (dict(batch_size=0), 'batch_size=0: must be >= 1'),
    (dict(max_tokens=1), 'max_tokens=1: must be >= 2'),
    (dict(init_from='nothing/here.pt'), 'nothing/here.pt'),
    (dict(out_dir='nothing'), 'nothing holds no checkpoint'),
    (dict(compare='out'), 'compare=out names one model: name two or more'),
    (dict(compare='a,b', adapter='c'), 'compare takes neither adapter nor tasks'),
    (dict(compare='a,b', dataset='c,d,e'), 'dataset=c,d,e must name one data set, or one for each'),
    (dict(limit=3), 'task_path, limit, num_fewshot and chat_template are about tasks'),
    (dict(chat_template=True), 'task_path, limit, num_fewshot and chat_template are about tasks'),
    (dict(output='no/such/f.json'), 'output=no/such/f.json: there is no folder no/such'),
    (dict(device='tpu'), "device='tpu' is not supported"),
])
def test_a_mistake_ends_in_one_sentence(trained, char_data, keys, sentence):
    assert sentence in refused(evaluate(**{'out_dir': trained / 'short', 'dataset': char_data,
                                           **keys}))


@pytest.mark.parametrize('keys, sentence', [
    ({'tasks': 'x', 'stride': 8, 'compile': True}, 'with tasks, these keys have no effect: '
                                                   'compile, stride; leave them out'),
    ({'compare': 'a,b', 'out_dir': 'c'}, 'with compare, these keys have no effect: out_dir'),
    ({'tasks': 'x', 'task_path': 'nowhere'}, 'task_path=nowhere is not a folder'),
])
def test_keys_without_effect_are_refused(keys, sentence):
    assert sentence in refused(run_here('evaluate.py', **CPU, **keys))


def test_models_of_different_data_sets_are_not_compared_unasked(trained, named_data, tmp_path):
    folders = []
    for name, dataset in ('one', named_data), ('other', f'{named_data}_too'):
        folder = tmp_path / name
        shutil.copytree(trained / 'short', folder)
        checkpoint = torch.load(folder / 'ckpt.pt', weights_only=True)
        checkpoint['config']['dataset'] = dataset
        torch.save(checkpoint, folder / 'ckpt.pt')
        folders.append(str(folder))
    shutil.copytree(ROOT / 'data' / named_data, ROOT / 'data' / f'{named_data}_too')
    try:
        sentence = refused(run_here('evaluate.py', **CPU, compare=','.join(folders)))
    finally:
        shutil.rmtree(ROOT / 'data' / f'{named_data}_too')
    assert f'different data sets, {named_data}, {named_data}_too: name one for all' in sentence


def test_a_data_set_of_another_vocabulary_is_refused(trained, tmp_path):
    tokenizer = CharTokenizer('ab')
    write_data_set(str(tmp_path), tokenizer, {'train': [0, 1] * 99, 'val': [0, 1] * 99}, '', None)
    sentence = refused(evaluate(trained / 'short', tmp_path))
    assert 'has another vocabulary than the model was trained with' in sentence


def test_a_data_set_outside_of_data_is_not_opened_because_a_checkpoint_names_it(trained):
    ended = run_here('evaluate.py', **CPU, out_dir=trained / 'short')
    assert 'which is not a folder in data/: name one data set with --dataset' in refused(ended)


def test_a_model_that_names_no_data_set_asks_for_one(trained, tmp_path):
    checkpoint = state(trained / 'short' / 'ckpt.pt')
    checkpoint['config'] = {}
    checkpoints.save(str(tmp_path), checkpoint, ['ckpt'])
    sentence = refused(run_here('evaluate.py', **CPU, init_from=tmp_path))
    assert 'does not say which data set it was trained on: name one with --dataset' in sentence


def test_a_split_that_is_cut_short_is_refused(trained, char_data, tmp_path):
    folder = tmp_path / 'cut'
    shutil.copytree(char_data, folder)
    with open(folder / 'val.bin', 'r+b') as file:
        file.truncate(100)
    assert 'it was cut short' in refused(evaluate(trained / 'short', folder))
