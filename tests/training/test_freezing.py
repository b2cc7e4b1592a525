"""plaingpt/training/freezing.py: parts of a model, unfreezing, and runs with frozen weights."""
import signal

import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded, tiny_gpt, tiny_ids
from runs import equal_states, metrics, state, train

from plaingpt.system.messages import UserError
from plaingpt.system.signals import RESUMABLE
from plaingpt.training import freezing
from plaingpt.training.guard import Guard


def freeze(gpt, trainable):
    return freezing.freeze(gpt, 0, {'lora_rank': 0, 'trainable': trainable, 'unfreeze': None})


# ---- parts of a model ----

def names(gpt, *beginnings):
    return {name for name, _ in gpt.named_parameters() if name.startswith(beginnings)}


def trainable(gpt):
    return {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}


NORM = 'transformer.ln_f.'
MODERN = {'tied': False, 'position': 'rope', 'norm': 'rmsnorm', 'bias': False, 'mlp': 'swiglu'}


@pytest.mark.parametrize('shape, output', [
    ({}, 'transformer.wte.'),
    ({'tied': False}, 'lm_head.'),
    (MODERN, 'lm_head.'),
])
def test_parts_of_a_model_are_named(shape, output):
    gpt = tiny_gpt(n_layer=12, **shape)

    def part(trainable):
        return freezing.trainable_names(gpt, trainable)

    head = (NORM, output)
    attention = [f'transformer.h.{block}.attn.c_attn' for block in range(12)]
    assert part('all') == names(gpt, '')
    assert part('head') == names(gpt, *head)
    assert len(part('head')) == 2 + gpt.config.bias
    assert part('last:1') == names(gpt, *head, 'transformer.h.11.')
    assert part('last:12') == names(gpt, *head, 'transformer.h.')
    assert part(r'attn\.c_attn') == names(gpt, *attention)
    assert part('lm_head') == names(gpt, output)
    assert part(r'h\.0\.') == names(gpt, 'transformer.h.0.')


MALFORMED = [
    ('last:0', 'the number must be from 1 to the number of blocks'),
    ('last:', 'the number must be from 1'),
    ('last:-1', 'the number must be from 1'),
    ('last:two', 'the number must be from 1'),
    ('c_(attn', 'is not all, head, last:N or a regular expression'),
    ('h{99999999999}', 'is not all, head, last:N or a regular expression'),
    ('(' * 10 ** 4, 'is not all, head, last:N or a regular expression'),
]


@pytest.mark.parametrize('trainable, sentence', [
    *MALFORMED,
    ('last:3', 'from 1 to the number of blocks, 2$'),
    ('heads', 'matches no parameter'),
])
def test_a_part_that_matches_nothing_is_refused(trainable, sentence):
    with pytest.raises(ValueError, match=sentence):
        freezing.trainable_names(tiny_gpt(), trainable)


# ---- stages ----

def test_freezing_tells_whether_anything_has_changed():
    gpt = tiny_gpt()
    assert freeze(gpt, 'all') is False
    for part in ('head', 'last:1', r'mlp\.', 'all'):
        assert freeze(gpt, part) is True
        assert freeze(gpt, part) is False
        assert trainable(gpt) == freezing.trainable_names(gpt, part)

    freeze(gpt, 'head')
    ids = tiny_ids(2, 16)
    _, loss = gpt(ids, ids)
    loss.backward()
    with_gradient = {name for name, parameter in gpt.named_parameters()
                     if parameter.grad is not None}
    assert with_gradient == freezing.trainable_names(gpt, 'head')


def test_unfreezing_follows_its_schedule():
    unfreeze = {200: 'last:2', 300: 'all', 100: 'last:1'}
    steps = (0, 99, 100, 199, 200, 300, 10 ** 6)
    parts = [freezing.trainable_at(step, 'head', unfreeze) for step in steps]
    assert parts == ['head', 'head', 'last:1', 'last:1', 'last:2', 'all', 'all']
    assert freezing.trainable_at(0, 'head', {0: 'all'}) == 'all'
    assert freezing.trainable_at(5, 'head', None) == 'head'
    assert freezing.trainable_at(5, 'head', {}) == 'head'


@pytest.mark.parametrize('trainable, unfreeze, expected', [
    ('head', None, 'head'),
    ('head', {10: 'last:1', 20: 'last:2', 30: 'last:1'}, 'last:2'),
    ('all', {10: 'head'}, 'all'),
    ('all', {0: 'head', 10: 'last:1'}, 'last:1'),  # trainable is never in force
])
def test_the_largest_stage_is_found(trainable, unfreeze, expected):
    gpt = tiny_gpt()
    run = {'lora_rank': 0, 'trainable': trainable, 'unfreeze': unfreeze}
    assert freezing.most_trained(gpt, run) == freezing.trainable_names(gpt, expected)


