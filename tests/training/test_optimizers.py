"""AdamW and Muon: their groups, their updates, skipped steps, their state, and runs with Muon."""
import copy
import math

import pytest
import torch
from conftest import TINY, refused, run, succeeded, tiny_gpt, tiny_ids
from runs import (TWO_RANKS, assert_same_curve, equal_states, metrics, poisoned, resumable_step,
                  state, train)

from plaingpt.system.messages import UserError
from plaingpt.training import optimizers
from plaingpt.training.optimizers import (MuonAdamW, Piece, can_skip, expected_state,
                                          make_optimizer, muon_matrices, orthogonalized, stacks_of)

RUN = dict(optimizer='muon', muon_momentum=0.95, learning_rate=1e-2, muon_learning_rate=0.03,
           min_lr=1e-3, decay_lr=True, weight_decay=0.1, beta1=0.9, beta2=0.95)
MODERN = dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=1,
              logit_softcap=15.0, tied=False, zero_init=True)


@pytest.fixture
def bfloat16_units(monkeypatch):
    """Makes Muon iterate in bfloat16, as torch.optim.Muon does, whatever CPU this is."""
    monkeypatch.setattr(optimizers, 'has_bfloat16_units', lambda: True)


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


# Products of matrices of at most 16^3 multiplications are computed by torch itself, and larger ones
# by oneDNN where it has bfloat16. A stack counts as one product, so the bits of 16 x 16 matrices
# can differ between torch.optim.Muon and ours. The matrices of this shape are larger.
LARGER = dict(n_embd=64, n_head=2)


def torch_optimizers(gpt, rows_of):
    """(torch.optim.Muon, AdamW, pieces) for gpt, with the settings of RUN.

    rows_of: {name: rows of the matrices in it}, for the parameters of Muon. pieces: {name: copies
    of these matrices}, which Muon trains, because it takes only whole parameters."""
    parameters = dict(gpt.named_parameters())
    pieces_of = {}
    for name, rows in rows_of.items():
        pieces = parameters[name].detach().split(rows)
        pieces_of[name] = [torch.nn.Parameter(piece.clone()) for piece in pieces]
    all_pieces = [piece for pieces in pieces_of.values() for piece in pieces]
    muon = torch.optim.Muon(all_pieces, lr=0.03, weight_decay=0.1, momentum=0.95)

    others = [parameter for name, parameter in parameters.items() if name not in pieces_of]
    matrices = [parameter for parameter in others if parameter.dim() == 2]
    vectors = [parameter for parameter in others if parameter.dim() == 1]
    adamw = torch.optim.AdamW([{'params': matrices, 'weight_decay': 0.1},
                               {'params': vectors, 'weight_decay': 0.0}],
                              lr=1e-2, betas=(0.9, 0.95), fused=True)
    return muon, adamw, pieces_of


@pytest.mark.usefixtures('bfloat16_units')
@pytest.mark.parametrize('stack_size', [2 ** 25, 10_000, 1])
@pytest.mark.parametrize('changes, fc_rows', [
    ({}, [256]),
    (dict(n_kv_head=1, mlp='swiglu'), [192, 192]),
], ids=['gpt2', 'modern'])
def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest_as_torch_does(
        monkeypatch, stack_size, changes, fc_rows):
    monkeypatch.setattr(optimizers, 'STACK_SIZE', stack_size)
    ours = tiny_gpt(**LARGER, **changes)
    theirs = tiny_gpt(**LARGER, **changes)
    optimizer = make_optimizer(ours, RUN, 'cpu')
    kv_rows = 32 if 'n_kv_head' in changes else 64
    layers = {'attn.c_attn': [64, kv_rows, kv_rows], 'attn.c_proj': [64],
              'mlp.c_fc': fc_rows, 'mlp.c_proj': [64]}
    rows_of = {f'transformer.h.{block}.{layer}.weight': rows
               for block in (0, 1) for layer, rows in layers.items()}
    muon, adamw, pieces_of = torch_optimizers(theirs, rows_of)

    parameters = dict(theirs.named_parameters())
    for step in range(4):
        backward(ours, step)
        optimizer.step()
        backward(theirs, step)
        for name, pieces in pieces_of.items():
            gradients = parameters[name].grad.split(rows_of[name])
            for piece, gradient in zip(pieces, gradients, strict=True):
                piece.grad = gradient.clone()
        adamw.step()
        muon.step()
        for name, pieces in pieces_of.items():
            parameters[name].data.copy_(torch.cat(pieces))

    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
        moments = optimizer.state[parameter]
        if name in pieces_of:
            momenta = [muon.state[piece]['momentum_buffer'] for piece in pieces_of[name]]
            assert torch.equal(moments['momentum_buffer'], torch.cat(momenta)), name
        else:
            for moment, values in adamw.state[parameters[name]].items():
                assert torch.equal(moments[moment], values), (name, moment)


