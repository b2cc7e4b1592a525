"""AdamW and Muon: their groups, their updates, their state, and runs with Muon."""
import copy

import pytest
import torch
from conftest import TINY, refused, run, succeeded, tiny_gpt, tiny_ids
from runs import (TWO_RANKS, assert_same_curve, equal_states, metrics, poisoned, resumable_step,
                  state, train)

from plaingpt.system.messages import UserError
from plaingpt.training.optimizers import MuonAdamW, expected_state, make_optimizer, muon_matrices

RUN = dict(optimizer='muon', muon_momentum=0.95, learning_rate=1e-2, muon_learning_rate=0.03,
           min_lr=1e-3, decay_lr=True, weight_decay=0.1, beta1=0.9, beta2=0.95)
MODERN = dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=1,
              logit_softcap=15.0, tied=False, zero_init=True)


def backward(gpt, seed=1):
    """Gives the parameters the gradients of a batch that depends on the seed."""
    x = tiny_ids(3, 16, seed=seed)
    gpt.zero_grad()
    _, loss = gpt(x, x)
    loss.backward()


# ---- groups ----

@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('changes', [{}, MODERN], ids=['gpt2', 'modern'])
def test_every_parameter_is_in_one_group(kind, changes):
    gpt = tiny_gpt(**changes)
    optimizer = make_optimizer(gpt, RUN | {'optimizer': kind}, 'cpu')
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group['params']]
    assert sorted(grouped) == sorted(id(parameter) for parameter in gpt.parameters())


def test_a_parameter_in_no_group_is_noticed(monkeypatch):
    gpt = tiny_gpt()
    incomplete = torch.optim.AdamW([gpt.lm_head.weight])
    monkeypatch.setattr(gpt, 'configure_optimizers', lambda *_: incomplete)
    with pytest.raises(AssertionError):
        make_optimizer(gpt, RUN | {'optimizer': 'adamw'}, 'cpu')


@pytest.mark.parametrize('changes, factors', [
    ({}, [1, 1, 3]),
    ({'optimizer': 'adamw'}, [1, 1]),
    ({'learning_rate': 0.0, 'min_lr': 0.0}, [1, 1, 1]),
])
def test_the_rates_of_the_groups_keep_their_proportion(changes, factors):
    optimizer = make_optimizer(tiny_gpt(), RUN | changes, 'cpu')
    assert [group['factor'] for group in optimizer.param_groups] == pytest.approx(factors)


def test_muon_needs_a_learning_rate_to_be_in_proportion_to(tmp_path, char_data):
    ended = train(tmp_path / 'out', char_data, learning_rate=0.0, min_lr=0.0, optimizer='muon')
    assert "optimizer='muon' needs a learning_rate above 0" in refused(ended)


# ---- updates ----

def names_of(gpt, parameters):
    """The names of these parameters, in the order of the model."""
    identities = {id(parameter) for parameter in parameters}
    return [name for name, parameter in gpt.named_parameters() if id(parameter) in identities]


def test_muon_takes_the_matrices_of_the_blocks_unless_they_are_frozen():
    gpt = tiny_gpt(tied=False, bias=True)
    frozen = 'transformer.h.0.attn.c_proj.weight'
    gpt.get_parameter(frozen).requires_grad_(False)
    layers = 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'
    matrices = [f'transformer.h.{block}.{layer}.weight' for block in (0, 1) for layer in layers]
    assert names_of(gpt, muon_matrices(gpt)) == matrices

    optimizer = make_optimizer(gpt, RUN, 'cpu')
    matrices.remove(frozen)
    assert names_of(gpt, optimizer.param_groups[2]['params']) == matrices


def test_muon_is_refused_where_all_its_matrices_are_frozen():
    gpt = tiny_gpt()
    gpt.transformer.h.requires_grad_(False)
    with pytest.raises(UserError, match='all of them are frozen'):
        make_optimizer(gpt, RUN, 'cpu')


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest_as_torch_does():
    shape = dict(n_kv_head=1, mlp='swiglu')
    ours = tiny_gpt(**shape)
    theirs = tiny_gpt(**shape)
    optimizer = make_optimizer(ours, RUN, 'cpu')

    # The same with torch's optimizers: each matrix that is stacked in a parameter is a parameter.
    rows_of = {'attn.c_attn': [16, 8, 8], 'attn.c_proj': [16], 'mlp.c_fc': [64, 64],
               'mlp.c_proj': [16]}
    parameters = dict(theirs.named_parameters())
    pieces_of = {}
    for block in 0, 1:
        for layer, rows in rows_of.items():
            name = f'transformer.h.{block}.{layer}.weight'
            pieces = parameters[name].detach().split(rows)
            pieces_of[name] = [torch.nn.Parameter(piece.clone()) for piece in pieces]
    all_pieces = [piece for pieces in pieces_of.values() for piece in pieces]
    muon = torch.optim.Muon(all_pieces, lr=0.03, weight_decay=0.1)
    others = [parameter for name, parameter in parameters.items() if name not in pieces_of]
    adamw = torch.optim.AdamW([
        {'params': [parameter for parameter in others if parameter.dim() == 2],
         'weight_decay': 0.1},
        {'params': [parameter for parameter in others if parameter.dim() == 1],
         'weight_decay': 0.0},
    ], lr=1e-2, betas=(0.9, 0.95), fused=True)

    for step in range(3):
        backward(ours, step)
        optimizer.step()
        backward(theirs, step)
        for name, pieces in pieces_of.items():
            gradients = parameters[name].grad.split([len(piece) for piece in pieces])
            for piece, gradient in zip(pieces, gradients, strict=True):
                piece.grad = gradient.clone()
        adamw.step()
        muon.step()
        for name, pieces in pieces_of.items():
            parameters[name].data.copy_(torch.cat(pieces))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_the_gradients_of_a_step_by_muon_are_freed_with_those_of_the_model():
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt, RUN, 'cpu')
    backward(gpt)
    optimizer.step()
    optimizer.zero_grad()
    assert all(piece.grad is None for piece in optimizer.muon.param_groups[0]['params'])


