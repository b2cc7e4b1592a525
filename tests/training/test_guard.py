"""Numbers that are not finite never reach the weights or a checkpoint: all ranks stop, or skip the
step, together, and metrics.jsonl says what happened."""
import copy
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, refused, run_here, succeeded, tiny_gpt
from runs import (TWO_RANKS, assert_same_curve, losses, metrics, poisoned, resumable_step, state,
                  train)

from plaingpt.system.signals import RESUMABLE
from plaingpt.training.guard import Guard, StepReport
from plaingpt.training.optimizers import make_optimizer
from plaingpt.training.processes import Process


def guarded(float16=False, grad_clip=0.0):
    """(weight, Guard) of a model with one weight, whose gradient is 1."""
    weight = torch.nn.Parameter(torch.ones(()))
    weight.grad = torch.ones(())
    optimizer = torch.optim.AdamW([weight], fused=True)
    scaler = torch.amp.GradScaler('cpu', enabled=float16)
    return weight, Guard(Process(weight.device), optimizer, scaler, grad_clip)


def take_step(guard, number, loss=1.0, grad_norm=1.0):
    guard.step(number, torch.tensor(loss), torch.tensor(grad_norm))


# ---- the guard ----

@pytest.mark.parametrize('loss, norm', [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0)])
def test_after_a_step_that_is_not_finite_none_changes_the_weight(loss, norm):
    weight, guard = guarded()
    weights = []
    for number, (step_loss, step_norm) in enumerate(
            [(1.0, 1.0), (1.0, 1.0), (loss, norm), (2.0, 2.0), (2.0, math.nan)], start=1):
        take_step(guard, number, step_loss, step_norm)
        weights.append(weight.item())
        if number == 2:
            assert guard.read() == StepReport(1.0, 1.0, 0, 0, 2, None)
    assert 1 > weights[0] > weights[1]
    assert weights[1] == weights[2] == weights[3] == weights[4]
    # The report is about the first of the bad steps, as text since nan != nan.
    halt = guard.read().halted
    assert (halt.step, str(halt.loss), str(halt.grad_norm)) == (3, str(loss), str(norm))


def test_the_number_of_a_step_is_exact_also_where_float32_has_gaps():
    _, guard = guarded()
    take_step(guard, 20_000_001, loss=math.nan)
    assert guard.read().halted.step == 20_000_001


def test_clipped_steps_are_counted_from_one_report_to_the_next():
    _, guard = guarded(grad_clip=2.0)
    for number, norm in enumerate([1.0, 2.0, 3.0, 4.0], start=1):
        take_step(guard, number, loss=5.0, grad_norm=norm)
    assert guard.read() == StepReport(5.0, 4.0, skipped=0, clipped=2, steps=4, halted=None)
    take_step(guard, 5, loss=5.0, grad_norm=3.0)
    assert guard.read() == StepReport(5.0, 3.0, skipped=0, clipped=1, steps=1, halted=None)


def test_without_a_limit_no_step_is_clipped():
    _, guard = guarded(grad_clip=0.0)
    take_step(guard, 1, grad_norm=1e30)
    assert guard.read().clipped == 0


def test_steps_that_overflow_in_float16_are_skipped_and_counted():
    weight, guard = guarded(float16=True)
    for number, norm in enumerate([1.0, math.inf, math.inf, 1.0], start=1):
        guard.scaler.scale(weight * 1).backward()
        guard.scaler.unscale_(guard.optimizer)
        take_step(guard, number, grad_norm=norm)
    report = guard.read()
    assert (report.skipped, report.steps, report.halted) == (2, 4, None)
    assert guard.read().skipped == 0
    assert guard.scaler.get_scale() == 2.0 ** 14
    assert guard.optimizer.state[weight]['step'] == 2


def guarded_gpt(kind, device_type):
    """(gpt, Guard) of a tiny model with the optimizer that it would have on a device."""
    gpt = tiny_gpt()
    run = dict(optimizer=kind, muon_momentum=0.95, learning_rate=1e-2, muon_learning_rate=0.03,
               min_lr=1e-3, decay_lr=True, weight_decay=0.1, beta1=0.9, beta2=0.95)
    optimizer = make_optimizer(gpt, run, device_type)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    return gpt, Guard(Process(torch.device('cpu')), optimizer, scaler)