def test_a_later_stage_that_matches_nothing_is_refused_at_the_start():
    run = {'lora_rank': 0, 'trainable': 'head', 'unfreeze': {1000: 'last:9'}}
    with pytest.raises(UserError, match='last:9'):
        freezing.freeze(tiny_gpt(), 0, run)


@pytest.mark.parametrize('keys, sentences', [
    ({}, []),
    ({'trainable': 'last:99', 'unfreeze': {0: 'head', 10: 'all'}}, []),
    *[({'unfreeze': wrong}, ['must map first steps to parts of the model'])
      for wrong in ({-1: 'all'}, {'1': 'all'}, {True: 'all'}, {1.5: 'all'}, {1: None}, [1], 'all')],
    *[({'trainable': part}, [sentence]) for part, sentence in MALFORMED],
    ({'unfreeze': {1: 'last:x', 2: '(', 3: '('}}, ["trainable='last:x'", "trainable='('"]),
])
def test_keys_that_name_no_parts_are_refused_without_a_model(keys, sentences):
    found = list(freezing.problems({'trainable': 'all', 'unfreeze': None} | keys))
    assert len(found) == len(sentences)
    for line, sentence in zip(found, sentences, strict=True):
        assert sentence in line


# ---- runs ----

def test_frozen_weights_stay_and_a_schedule_resumes_exactly(tmp_path, char_data):
    keys = {'unfreeze': {2: 'last:1', 4: 'all'}, 'trainable': 'head', 'eval_interval': 3,
            'tied': False}
    succeeded(train(tmp_path / 'start', char_data, max_iters=0, tied=False))
    start = state(tmp_path / 'start' / 'last.pt')
    states = {}
    for steps in (2, 3, 4, 6):
        out_dir = tmp_path / f'to {steps}'
        succeeded(train(out_dir, char_data, max_iters=steps, **keys))
        states[steps] = state(out_dir / 'last.pt')

    def moved(before, after):
        return {name for name in before['model']
                if not torch.equal(before['model'][name], after['model'][name])}

    head = {'lm_head.weight', 'transformer.ln_f.weight'}
    assert moved(start, states[2]) == head
    blocks = moved(states[2], states[4]) - head
    assert {name.split('.')[2] for name in blocks} == {'1'}
    assert 'transformer.wte.weight' in moved(states[4], states[6])
    assert len(states[2]['optimizer']['state']) == len(head)
    assert len(states[6]['optimizer']['state']) > len(head)

    succeeded(train(tmp_path / 'to 3', char_data, init_from='resume', max_iters=6, **keys))
    assert equal_states(state(tmp_path / 'to 3' / 'last.pt'), states[6])
    assert metrics(tmp_path / 'to 3') == metrics(tmp_path / 'to 6')


def test_a_run_killed_in_the_first_step_that_trains_all_resumes(tmp_path, char_data, monkeypatch):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'resume': 'auto',
                   'trainable': 'head'}
    step = Guard.step

    def stopped(guard, number, *rest):
        step(guard, number, *rest)
        if number == 3:
            signal.raise_signal(signal.SIGTERM)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Guard, 'step', stopped)
    assert run_here('train.py', **keys).returncode == RESUMABLE
    # The resumed run evaluates and saves before its first step.
    monkeypatch.setattr(Guard, 'step', killed)
    with pytest.raises(KeyboardInterrupt):
        run_here('train.py', **keys | {'trainable': 'all', 'eval_interval': 3})
    saved = state(tmp_path / 'out' / 'last.pt')
    assert saved['config']['trainable'] == 'all'
    assert len(saved['optimizer']['state']) == saved['moments'] == 2
    monkeypatch.setattr(Guard, 'step', step)
    succeeded(run_here('train.py', **keys | {'trainable': 'all'}))
    assert state(tmp_path / 'out' / 'last.pt')['iter_num'] == 6


@pytest.mark.parametrize('keys, sentence', [
    ({'trainable': 'last:9'}, "trainable='last:9'"),
    ({'trainable': 'h['}, "trainable='h['"),
    ({'trainable': 'nothing_like_it'}, 'matches no parameter'),
    ({'unfreeze': {-1: 'all'}}, 'unfreeze='),
    ({'unfreeze': 'head'}, 'unfreeze'),
    ({'unfreeze': '{[]: 1}'}, 'unfreeze'),
    ({'unfreeze': {0: 'last:0'}}, "'last:0'"),
])
def test_an_impossible_part_is_refused_before_anything_is_written(
        tmp_path, char_data, keys, sentence):
    ended = run('train.py', **TINY | keys, dataset=char_data, out_dir=tmp_path / 'out')
    assert sentence in refused(ended)
    assert not (tmp_path / 'out').exists()
