"""How the weights move: schedules, Muon, freezing, the search for a rate, early stopping, the figures of health."""
import copy
import math
import re

import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded, tiny_gpt, tiny_ids
from test_distributed import STANDALONE as TWO_RANKS
from test_distributed import same_curve
from test_survival import patched
from test_train import equal_states, metrics, state, train

from plaingpt.training.health import Health
from plaingpt.training.optimizers import MuonAdamW, learning_rate, make_optimizer

RUN = dict(optimizer='muon', muon_momentum=0.95, learning_rate=1e-2, muon_learning_rate=0.03, min_lr=1e-3,
           warmup_iters=4, lr_decay_iters=24, decay_lr=True, schedule='cosine', decay_share=0.25, weight_decay=0.1,
           beta1=0.9, beta2=0.95)
MODERN = dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=1, logit_softcap=15.0, tied=False,
              zero_init=True)


# ---- schedules ----

@pytest.mark.parametrize('schedule, rates', [
    ('cosine', {0: 2e-3, 3: 8e-3, 4: 1e-2, 14: 5.5e-3, 9: 1e-3 + 9e-3 * (1 + math.sqrt(0.5)) / 2, 24: 1e-3, 99: 1e-3}),
    ('linear', {0: 2e-3, 3: 8e-3, 4: 1e-2, 14: 5.5e-3, 9: 7.75e-3, 24: 1e-3, 99: 1e-3}),
    ('wsd', {0: 2e-3, 3: 8e-3, 4: 1e-2, 14: 1e-2, 18: 1e-2, 21: 5.5e-3, 24: 1e-3, 99: 1e-3})])
def test_the_rate_warms_up_decays_and_stays(schedule, rates):
    found = {step: learning_rate(step, RUN | {'schedule': schedule}) for step in rates}
    assert found == pytest.approx(rates)


def test_a_decay_longer_than_the_run_begins_after_the_warm_up_and_none_is_constant():
    run = RUN | {'schedule': 'wsd', 'decay_share': 1.0}
    assert [learning_rate(step, run) for step in (3, 4, 14)] == pytest.approx([8e-3, 1e-2, 5.5e-3])
    assert learning_rate(0, RUN | {'decay_lr': False}) == 1e-2
    assert learning_rate(5, RUN | {'warmup_iters': 5, 'lr_decay_iters': 5}) == pytest.approx(1e-2)  # not 0 / 0


# ---- Muon ----

def gradients(gpt, seed=1):
    x = tiny_ids(3, 16, seed=seed)
    gpt.zero_grad()
    gpt(x, x)[1].backward()


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest_as_torch_does():
    shape = dict(n_kv_head=1, mlp='swiglu')
    ours, theirs = tiny_gpt(**shape), tiny_gpt(**shape)
    optimizer, named = make_optimizer(ours, RUN, 'cpu'), dict(theirs.named_parameters())
    rows = {'attn.c_attn': [16, 8, 8], 'attn.c_proj': [16], 'mlp.c_fc': [64, 64], 'mlp.c_proj': [16]}
    matrices = {f'transformer.h.{block}.{name}.weight': sizes for block in (0, 1) for name, sizes in rows.items()}
    pieces = {name: [torch.nn.Parameter(piece.clone()) for piece in named[name].detach().split(sizes)]
              for name, sizes in matrices.items()}
    muon = torch.optim.Muon([piece for some in pieces.values() for piece in some], lr=0.03, weight_decay=0.1)
    adamw = torch.optim.AdamW([
        {'params': [p for name, p in named.items() if name not in matrices and p.dim() == 2], 'weight_decay': 0.1},
        {'params': [p for name, p in named.items() if p.dim() == 1], 'weight_decay': 0.0}],
        lr=1e-2, betas=(0.9, 0.95), fused=True)
    for step in range(3):
        gradients(ours, step)
        optimizer.step()
        gradients(theirs, step)
        for name, sizes in matrices.items():
            for piece, gradient in zip(pieces[name], named[name].grad.split(sizes), strict=True):
                piece.grad = gradient.clone()
        adamw.step()
        muon.step()
        for name, some in pieces.items():
            named[name].data.copy_(torch.cat(some))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_rates_of_the_groups_keep_their_proportion():
    optimizer = make_optimizer(tiny_gpt(), RUN, 'cpu')
    assert [group['factor'] for group in optimizer.param_groups] == pytest.approx([1, 1, 3])
    assert {group['factor'] for group in make_optimizer(tiny_gpt(), RUN | {'learning_rate': 0.0, 'min_lr': 0.0}, 'cpu')
            .param_groups} == {1.0}
    assert [group['factor'] for group in make_optimizer(tiny_gpt(), RUN | {'optimizer': 'adamw'}, 'cpu')
            .param_groups] == [1, 1]


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('changes', [{}, MODERN], ids=['gpt2', 'modern'])
def test_every_parameter_is_in_one_group(kind, changes):
    gpt = tiny_gpt(**changes)
    groups = make_optimizer(gpt, RUN | {'optimizer': kind}, 'cpu').param_groups
    assert sorted(id(p) for group in groups for p in group['params']) == sorted(map(id, gpt.parameters()))