# ---- state ----

@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('changes', [{}, MODERN], ids=['gpt2', 'modern'])
def test_expected_state_is_the_state_after_a_step(kind, changes):
    gpt = tiny_gpt(**changes)
    optimizer = make_optimizer(gpt, RUN | {'optimizer': kind}, 'cpu')
    backward(gpt)
    optimizer.step()
    saved = optimizer.state_dict()['state']
    expected = expected_state(optimizer)
    assert list(range(len(expected))) == sorted(saved)
    for number, tensors in enumerate(expected):
        assert tensors == {name: tensor.shape for name, tensor in saved[number].items()}


def test_a_loaded_state_continues_as_if_nothing_had_happened():
    straight = tiny_gpt()
    resumed = tiny_gpt()
    first = make_optimizer(straight, RUN, 'cpu')
    second = make_optimizer(resumed, RUN, 'cpu')
    backward(straight)
    first.step()
    resumed.load_state_dict(straight.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # without a copy, it shares tensors
    for gpt, optimizer in (straight, first), (resumed, second):
        backward(gpt, 2)
        for group in optimizer.param_groups:
            group['lr'] = 0.5 * group['lr']
        optimizer.step()
    assert isinstance(second, MuonAdamW)
    assert len(second.state) == len(list(resumed.parameters()))
    for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---- runs ----

@pytest.fixture(scope='module')
def with_muon(tmp_path_factory, char_data):
    """out_dir of an undisturbed run of 6 steps of a modern model by Muon, evaluated at 0, 3, 6."""
    out_dir = tmp_path_factory.mktemp('muon') / 'out'
    succeeded(train(out_dir, char_data, eval_interval=3, dropout=0.2, optimizer='muon',
                    schedule='wsd', **MODERN))
    return out_dir


def test_a_modern_run_resumes_exactly(with_muon, tmp_path, char_data):
    keys = dict(eval_interval=3, dropout=0.2, optimizer='muon', schedule='wsd')
    succeeded(train(tmp_path / 'out', char_data, max_iters=3, **keys, **MODERN))
    # Without MODERN: the checkpoint has the architecture.
    succeeded(train(tmp_path / 'out', char_data, init_from='resume', **keys))
    assert metrics(tmp_path / 'out') == metrics(with_muon)
    assert equal_states(state(tmp_path / 'out' / 'last.pt'), state(with_muon / 'last.pt'))


def test_the_state_of_another_optimizer_is_refused(with_muon, tmp_path, char_data):
    kept = (with_muon / 'last.pt').read_bytes()
    ended = train(with_muon, char_data, init_from='resume', max_iters=8)
    assert 'resume with the optimizer that it was saved by' in refused(ended)
    assert (with_muon / 'last.pt').read_bytes() == kept


@pytest.mark.parametrize('tolerance, keys', [
    # Muon rounds to bfloat16, so another order of sums shows.
    (1e-3, dict(optimizer='muon', **MODERN)),
    pytest.param(1e-5, dict(unfreeze={0: 'head', 2: 'last:1', 4: 'all'}), marks=pytest.mark.slow),
])
def test_two_ranks_draw_the_curve_of_one(tmp_path, char_data, tolerance, keys):
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': 1, **keys}
    succeeded(run('train.py', out_dir=tmp_path / 'one', **keys))
    succeeded(run('train.py', out_dir=tmp_path / 'two', launcher=TWO_RANKS, **keys))
    assert_same_curve(tmp_path / 'one', tmp_path / 'two', tolerance)


def test_muon_moves_no_weight_by_a_gradient_that_is_not_finite(tmp_path, char_data):
    ended, out_dir = poisoned(tmp_path, char_data, optimizer='muon', log_interval=100,
                              checkpoint_interval=0)
    assert 'after step 3 the loss is' in refused(ended)
    assert 'error' in metrics(out_dir)[-1]
    assert resumable_step(out_dir) == 0
