"""Which parameters are trained: their names, the gradual schedule, and runs in which some are frozen."""
import signal

import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded, tiny_gpt, tiny_ids
from test_train import equal_states, metrics, state, train

from plaingpt.system.signals import RESUMABLE
from plaingpt.training import freezing, starting_weights
from plaingpt.training.guard import Guard


def freeze(gpt, trainable):
    return freezing.freeze(gpt, 0, {'lora_rank': 0, 'trainable': trainable, 'unfreeze': None})


# ---- names ----

def names(gpt, *parts):
    return {name for name, _ in gpt.named_parameters() if name.startswith(parts)}


NORM = 'transformer.ln_f.'


@pytest.mark.parametrize('shape, head', [
    ({}, (NORM, 'transformer.wte.')), (dict(tied=False), (NORM, 'lm_head.')),
    (dict(tied=False, position='rope', norm='rmsnorm', bias=False, mlp='swiglu'), (NORM, 'lm_head.'))])
def test_parts_of_a_model_are_named(shape, head):
    gpt = tiny_gpt(n_layer=12, **shape)
    trained = {spec: freezing.trainable_names(gpt, spec) for spec in
               ('all', 'head', 'last:1', 'last:12', r'attn\.c_attn', 'lm_head', r'h\.0\.')}
    assert trained['all'] == names(gpt, '')
    assert trained['head'] == names(gpt, *head) and len(trained['head']) == 2 + gpt.config.bias
    assert trained['last:1'] == names(gpt, *head, 'transformer.h.11.')
    assert trained['last:12'] == names(gpt, *head, 'transformer.h.')
    assert trained[r'attn\.c_attn'] == names(gpt, *(f'transformer.h.{i}.attn.c_attn' for i in range(12)))
    assert trained['lm_head'] == names(gpt, head[1])
    assert trained[r'h\.0\.'] == names(gpt, 'transformer.h.0.')


WRONG_SPECS = [('last:0', 'the number must be from 1'), ('last:', 'the number must'), ('last:-1', 'the number must'),
               ('last:two', 'the number must'), ('c_(attn', 'is not all, head, last:N or a regular expression'),
               ('h{99999999999}', 'is not all, head'), ('(' * 10 ** 4, 'is not all, head')]


@pytest.mark.parametrize('spec, sentence', [*WRONG_SPECS, ('last:3', 'that of the layers, 2$'),
                                            ('heads', 'is found in no name of a parameter')])
