"""Numbers that are not finite never reach the weights or a checkpoint: all ranks stop or skip together, and
metrics.jsonl says what happened."""
import math
import signal

import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded
from test_distributed import STANDALONE as TWO_RANKS
from test_distributed import same_curve
from test_survival import one_state, patched
from test_train import metrics

from plaingpt.system.signals import RESUMABLE
from plaingpt.training import run_folder
from plaingpt.training.guard import Guard
from plaingpt.training.processes import Process

POISON = """
calls = []
def poisoned(parameters, limit, original=torch.nn.utils.clip_grad_norm_):
    parameters = list(parameters)
    calls.append(1)
    if len(calls) in {calls} and rank in {ranks!r}:
        parameters[3].grad[0] = float({value!r})
    return original(parameters, limit)
torch.nn.utils.clip_grad_norm_ = poisoned
"""


def poisoned(tmp_path, char_data, launcher=(), calls=(4,), ranks='0', value='nan', **keys):
    """(finished process, out_dir) of a run in which some gradients are replaced by a value."""
    script = patched(tmp_path, POISON, calls=calls, ranks=ranks, value=value)
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'checkpoint_interval': 1} | keys
    return run(script, launcher=launcher, **keys), tmp_path / 'out'


@pytest.mark.parametrize('value', ['nan', pytest.param('inf', marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(tmp_path, char_data, value):
    ended, out_dir = poisoned(tmp_path, char_data, value=value)
    assert 'after step 3 the loss is' in refused(ended) and f'gradient norm {value}' in refused(ended)
    assert one_state(out_dir) == 3
    assert metrics(out_dir)[-1]['step'] == 4 and 'gradient norm' in metrics(out_dir)[-1]['error']
    succeeded(run_here('train.py', **TINY | {'dataset': char_data, 'out_dir': out_dir, 'init_from': 'resume'}))
    assert [line['step'] for line in metrics(out_dir) if 'error' not in line] == list(range(7)) == [*range(7)]


def test_a_gradient_that_is_not_finite_is_named_also_where_the_next_look_is_later(tmp_path, char_data):
    ended, out_dir = poisoned(tmp_path, char_data, log_interval=100, checkpoint_interval=0)
    assert 'after step 3 the loss is' in refused(ended) and 'gradient norm nan' in refused(ended)
    assert not any((out_dir / name).exists() for name in run_folder.CHECKPOINTS)
    assert [(line['step'], line['tokens']) for line in metrics(out_dir)] == [(0, 0), (1, 128), (4, 512)]
    assert 'error' in metrics(out_dir)[-1]


def guarded(float16=False):
    """(weight, optimizer, scaler, Guard) of a model of one weight."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler('cpu', enabled=float16)
    return weight, optimizer, scaler, Guard(Process(weight.device), optimizer, scaler)


@pytest.mark.parametrize('loss, norm', [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0)])
def test_after_a_step_that_is_not_finite_none_changes_the_weight(loss, norm):
    weight, _, _, guard = guarded()
    weight.grad, weights = torch.ones(()), []
    for step, numbers in enumerate([(1.0, 1.0), (1.0, 1.0), (loss, norm), (2.0, 2.0), (2.0, math.nan)], start=1):
        guard.step(step, *map(torch.tensor, numbers))
        weights.append(weight.item())
        assert step != 2 or guard.look() == ({'loss': 1.0, 'grad_norm': 1.0, 'clipped': 0.0}, None)
    assert 1 > weights[0] > weights[1] == weights[2] == weights[3] == weights[4]
    number, sentence = guard.look()[1]
    assert number == 3 and f'after step 2 the loss is {loss} and the gradient norm {norm}: ' in sentence


def test_steps_left_out_for_float16_are_counted_from_one_look_to_the_next():
    weight, optimizer, scaler, guard = guarded(float16=True)
    for norm in (1.0, math.inf, math.inf, 1.0):
        scaler.scale(weight * 1).backward()
        scaler.unscale_(optimizer)
        guard.step(1, torch.tensor(1.0), torch.tensor(norm))
    assert guard.look()[0]['skipped'] == 2 and 'skipped' not in guard.look()[0]
    assert scaler.get_scale() == 2.0 ** 14 and optimizer.state[weight]['step'] == 2


@pytest.mark.parametrize('changes, stop_at, looks', [
    ({}, None, [1, 4, 8, 10]), ({'log_interval': 100}, None, [1, 10]), ({}, 6, [1, 4, 6]),
    ({'eval_interval': 5, 'checkpoint_interval': 3}, None, [1, 3, 4, 5, 6, 8, 9, 10])])
def test_only_steps_that_log_evaluate_save_or_stop_wait(tmp_path, char_data, monkeypatch, changes, stop_at, looks):
    steps, found = [], []

    def step(guard, number, *arguments, original=Guard.step):
        steps.append(number)
        if number == stop_at:
            signal.raise_signal(signal.SIGTERM)
        original(guard, number, *arguments)

    monkeypatch.setattr(Guard, 'step', step)
    monkeypatch.setattr(Guard, 'look', lambda *arguments, original=Guard.look: found.append(steps[-1]) or
                        original(*arguments))
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'log_interval': 4, 'max_iters': 10,
                   'eval_interval': 10} | changes
    assert run_here('train.py', **keys).returncode == (RESUMABLE if stop_at else 0)
    assert found == looks and steps == [*range(1, looks[-1] + 1)]


@pytest.mark.parametrize('dtype', ['float32', pytest.param('float16', marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_on_one_rank_alone_stops_all(tmp_path, char_data, dtype):
    ended, out_dir = poisoned(tmp_path, char_data, TWO_RANKS, ranks='1', dtype=dtype)
    assert ended.returncode and ended.stderr.count('error: after step 3 the loss is') == 1
    assert one_state(out_dir) == 3 and 'error' in metrics(out_dir)[-1]


def test_float16_skips_a_step_that_overflows_on_all_ranks_together_and_logs_it(tmp_path, char_data):
    keys = dict(dtype='float16', ranks='01', calls=(2, 4), log_interval=5, max_iters=6)
    ended, out_dir = poisoned(tmp_path, char_data, TWO_RANKS, value='inf', **keys)
    succeeded(ended)
    lines = {line['step']: line for line in metrics(out_dir)}
    assert lines[2]['skipped'] == lines[4]['skipped'] == 1 and not any('skipped' in lines[step] for step in (1, 5))
    last = torch.load(out_dir / 'last.pt', weights_only=True)
    assert last['scaler']['scale'] == 2.0 ** 14 and last['optimizer']['state'][0]['step'] == 4
    (tmp_path / 'alone').mkdir()
    alone, out_dir = poisoned(tmp_path / 'alone', char_data, **{**keys, 'ranks': '0'}, value='inf')
    succeeded(alone)
    same_curve(out_dir, tmp_path / 'out')


def test_float16_that_overflows_at_every_scale_stops(tmp_path, char_data):
    ended, out_dir = poisoned(tmp_path, char_data, dtype='float16', calls=range(1, 99), value='inf', max_iters=30)
    assert 'gradient norm inf' in refused(ended)
    assert len(metrics(out_dir)) == 1 + 16 + 1 and one_state(out_dir) == 16  # from a scale of 2^16 to 1


@pytest.mark.parametrize('names', [('train',), ('val',)])
def test_a_loss_that_is_not_finite_is_not_saved(tmp_path, char_data, monkeypatch, names):
    import torch.nn.functional as F
    calls, cross_entropy = [], F.cross_entropy

    def poisoned_loss(*arguments, **keys):
        calls.append(1)
        evaluated = 4 + 3 * 2 + (1 if names == ('train',) else 3)  # two evaluations of 2 + 2 batches, 3 steps of 2
        return cross_entropy(*arguments, **keys) * (float('nan') if len(calls) == evaluated else 1)

    monkeypatch.setattr(F, 'cross_entropy', poisoned_loss)
    ended = run_here('train.py', **TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'eval_interval': 3,
                                           'checkpoint_interval': 2})
    assert 'that state is not saved' in refused(ended) and one_state(tmp_path / 'out') == 2
    assert 'error' in metrics(tmp_path / 'out')[-1]


def test_weights_that_an_update_has_spoilt_are_not_saved(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'checkpoint_interval': 1, 'learning_rate': 1e38,
                   'decay_lr': False, 'min_lr': 0}
    assert 'model.transformer' in refused(run_here('train.py', **keys | {'weight_decay': 1e3}))
    assert not any((tmp_path / 'out' / name).exists() for name in run_folder.CHECKPOINTS)
