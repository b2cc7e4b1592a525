"""The search for a learning rate: what it tries, when it ends, and what it suggests."""
import math
import re
from types import SimpleNamespace

import pytest
from conftest import succeeded
from runs import losses, train

from plaingpt.system.messages import UserError
from plaingpt.training import learning_rate_search
from plaingpt.training.guard import Halt, StepReport


class Training:
    """Stands for train_step and for the guard, with a loss that is a function of the rate."""

    def __init__(self, loss_at, factor=1.0):
        self.loss_at = loss_at
        self.optimizer = SimpleNamespace(param_groups=[{'factor': 1.0}, {'factor': factor}])
        self.steps = []
        self.rate = None

    def train_step(self, step, rate):
        self.steps.append(step)
        self.rate = rate

    def read(self):
        loss = self.loss_at(self.rate)
        halted = None if math.isfinite(loss) else Halt(self.steps[-1] + 1, loss, 1.0)
        return StepReport(loss, 1.0, 0, 0, 1, halted)

    def search(self, **options):
        return learning_rate_search.find(self.train_step, self, **options)


def valley(rate):
    """A loss that is lowest, 1, at a rate of 0.01."""
    return 1 + abs(math.log10(rate) + 2)


def test_the_rate_rises_by_the_same_factor_from_step_to_step():
    training = Training(lambda rate: 1.0)
    sweep = training.search(first_step=7, lowest=1e-3, highest=1e3, steps=7)
    assert sweep.rates == pytest.approx([1e-3, 1e-2, 1e-1, 1, 1e1, 1e2, 1e3])
    assert training.steps == [7, 8, 9, 10, 11, 12, 13]
    assert sweep.losses == [1.0] * 7
    assert sweep.smoothed == pytest.approx([1.0] * 7)


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss(capsys):
    sweep = Training(valley).search()
    lowest_at = sweep.rates[sweep.smoothed.index(min(sweep.smoothed))]
    assert 1e-2 < lowest_at < 1e-1  # the smoothed loss is late
    assert sweep.suggestion == pytest.approx(lowest_at / 10)
    assert capsys.readouterr().out.endswith(f'try --learning_rate={sweep.suggestion:.1e}\n')


def test_with_muon_its_rate_is_suggested_too(capsys):
    sweep = Training(valley, factor=2.0).search()
    assert f' --muon_learning_rate={2 * sweep.suggestion:.1e}\n' in capsys.readouterr().out


def test_the_search_ends_where_the_loss_diverges():
    sweep = Training(lambda rate: 1.0 if rate < 1 else 100.0).search()
    assert sweep.rates[-1] == pytest.approx(1, rel=0.1)


def test_steps_that_are_not_finite_are_not_in_the_sweep():
    sweep = Training(lambda rate: 1.0 if rate < 1e-3 else math.nan).search()
    assert max(sweep.rates) < 1e-3
    assert len(sweep.rates) == len(sweep.losses) == len(sweep.smoothed)


def test_a_loss_that_is_not_finite_from_the_start_is_refused():
    with pytest.raises(UserError, match='not finite even at the lowest learning rate'):
        Training(lambda rate: math.nan).search()


# ---- runs ----

def test_find_lr_on_a_run_writes_a_picture_and_nothing_else(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, optimizer='muon', max_iters=2))
    before = {path.name: path.read_bytes() for path in out_dir.iterdir() if path.is_file()}
    stdout = succeeded(train(out_dir, char_data, init_from='resume', optimizer='muon',
                             find_lr=True))
    after = {path.name: path.read_bytes() for path in out_dir.iterdir() if path.is_file()}
    assert after.pop('find_lr.png').startswith(b'\x89PNG')
    assert after == before
    rates = re.search(r'--learning_rate=(\S+) --muon_learning_rate=(\S+)$', stdout.strip())
    # The defaults: 0.02 for Muon, and 0.01 in TINY.
    assert float(rates[2]) == pytest.approx(2 * float(rates[1]), rel=0.1)


def test_find_lr_suggests_a_rate_that_learns(tmp_path, char_data):
    stdout = succeeded(train(tmp_path / 'search', char_data, find_lr=True))
    assert [path.name for path in (tmp_path / 'search').iterdir()] == ['find_lr.png']
    suggestion = float(stdout.rpartition('--learning_rate=')[2])
    assert 1e-5 < suggestion < 1

    keys = dict(max_iters=60, eval_interval=60, lr_decay_iters=60, min_lr=0.0)
    succeeded(train(tmp_path / 'suggested', char_data, learning_rate=suggestion, **keys))
    succeeded(train(tmp_path / 'lower', char_data, learning_rate=suggestion / 100, **keys))
    assert losses(tmp_path / 'suggested')[60] < losses(tmp_path / 'lower')[60] - 0.3