def test_what_names_no_part_is_refused(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        freezing.trainable_names(tiny_gpt(), spec)


def test_freezing_tells_whether_anything_has_changed():
    gpt = tiny_gpt()
    assert freeze(gpt, 'all') is False
    for spec in 'head', 'last:1', r'mlp\.', 'all':
        assert freeze(gpt, spec) is True and freeze(gpt, spec) is False
        assert {name for name, parameter in gpt.named_parameters() if parameter.requires_grad} == \
            freezing.trainable_names(gpt, spec)
    freeze(gpt, 'head')
    x = tiny_ids(2, 16)
    gpt(x, x)[1].backward()
    assert {name for name, parameter in gpt.named_parameters() if parameter.grad is not None} == \
        freezing.trainable_names(gpt, 'head')


def test_unfreezing_follows_its_schedule():
    unfreeze = {200: 'last:2', 300: 'all', 100: 'last:1'}
    assert [freezing.trainable_at(step, 'head', unfreeze) for step in (0, 99, 100, 199, 200, 300, 10 ** 6)] == \
        ['head', 'head', 'last:1', 'last:1', 'last:2', 'all', 'all']
    assert freezing.trainable_at(0, 'head', {0: 'all'}) == 'all'
    assert freezing.trainable_at(5, 'head', None) == freezing.trainable_at(5, 'head', {}) == 'head'


@pytest.mark.parametrize('keys, sentences', [
    ({}, []), (dict(lora_rank=8), []), (dict(trainable='last:99', unfreeze={0: 'head', 10: 'all'}), []),
    (dict(init_from='scratch', trainable='head'), []), (dict(lora_rank=8, init_from='resume'), []),
    (dict(lora_rank=8, init_from='scratch'), ['lora_rank adapts weights that are there']),
    (dict(lora_rank=8, trainable='head'), ['lora_rank=8 trains nothing but the adapter']),
    (dict(lora_rank=8, unfreeze={1: 'all'}), ['lora_rank=8 trains nothing but the adapter']),
    (dict(lora_rank=8, lora_targets='c_attn,'), ["lora_targets='c_attn,' must name layers"]),
    (dict(lora_targets=''), []), (dict(lora_alpha=1e300), []),
    (dict(lora_rank=8, lora_alpha=1e300), ['lora_alpha=1e+300 must be at most']),
    (dict(init_from='a\0b'), ['init_from has a character']), (dict(init_from='.', out_dir='a\0b'), []),
    *[(dict(unfreeze=wrong), ['must be like {0: ']) for wrong in
      ({-1: 'all'}, {'1': 'all'}, {True: 'all'}, {1.5: 'all'}, {1: None}, [1], 'all')],
    *[(dict(trainable=spec), [sentence]) for spec, sentence in WRONG_SPECS],
    (dict(unfreeze={1: 'last:x', 2: '(', 3: '('}), ["trainable='last:x'", "trainable='('"])])
def test_keys_that_do_not_fit_are_said(keys, sentences):
    defaults = dict(lora_rank=0, lora_alpha=16.0, lora_targets='c_attn', trainable='all', unfreeze=None,
                    init_from='gpt2', out_dir='out')
    found = list(starting_weights.problems(defaults | keys))
    assert len(found) == len(sentences) and all(map(str.__contains__, found, sentences))


# ---- runs ----

def test_frozen_weights_stay_and_a_gradual_schedule_resumes_exactly(tmp_path, char_data):
    keys = dict(unfreeze={2: 'last:1', 4: 'all'}, trainable='head', eval_interval=3, tied=False)
    start = tiny_start(tmp_path, char_data)
    states = {}
    for steps in (2, 3, 4, 6):
        out_dir = tmp_path / f'to {steps}'
        succeeded(train(out_dir, char_data, max_iters=steps, **keys))
        states[steps] = state(out_dir / 'last.pt')

    def moved(a, b):
        return {name for name in a['model'] if not torch.equal(a['model'][name], b['model'][name])}
    head = {'lm_head.weight', 'transformer.ln_f.weight'}
    assert moved(start, states[2]) == head
    assert {name.split('.')[2] for name in moved(states[2], states[4]) - head} == {'1'}
    assert 'transformer.wte.weight' in moved(states[4], states[6])
    assert len(states[2]['optimizer']['state']) == len(head) < len(states[6]['optimizer']['state'])
    succeeded(train(tmp_path / 'to 3', char_data, init_from='resume', max_iters=6, **keys))
    assert equal_states(state(tmp_path / 'to 3' / 'last.pt'), states[6])
    assert metrics(tmp_path / 'to 3') == metrics(tmp_path / 'to 6')


def test_a_frozen_run_goes_on_when_it_was_killed_in_the_first_step_that_trains_all(tmp_path, char_data, monkeypatch):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'init_from': 'auto', 'trainable': 'head'}
    step = Guard.step

    def stopped(guard, number, *rest):
        step(guard, number, *rest)
        if number == 3:
            signal.raise_signal(signal.SIGTERM)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Guard, 'step', stopped)
    assert run_here('train.py', **keys).returncode == RESUMABLE
    monkeypatch.setattr(Guard, 'step', killed)  # after the evaluation that was still due has saved the state
    with pytest.raises(KeyboardInterrupt):
        run_here('train.py', **keys | {'trainable': 'all', 'eval_interval': 3})
    saved = state(tmp_path / 'out' / 'last.pt')
    assert saved['config']['trainable'] == 'all' and len(saved['optimizer']['state']) == saved['moments'] == 2
    monkeypatch.setattr(Guard, 'step', step)
    succeeded(run_here('train.py', **keys | {'trainable': 'all'}))
    assert state(tmp_path / 'out' / 'last.pt')['iter_num'] == 6


def tiny_start(tmp_path, char_data):
    """The state before the first step of a run with untied matrices."""
    succeeded(train(tmp_path / 'start', char_data, max_iters=0, tied=False))
    return state(tmp_path / 'start' / 'last.pt')


@pytest.mark.parametrize('keys, sentence', [
    (dict(trainable='last:9'), "trainable='last:9'"), (dict(trainable='h['), "trainable='h['"),
    (dict(trainable='nothing_like_it'), "found in no name"), (dict(unfreeze={-1: 'all'}), 'unfreeze='),
    (dict(unfreeze='head'), 'unfreeze'), (dict(unfreeze='{[]: 1}'), 'unfreeze'),
    (dict(unfreeze={0: 'last:0'}), "'last:0'")])
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, char_data, keys, sentence):
    ended = run('train.py', **TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out'} | keys)
    assert sentence in refused(ended) and not (tmp_path / 'out').exists()
