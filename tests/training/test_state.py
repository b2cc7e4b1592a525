"""plaingpt/training/state.py: the plain values of a run survive a checkpoint."""
import math

from plaingpt.training.guard import StepReport
from plaingpt.training.state import Best, RunState


def report(**changes):
    """What the guard reports of one step that went well."""
    fields = dict(loss=2.0, grad_norm=0.5, skipped=0, clipped=0, steps=1, halted=None)
    return StepReport(**{**fields, **changes})


def test_a_state_comes_back_from_its_checkpoint():
    state = RunState(step=7, tokens=700, best=Best(1.5, 6), elapsed=2.5, unlogged=1, clipped=1,
                     skipped=2, figures={'loss': 2.0}, run_id='abcd')
    assert RunState.from_checkpoint(state.to_checkpoint()) == state


def test_a_new_run_has_a_fresh_state_and_a_name_of_its_own():
    first = RunState.from_checkpoint({})
    second = RunState.from_checkpoint({})
    assert (first.step, first.tokens, first.best) == (0, 0, Best(math.inf, 0))
    assert first.run_id != second.run_id


def test_a_line_has_the_share_of_steps_clipped_since_the_line_before():
    state = RunState()
    state.count(report(steps=3, clipped=1))
    state.count(report(steps=1, clipped=1))
    assert state.close_line(report()) == {'loss': 2.0, 'grad_norm': 0.5, 'clipped': 0.5}
    state.count(report(steps=2, clipped=0))
    assert state.close_line(report())['clipped'] == 0.0


def test_a_gradient_norm_that_is_not_finite_is_null_in_the_record():
    for norm in math.inf, math.nan:
        assert RunState().close_line(report(grad_norm=norm))['grad_norm'] is None


def test_evaluations_are_counted_since_the_best():
    state = RunState(best=Best(1.5, 6))
    for step, evaluations in (6, 0), (8, 0), (9, 1), (12, 2):
        state.step = step
        assert state.evaluations_since_best(eval_interval=3) == evaluations
