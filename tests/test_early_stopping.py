"""train.py with early_stop: the run ends after so many evaluations without a new best."""
import pytest
from conftest import TINY, run, succeeded
from runs import TWO_RANKS, losses, metrics, patched, state, train


def test_early_stop_ends_the_run_after_so_many_worse_evaluations(tmp_path, char_data):
    keys = dict(eval_interval=1, early_stop=2, max_iters=40, learning_rate=3.0, min_lr=3.0,
                warmup_iters=0)
    stdout = succeeded(train(tmp_path / 'out', char_data, **keys))
    curve = losses(tmp_path / 'out')
    end = max(curve)
    assert end < 40
    assert curve[end - 2] == min(curve.values())
    assert f'ended by early_stop=2 at step {end}. Now try' in stdout
    last = state(tmp_path / 'out' / 'last.pt')
    assert (last['iter_num'], last['best_step']) == (end, end - 2)

    # Resumed after its end, the run does not continue.
    succeeded(train(tmp_path / 'out', char_data, init_from='resume', **keys))
    assert state(tmp_path / 'out' / 'last.pt')['iter_num'] == end

    # Resumed between the worse evaluations, it ends at the same step.
    succeeded(train(tmp_path / 'parts', char_data, **keys | {'max_iters': end - 1}))
    succeeded(train(tmp_path / 'parts', char_data, init_from='resume', **keys))
    assert metrics(tmp_path / 'parts') == metrics(tmp_path / 'out')


# Gives evaluations these losses, and lets the save at step 2 fail.
LOSSES_AND_A_FULL_DISK = """
from plaingpt.training import checkpoints
means = []
def mean(tensor):
    means.append(tensor)
    evaluation = (len(means) - 1) // 2  # each takes the mean of train and of val
    return torch.tensor({losses}[evaluation])
def save(out_dir, checkpoint, names, original=checkpoints.save):
    if checkpoint['iter_num'] == 2:
        raise OSError(28, 'No space left on device')
    original(out_dir, checkpoint, names)
torch.Tensor.mean = mean
checkpoints.save = save
"""


@pytest.mark.slow
def test_ranks_agree_to_stop_early_after_a_save_has_failed(tmp_path, char_data):
    script = patched(tmp_path, LOSSES_AND_A_FULL_DISK, losses=[3.0, 2.0, 2.5, 2.6, 2.7])
    keys = TINY | {'dataset': char_data, 'eval_interval': 2, 'max_iters': 20, 'early_stop': 2}
    stdout = succeeded(run(script, launcher=TWO_RANKS, timeout=100, out_dir=tmp_path / 'out',
                           **keys))
    # The weights of 2.0 are not on the disk, so 2.5 is a new best, and the next two are worse.
    assert 'ended by early_stop=2 at step 8' in stdout
    assert 'best validation loss 2.5' in stdout