def test_a_parameter_that_no_group_has_is_noticed(monkeypatch):
    gpt = tiny_gpt()
    monkeypatch.setattr(gpt, 'configure_optimizers', lambda *_: torch.optim.AdamW([gpt.lm_head.weight]))
    with pytest.raises(AssertionError):
        make_optimizer(gpt, RUN | {'optimizer': 'adamw'}, 'cpu')


def test_a_loaded_state_goes_on_as_if_nothing_had_happened():
    straight, resumed = tiny_gpt(), tiny_gpt()
    first, second = make_optimizer(straight, RUN, 'cpu'), make_optimizer(resumed, RUN, 'cpu')
    gradients(straight)
    first.step()
    resumed.load_state_dict(straight.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # which would share its tensors
    for gpt, optimizer in (straight, first), (resumed, second):
        gradients(gpt, 2)
        for group in optimizer.param_groups:
            group['lr'] = 0.5 * group['lr']
        optimizer.step()
    assert isinstance(second, MuonAdamW) and len(second.state) == len(list(resumed.parameters()))
    for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope='module')
def with_muon(tmp_path_factory, char_data):
    """out_dir of an undisturbed run of 6 steps of a modern model by Muon, evaluated at 0, 3 and 6."""
    out_dir = tmp_path_factory.mktemp('muon') / 'out'
    succeeded(train(out_dir, char_data, eval_interval=3, dropout=0.2, optimizer='muon', schedule='wsd', **MODERN))
    return out_dir


def test_a_modern_run_resumes_exactly(with_muon, tmp_path, char_data):
    flags = dict(eval_interval=3, dropout=0.2, optimizer='muon', schedule='wsd')
    succeeded(train(tmp_path / 'out', char_data, max_iters=3, **flags, **MODERN))
    succeeded(train(tmp_path / 'out', char_data, init_from='resume', **flags))  # whose shape the checkpoint has
    assert metrics(tmp_path / 'out') == metrics(with_muon)
    assert equal_states(state(tmp_path / 'out' / 'last.pt'), state(with_muon / 'last.pt'))


def test_a_state_of_another_optimizer_is_refused(with_muon, tmp_path, char_data):
    kept = (with_muon / 'last.pt').read_bytes()
    sentence = refused(train(with_muon, char_data, init_from='resume', max_iters=8))
    assert 'resume with the optimizer that it was saved by' in sentence and (with_muon / 'last.pt').read_bytes() == kept


@pytest.mark.parametrize('tolerance, keys', [
    (1e-3, dict(optimizer='muon', **MODERN)),  # which rounds to bfloat16, so that another order of sums shows
    pytest.param(1e-5, dict(unfreeze={0: 'head', 2: 'last:1', 4: 'all'}), marks=pytest.mark.slow)])
def test_two_ranks_draw_the_curve_of_one(tmp_path, char_data, tolerance, keys):
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': 1, **keys}
    succeeded(run('train.py', out_dir=tmp_path / 'one', **keys))
    succeeded(run('train.py', out_dir=tmp_path / 'two', launcher=TWO_RANKS, **keys))
    same_curve(tmp_path / 'one', tmp_path / 'two', tolerance)


def test_a_gradient_that_is_not_finite_moves_no_weight_by_muon_either(tmp_path, char_data):
    from test_guard import poisoned
    ended, out_dir = poisoned(tmp_path, char_data, optimizer='muon', log_interval=100, checkpoint_interval=0)
    assert 'after step 3 the loss is' in refused(ended)
    assert 'error' in metrics(out_dir)[-1] and not (out_dir / 'last.pt').exists()