def fill_gradients(gpt, value):
    for parameter in gpt.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_a_bad_step_is_skipped_without_reading_from_the_device(monkeypatch, kind):
    gpt, guard = guarded_gpt(kind, 'cpu')
    weights = copy.deepcopy(gpt.state_dict())
    fill_gradients(gpt, math.nan)

    def refuse(tensor):
        raise AssertionError('the host waits for the device')

    with monkeypatch.context() as patch:
        for name in '__bool__', '__float__', '__int__', 'item', 'tolist':
            patch.setattr(torch.Tensor, name, refuse)
        take_step(guard, 1, grad_norm=math.nan)
    for name, weight in gpt.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert guard.read().halted.step == 1


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_an_optimizer_that_is_not_fused_takes_no_bad_step(kind):
    gpt, guard = guarded_gpt(kind, 'a device of no kind')
    assert guard.must_wait
    start = copy.deepcopy(gpt.state_dict())
    fill_gradients(gpt, 1.0)
    take_step(guard, 1)
    moved = copy.deepcopy(gpt.state_dict())
    for name, weight in moved.items():
        assert not torch.equal(weight, start[name])

    fill_gradients(gpt, math.nan)
    take_step(guard, 2, grad_norm=math.nan)
    for name, weight in gpt.state_dict().items():
        assert torch.equal(weight, moved[name])


# ---- when a run waits for the device ----

@pytest.mark.parametrize('changes, stop_at, expected', [
    ({}, None, [1, 4, 8, 10]),
    ({'log_interval': 100}, None, [1, 10]),
    ({}, 6, [1, 4, 6]),
    ({'eval_interval': 5, 'checkpoint_interval': 3}, None, [1, 3, 4, 5, 6, 8, 9, 10]),
])
def test_only_steps_that_log_evaluate_save_or_stop_wait(tmp_path, char_data, monkeypatch, changes,
                                                        stop_at, expected):
    steps = []
    read_after = []
    original_step = Guard.step
    original_read = Guard.read

    def step(guard, number, *arguments):
        steps.append(number)
        if number == stop_at:
            signal.raise_signal(signal.SIGTERM)
        original_step(guard, number, *arguments)

    def read(guard):
        read_after.append(steps[-1])
        return original_read(guard)

    monkeypatch.setattr(Guard, 'step', step)
    monkeypatch.setattr(Guard, 'read', read)
    keys = {'log_interval': 4, 'max_iters': 10, 'eval_interval': 10, **changes}
    ended = train(tmp_path / 'out', char_data, **keys)
    assert ended.returncode == (0 if stop_at is None else RESUMABLE)
    assert read_after == expected
    assert steps == list(range(1, expected[-1] + 1))


# ---- runs that meet a bad gradient ----