@pytest.mark.parametrize('has_units, dtype', [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize('shape', [(3, 24, 40), (3, 40, 24), (1, 32, 32), (2, 1, 40)])
def test_orthogonalized_matrices_have_singular_values_of_about_1(shape, has_units, dtype,
                                                                 monkeypatch):
    monkeypatch.setattr(optimizers, 'has_bfloat16_units', lambda: has_units)
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalized(stack)
    assert result.dtype == dtype
    result = result.float()
    assert result.shape == stack.shape
    singular_values = torch.linalg.svdvals(result)
    assert singular_values.min() > 0.5
    assert singular_values.max() < 1.3
    # They still point in the directions of the stack.
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    assert torch.linalg.matrix_norm(result - left @ right, 2).max() < 0.5


def test_a_matrix_of_zeros_stays_so():
    assert not orthogonalized(torch.zeros(2, 24, 40)).any()


def test_stacks_have_one_shape_and_a_bounded_size(monkeypatch):
    monkeypatch.setattr(optimizers, 'STACK_SIZE', 100)
    pieces = []
    for number, shape in enumerate([(5, 8), (8, 5), (5, 8), (20, 10), (5, 8), (20, 10)]):
        pieces.append(Piece(torch.full(shape, float(number)), None, None))
    numbers = [[piece.weight[0, 0].item() for piece in stack] for stack in stacks_of(pieces)]
    # Two of 40 numbers fit in a stack, and one of 200 has a stack of its own.
    assert numbers == [[0, 2], [4], [1], [3], [5]]


def test_temporary_memory_is_that_of_the_largest_stack(monkeypatch):
    gpt = tiny_gpt()  # with 8 matrices of 16 x 16, 2 of 64 x 16 and 2 of 16 x 64
    assert optimizers.temporary_memory(gpt) == 14 * 2 * 64 * 16
    monkeypatch.setattr(optimizers, 'STACK_SIZE', 3 * 16 * 16)
    assert optimizers.temporary_memory(gpt) == 14 * 64 * 16


def test_a_frozen_matrix_takes_no_part_and_gets_no_state():
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt, RUN, 'cpu')
    frozen = gpt.get_parameter('transformer.h.0.mlp.c_fc.weight')
    before = frozen.detach().clone()
    frozen.requires_grad_(False)
    backward(gpt)
    optimizer.step()
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    assert len(optimizer.state) == len(list(gpt.parameters())) - 1


# ---- skipped steps ----

def snapshot(gpt, optimizer):
    """Copies of weights and moments, for equal_states()."""
    return copy.deepcopy({'model': gpt.state_dict(), 'optimizer': optimizer.state_dict()})


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_skipped_step_changes_nothing(kind, value):
    gpt = tiny_gpt(**MODERN)
    optimizer = make_optimizer(gpt, RUN | {'optimizer': kind}, 'cpu')
    backward(gpt)
    optimizer.step()
    before = snapshot(gpt, optimizer)
    for parameter in gpt.parameters():
        parameter.grad.fill_(value)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert equal_states(snapshot(gpt, optimizer), before)

    # The next step is the one that would have followed the first.
    twin = tiny_gpt(**MODERN)
    undisturbed = make_optimizer(twin, RUN | {'optimizer': kind}, 'cpu')
    optimizer.found_inf = torch.zeros(())
    backward(twin)
    undisturbed.step()
    backward(gpt, 2)
    optimizer.step()
    backward(twin, 2)
    undisturbed.step()
    assert equal_states(snapshot(gpt, optimizer), snapshot(twin, undisturbed))


def test_a_first_step_that_is_skipped_leaves_momenta_of_0():
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt, RUN, 'cpu')
    weights = copy.deepcopy(gpt.state_dict())
    for parameter in gpt.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for name, weight in gpt.state_dict().items():
        assert torch.equal(weight, weights[name])
    for moments in optimizer.state.values():
        assert not any(tensor.any() for tensor in moments.values())


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_all_but_metal_can_skip_a_step_by_themselves(kind):
    optimizer = make_optimizer(tiny_gpt(), RUN | {'optimizer': kind}, 'cpu')
    assert can_skip(optimizer, 'cpu')
    assert can_skip(optimizer, 'cuda')
    assert not can_skip(optimizer, 'mps')


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_an_optimizer_that_is_not_fused_cannot_skip_a_step_by_itself(kind):
    optimizer = make_optimizer(tiny_gpt(), RUN | {'optimizer': kind}, 'a device of no kind')
    assert not can_skip(optimizer, 'cpu')


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
