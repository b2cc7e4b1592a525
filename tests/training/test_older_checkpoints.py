"""plaingpt/training/older_checkpoints.py: the forms of earlier versions are still read."""
import pytest
import torch
from forgery import problem
from runs import small_checkpoint, trained_model

from plaingpt.training import checkpoints, resuming
from plaingpt.training.state import RunState

SCALER = torch.amp.GradScaler('cpu', enabled=False)


def load_saved(tmp_path, **entries):
    """What is loaded of a checkpoint with these entries."""
    checkpoints.save(tmp_path, small_checkpoint(entries.pop('iter_num', 1), **entries), ['last'])
    return checkpoints.load(str(tmp_path / 'last.pt'))


def test_a_checkpoint_of_version_1_is_verified_by_the_checksums_of_its_archive(tmp_path):
    path = tmp_path / 'last.pt'
    older = small_checkpoint(4, format_version=1, digest={'model': 'of another kind'})
    torch.save(older, path)
    loaded, _ = checkpoints.load_to_resume(str(tmp_path))
    assert loaded['iter_num'] == 4

    moment = older['optimizer']['state'][0]['exp_avg'].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(moment) + 9] ^= 1
    path.write_bytes(content)
    assert 'its checksums do not match' in problem(checkpoints.load, str(path))


def test_nanogpts_tokens_are_counted_from_its_batches_and_its_best_loss_is_a_number(tmp_path):
    config = {'dataset': 'x', 'gradient_accumulation_steps': 5, 'batch_size': 4, 'block_size': 16}
    loaded = load_saved(tmp_path, iter_num=250, config=config, best_val_loss=torch.tensor(1.5))
    assert loaded['tokens_seen'] == 250 * 5 * 4 * 16
    assert loaded['best_val_loss'] == 1.5
    assert isinstance(loaded['best_val_loss'], float)


@pytest.mark.parametrize('record, figures', [
    ({'loss': 2.0, 'lr': 0.1}, {'loss': 2.0, 'lr': 0.1}),  # a line that is still to be written
    ({}, {}),                                              # a step without one
    (None, {}),                                            # a line that was written
])
def test_the_record_of_the_last_version_becomes_the_figures_of_the_step(tmp_path, record, figures):
    loaded = load_saved(tmp_path, record=record)
    assert RunState.from_checkpoint(loaded).figures == figures


@pytest.mark.parametrize('stale', [0, 1, 3])
def test_evaluations_since_the_best_loss_survive(tmp_path, stale):
    """The last version saved their number, 'stale', where this one saves the step of the best."""
    config = {'dataset': 'x', 'eval_interval': 5}
    loaded = load_saved(tmp_path, iter_num=20, stale=stale, config=config)
    assert RunState.from_checkpoint(loaded).evaluations_since_best(5) == stale


@pytest.mark.parametrize('config', [{'trainable': 'head'}, {'unfreeze': {0: 'head'}}])
def test_a_frozen_run_that_did_not_count_its_moments_may_lack_some(config):
    _, optimizer = trained_model()
    some = {'state': {0: optimizer.state_dict()['state'][0]}}
    older = {'optimizer': some, 'config': config}
    resuming.restore_optimizer(optimizer, SCALER, older, 'a.pt')
    counted = {**older, 'moments': 2}
    assert 'state in a.pt' in problem(resuming.restore_optimizer, optimizer, SCALER, counted,
                                      'a.pt')