@pytest.mark.parametrize('value', ['nan', pytest.param('inf', marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(tmp_path, char_data,
                                                                        value):
    ended, out_dir = poisoned(tmp_path, char_data, value=value)
    sentence = refused(ended)
    assert 'after step 3 the loss is' in sentence
    assert f'gradient norm {value}' in sentence
    assert resumable_step(out_dir) == 3
    last_line = metrics(out_dir)[-1]
    assert last_line['step'] == 4
    assert 'gradient norm' in last_line['error']

    succeeded(train(out_dir, char_data, init_from='resume'))
    lines = metrics(out_dir)
    assert [line['step'] for line in lines] == list(range(7))
    assert not any('error' in line for line in lines)


def test_a_bad_gradient_is_named_also_if_the_guard_is_read_later(tmp_path, char_data):
    ended, out_dir = poisoned(tmp_path, char_data, log_interval=100, checkpoint_interval=0)
    sentence = refused(ended)
    assert 'after step 3 the loss is' in sentence
    assert 'gradient norm nan' in sentence
    assert resumable_step(out_dir) == 0  # the start, which is saved before the first step
    lines = metrics(out_dir)
    assert [(line['step'], line['tokens']) for line in lines] == [(0, 0), (1, 128), (4, 512)]
    assert 'error' in lines[-1]


@pytest.mark.parametrize('dtype', ['float32', pytest.param('float16', marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(tmp_path, char_data, dtype):
    ended, out_dir = poisoned(tmp_path, char_data, TWO_RANKS, ranks='1', dtype=dtype)
    assert ended.returncode != 0
    assert ended.stderr.count('error: after step 3 the loss is') == 1
    assert resumable_step(out_dir) == 3
    assert 'error' in metrics(out_dir)[-1]


def test_a_step_that_overflows_in_float16_is_skipped_on_all_ranks_and_logged(tmp_path, char_data):
    keys = dict(dtype='float16', calls=(2, 4), value='inf', log_interval=5, max_iters=6)
    ended, out_dir = poisoned(tmp_path, char_data, TWO_RANKS, ranks='01', **keys)
    succeeded(ended)
    skipped = {line['step']: line.get('skipped') for line in metrics(out_dir)}
    # The next line of the log names the two steps.
    assert skipped == {0: None, 1: None, 5: 2, 6: None}
    last = state(out_dir / 'last.pt')
    assert last['scaler']['scale'] == 2.0 ** 14
    assert last['optimizer']['state'][0]['step'] == 4

    (tmp_path / 'alone').mkdir()
    ended, alone = poisoned(tmp_path / 'alone', char_data, **keys)
    succeeded(ended)
    assert_same_curve(alone, out_dir)


def test_float16_that_overflows_at_every_scale_stops(tmp_path, char_data):
    ended, out_dir = poisoned(tmp_path, char_data, dtype='float16', calls=range(1, 99),
                              value='inf', max_iters=30)
    assert 'gradient norm inf' in refused(ended)
    # Step 0, the halvings of the scale from 2^16 to 1, and the error.
    assert len(metrics(out_dir)) == 1 + 16 + 1
    assert resumable_step(out_dir) == 16


# ---- runs with a bad loss or bad weights ----

@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_state_whose_evaluation_is_not_finite_is_not_saved(tmp_path, char_data, monkeypatch,
                                                             split):
    # Before the second evaluation: one of 2 + 2 batches, and 3 steps of 2 micro-batches.
    bad_call = 4 + 3 * 2 + (1 if split == 'train' else 3)
    calls = []
    original = F.cross_entropy

    def cross_entropy(*arguments, **keys):
        calls.append(1)
        loss = original(*arguments, **keys)
        return loss * math.nan if len(calls) == bad_call else loss

    monkeypatch.setattr(F, 'cross_entropy', cross_entropy)
    out_dir = tmp_path / 'out'
    ended = train(out_dir, char_data, eval_interval=3, checkpoint_interval=2)
    assert 'that state is not saved' in refused(ended)
    assert resumable_step(out_dir) == 2
    assert 'error' in metrics(out_dir)[-1]


def test_weights_that_an_update_has_spoilt_are_not_saved(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    ended = train(out_dir, char_data, checkpoint_interval=1, learning_rate=1e38, decay_lr=False,
                  min_lr=0, weight_decay=1e3)
    sentence = refused(ended)
    assert 'model.transformer' in sentence
    assert 'holds numbers that are not finite after step 1' in sentence
    assert resumable_step(out_dir) == 0


# ---- the share of clipped steps in metrics.jsonl ----

def test_the_share_of_clipped_steps_is_of_those_since_the_last_line(tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, log_interval=2))
    norms = losses(tmp_path / 'out', 'grad_norm')
    succeeded(train(tmp_path / 'all', char_data, log_interval=2, grad_clip=1e-9))
    highest = max(norms.values())
    succeeded(train(tmp_path / 'none', char_data, log_interval=2, grad_clip=2 * highest))
    assert losses(tmp_path / 'all', 'clipped') == dict.fromkeys(norms, 1.0)
    assert losses(tmp_path / 'none', 'clipped') == dict.fromkeys(norms, 0.0)


def test_the_share_of_clipped_steps_survives_a_resume_between_lines(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'log_interval': 5, 'max_iters': 10, 'eval_interval': 3,
                   'resume': 'auto'}
    succeeded(run_here('train.py', **keys, out_dir=tmp_path / 'unclipped'))
    norms = sorted(losses(tmp_path / 'unclipped', 'grad_norm').values())
    keys['grad_clip'] = norms[1]  # clips some steps, and not others
    succeeded(run_here('train.py', **keys, out_dir=tmp_path / 'whole'))
    for end in 3, 6, 10:
        succeeded(run_here('train.py', **keys | {'max_iters': end}, out_dir=tmp_path / 'parts'))
    shares = losses(tmp_path / 'whole', 'clipped')
    assert any(0 < share < 1 for share in shares.values())
    assert metrics(tmp_path / 'parts') == metrics(tmp_path / 'whole')