# ---- the search for a rate ----

def test_find_lr_suggests_a_rate_that_learns_and_writes_a_picture_alone(with_muon, tmp_path, char_data):
    before = {path.name: path.read_bytes() for path in with_muon.iterdir() if path.is_file()}
    stdout = succeeded(train(with_muon, char_data, init_from='resume', optimizer='muon', find_lr=True))
    after = {path.name: path.read_bytes() for path in with_muon.iterdir() if path.is_file()}
    assert after.pop('find_lr.png').startswith(b'\x89PNG') and after == before
    rates = re.search(r'--learning_rate=(\S+) --muon_learning_rate=(\S+)$', stdout.strip())
    assert float(rates[2]) == pytest.approx(2 * float(rates[1]), rel=0.1)  # as 0.02 is to 0.01
    out_dir = tmp_path / 'new'
    suggestion = succeeded(train(out_dir, char_data, find_lr=True)).rpartition('--learning_rate=')[2]
    assert [path.name for path in out_dir.iterdir()] == ['find_lr.png'] and 1e-5 < float(suggestion) < 1
    keys = dict(max_iters=60, eval_interval=60, lr_decay_iters=60)
    found = [train(tmp_path / str(rate), char_data, learning_rate=rate, min_lr=0.0, **keys) and
             metrics(tmp_path / str(rate))[-1]['val_loss'] for rate in (float(suggestion), float(suggestion) / 100)]
    assert found[0] < found[1] - 0.3


# ---- early stopping ----

def test_early_stop_ends_the_run_after_so_many_worse_evaluations_also_when_resumed(tmp_path, char_data):
    keys = dict(eval_interval=1, early_stop=2, max_iters=40, learning_rate=3.0, min_lr=3.0, warmup_iters=0)
    stdout = succeeded(train(tmp_path / 'out', char_data, **keys))
    losses = [line['val_loss'] for line in metrics(tmp_path / 'out')]
    assert min(losses) == losses[-3] and len(losses) < 41
    assert f'ended by early_stop=2 at step {len(losses) - 1}. Now try' in stdout
    last = state(tmp_path / 'out' / 'last.pt')
    assert (last['iter_num'], last['stale']) == (len(losses) - 1, 2)
    succeeded(train(tmp_path / 'out', char_data, init_from='resume', **keys))  # and does not go on
    assert state(tmp_path / 'out' / 'last.pt')['iter_num'] == last['iter_num']
    succeeded(train(tmp_path / 'part', char_data, **keys | {'max_iters': len(losses) - 2}))
    succeeded(train(tmp_path / 'part', char_data, init_from='resume', **keys))
    assert metrics(tmp_path / 'part') == metrics(tmp_path / 'out')


REFUSED_SAVE = """
from plaingpt.training import checkpoints
losses = iter({losses})
def refuse(out_dir, state, names, original=checkpoints.save):
    if state['iter_num'] == 2:
        raise OSError(28, 'No space left on device')
    original(out_dir, state, names)
checkpoints.save = refuse
torch.Tensor.mean = lambda tensor, dim, mean=torch.Tensor.mean: mean(tensor, dim) * 0 + next(losses)
"""


@pytest.mark.slow
def test_ranks_agree_to_stop_early_also_where_a_save_was_refused(tmp_path, char_data):
    script = patched(tmp_path, REFUSED_SAVE, losses=[3.0, 2.0, 2.5, 2.6, 2.7])
    keys = TINY | {'dataset': char_data, 'eval_interval': 2, 'max_iters': 20, 'early_stop': 2}
    stdout = succeeded(run(script, launcher=TWO_RANKS, timeout=100, out_dir=tmp_path / 'out', **keys))
    # 2.0 could not be saved, so 2.5 was the best that there is, on both ranks, and was bettered by neither of the next.
    assert 'ended by early_stop=2 at step 8' in stdout and 'best validation loss 2.5' in stdout


def test_the_gradients_of_a_step_by_muon_are_freed_with_the_models():
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt, RUN, 'cpu')
    gradients(gpt)
    optimizer.step()
    optimizer.zero_grad()
    assert all(piece.grad is None for piece in optimizer.muon.param_groups[0]['params'])


