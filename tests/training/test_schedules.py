"""The learning rate of each step."""
import math

import pytest

from plaingpt.training.schedules import learning_rate

RUN = dict(learning_rate=1e-2, min_lr=1e-3, warmup_iters=4, lr_decay_iters=24, decay_lr=True,
           schedule='cosine', decay_share=0.25)
# By step: in the warm-up, at its end, in the middle of the decay, and after it.
COSINE = {0: 2e-3, 3: 8e-3, 4: 1e-2, 9: 1e-3 + 9e-3 * (1 + math.sqrt(0.5)) / 2, 14: 5.5e-3,
          24: 1e-3, 99: 1e-3}
LINEAR = {0: 2e-3, 3: 8e-3, 4: 1e-2, 9: 7.75e-3, 14: 5.5e-3, 24: 1e-3, 99: 1e-3}
WSD = {0: 2e-3, 3: 8e-3, 4: 1e-2, 14: 1e-2, 18: 1e-2, 21: 5.5e-3, 24: 1e-3, 99: 1e-3}


@pytest.mark.parametrize('schedule, rates', [('cosine', COSINE), ('linear', LINEAR), ('wsd', WSD)])
def test_the_rate_warms_up_decays_and_stays(schedule, rates):
    run = RUN | {'schedule': schedule}
    found = {step: learning_rate(step, run) for step in rates}
    assert found == pytest.approx(rates)


def test_a_wsd_decay_longer_than_the_run_begins_after_the_warm_up():
    run = RUN | {'schedule': 'wsd', 'decay_share': 1.0}
    rates = [learning_rate(step, run) for step in (3, 4, 14)]
    assert rates == pytest.approx([8e-3, 1e-2, 5.5e-3])


@pytest.mark.parametrize('step', [0, 4, 99])
def test_without_decay_the_rate_is_constant(step):
    assert learning_rate(step, RUN | {'decay_lr': False}) == 1e-2


def test_a_decay_of_no_steps_does_not_divide_by_zero():
    run = RUN | {'warmup_iters': 5, 'lr_decay_iters': 5}
    assert learning_rate(5, run) == pytest.approx(1e-2)
