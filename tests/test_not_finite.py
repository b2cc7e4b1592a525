"""Numbers that are not finite never reach the weights or a checkpoint: all ranks stop or skip together, and
metrics.jsonl says what happened."""
import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded
from test_distributed import STANDALONE as TWO_RANKS
from test_distributed import same_curve
from test_survival import one_state, patched
from test_train import metrics

import run_folder

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
    assert lines[2]['skipped'] is lines[4]['skipped'] is True and not any('skipped' in lines[step] for step in (1, 5))
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