# ---- health ----

def test_health_is_the_norm_of_the_weights_and_of_the_step():
    gpt = tiny_gpt(tied=False)
    health, before = Health(gpt), {name: p.detach().clone() for name, p in gpt.named_parameters()}
    gradients(gpt)
    gpt.transformer.h[0].attn.c_attn.weight.grad = None  # frozen
    with health.watch():
        make_optimizer(gpt, RUN | {'optimizer': 'adamw'}, 'cpu').step()
    kinds = {'embedding': ('wte', 'wpe'), 'attention': ('.attn.',), 'mlp': ('.mlp.',), 'head': ('lm_head',),
             'norm': ('.ln_',)}
    figures = health.figures()
    assert figures['weight_norm'].keys() == figures['update_ratio'].keys() == kinds.keys()
    after = dict(gpt.named_parameters())
    for kind, parts in kinds.items():
        names = [name for name in after if any(part in name for part in parts) and after[name].grad is not None]
        weights = torch.cat([before[name].flatten() for name in names])
        step = torch.cat([(after[name] - before[name]).flatten() for name in names])
        assert figures['weight_norm'][kind] == pytest.approx(weights.norm().item(), rel=1e-5)
        assert figures['update_ratio'][kind] == pytest.approx((step.norm() / weights.norm()).item(), rel=1e-4)
    with health.watch(False):
        pass
    assert health.figures() == {}


def test_of_large_tensors_a_sample_stands_for_the_norms():
    gpt = tiny_gpt(n_embd=128, vocab_size=1000)
    with torch.no_grad():
        gpt.lm_head.weight[:, ::2] *= 5  # a stride that met every other column alone would tell
    health, gradient = Health(gpt), torch.randn(gpt.lm_head.weight.shape)
    gpt.lm_head.weight.grad = gradient
    norm = gpt.lm_head.weight.norm().item()
    with health.watch():
        torch.optim.SGD([gpt.lm_head.weight], lr=1e-3).step()
    figures = health.figures()
    assert max(map(len, health.samples)) < 2 * Health.SAMPLE < gpt.lm_head.weight.numel()
    assert figures['weight_norm'] == {'embedding': pytest.approx(norm, rel=0.05)}
    assert figures['update_ratio'] == {'embedding': pytest.approx(1e-3 * gradient.norm().item() / norm, rel=0.05)}


def test_the_share_of_clipped_steps_is_the_same_where_a_run_is_resumed_between_lines(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'log_interval': 5, 'max_iters': 10, 'eval_interval': 3, 'init_from': 'auto'}
    succeeded(run_here('train.py', **keys, out_dir=tmp_path / 'unclipped'))
    norms = sorted(line['grad_norm'] for line in metrics(tmp_path / 'unclipped') if 'grad_norm' in line)
    keys['grad_clip'] = norms[1]  # some are clipped, and some are not
    for name, ends in ('whole', [10]), ('parts', [3, 6, 10]):
        for keys['max_iters'] in ends:
            succeeded(run_here('train.py', **keys, out_dir=tmp_path / name))
    lines = metrics(tmp_path / 'whole')
    assert metrics(tmp_path / 'parts') == lines and any(0 < line.get('clipped', 0) < 1 for line in lines)


def test_muon_wants_a_rate_to_be_in_proportion_to(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'learning_rate': 0.0, 'min_lr': 0.0}
    assert "optimizer='muon' needs a learning_rate above 0" in refused(run_here('train.py', **keys, optimizer='muon'))


def test_the_share_of_clipped_steps_is_of_those_since_the_last_line(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'log_interval': 2}
    succeeded(run_here('train.py', **keys))
    norms = [line['grad_norm'] for line in metrics(tmp_path / 'out') if 'grad_norm' in line]
    succeeded(run_here('train.py', **keys | {'out_dir': tmp_path / 'all', 'grad_clip': 1e-9}))
    succeeded(run_here('train.py', **keys | {'out_dir': tmp_path / 'none', 'grad_clip': 2 * max(norms)}))
    for name, share in ('all', 1.0), ('none', 0.0):
        assert [line['clipped'] for line in metrics(tmp_path / name) if 'clipped' in line] == [share] * len(norms)
