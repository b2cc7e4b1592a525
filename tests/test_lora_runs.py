"""train.py with LoRA, and from weights of its own: what is trained, saved, resumed and sampled."""
import shutil

import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded
from runs import TWO_RANKS, assert_same_curve, equal_states, metrics, state, train

from plaingpt.formats import peft_adapter
from plaingpt.formats.peft_adapter import PREFIX, TENSORS

LORA = {'lora_rank': 2, 'lora_alpha': 8.0, 'lora_dropout': 0.1, 'lora_targets': 'c_attn,mlp.c_proj',
        'eval_interval': 3}


@pytest.fixture(scope='module')
def base(tmp_path_factory, char_data):
    """The folder of a run to start from."""
    folder = tmp_path_factory.mktemp('base') / 'out'
    succeeded(train(folder, char_data, max_iters=30, lr_decay_iters=30, eval_interval=30))
    return folder


@pytest.fixture(scope='module')
def adapted(tmp_path_factory, char_data, base):
    """(stdout, out_dir) of 6 steps of LoRA on it."""
    out_dir = tmp_path_factory.mktemp('adapted') / 'out'
    return succeeded(train(out_dir, char_data, init_from=base, **LORA)), out_dir


# ---- from the weights of another run ----

def test_a_run_starts_from_the_weights_of_another_but_at_step_0(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, init_from=base, max_iters=2, n_layer=4))
    first = metrics(out_dir)[0]
    assert first['step'] == 0
    assert first['val_loss'] == pytest.approx(metrics(base)[-1]['val_loss'], abs=1e-6)
    # The architecture is that of the base, whatever the flag says.
    assert state(out_dir / 'last.pt')['model_args']['n_layer'] == TINY['n_layer']


@pytest.mark.parametrize('lora_keys', [{}, LORA], ids=['all weights', 'lora'])
def test_a_context_without_learned_positions_grows_with_a_warning(tmp_path, char_data, lora_keys):
    succeeded(train(tmp_path / 'base', char_data, max_iters=1, position='rope'))
    keys = TINY | lora_keys | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'block_size': 24,
                               'init_from': tmp_path / 'base', 'max_iters': 2}
    ended = run('train.py', **keys)
    assert ended.returncode == 0
    assert 'block_size=24 is more than the 16 tokens that' in ended.stderr
    assert state(tmp_path / 'out' / 'last.pt')['model_args']['block_size'] == 24
    succeeded(train(tmp_path / 'out', char_data, init_from='resume', max_iters=3))


def test_a_run_does_not_start_from_its_own_folder(tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, max_iters=1))
    for name in ('out', 'out/ckpt.pt'):
        ended = train(tmp_path / 'out', char_data, init_from=tmp_path / name, **LORA)
        assert 'is out_dir, whose run a new one would move aside' in refused(ended)
    assert (tmp_path / 'out' / 'ckpt.pt').exists()


def test_a_folder_may_have_the_name_of_a_source(tmp_path, char_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for init_from in ('scratch', 'scratch', 'resume'):  # the second run moves the first one aside
        succeeded(train('scratch', char_data, init_from=init_from, max_iters=1))
    assert 'is out_dir' in refused(train('.', char_data, init_from='ckpt.pt', max_iters=1))


# ---- what a LoRA run trains and saves ----

def test_the_adapter_alone_is_trained_and_saved_and_peft_can_read_it(adapted, base):
    from safetensors.torch import load_file
    stdout, out_dir = adapted
    last = state(out_dir / 'last.pt')
    assert last['model']
    assert all('.lora_' in name for name in last['model'])
    assert {name.split('.')[4] for name in last['model']} == {'c_attn', 'c_proj'}
    assert len(last['optimizer']['state']) == len(last['model']) == 2 * 2 * 2
    assert (out_dir / 'last.pt').stat().st_size < (base / 'last.pt').stat().st_size
    trained = sum(tensor.numel() for tensor in last['model'].values())
    assert f'{trained:,} of them trained' in stdout

    saved = load_file(out_dir / 'adapter' / TENSORS)
    assert saved.keys() == {PREFIX + name for name in last['model']}
    for name, tensor in last['model'].items():
        assert torch.equal(saved[PREFIX + name], tensor), name


def test_an_adapter_learns(tmp_path, char_data, base):
    keys = LORA | {'max_iters': 60, 'lr_decay_iters': 60, 'eval_interval': 60, 'lora_dropout': 0.0,
                   'learning_rate': 0.03, 'lora_targets': 'c_attn,c_proj,c_fc'}
    succeeded(train(tmp_path / 'out', char_data, init_from=base, **keys))
    losses = [line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.slow
def test_two_ranks_train_the_adapter_of_one_with_dropout(tmp_path, char_data, base):
    # One micro-batch, so that the ranks share its rows.
    keys = TINY | LORA | {'dataset': char_data, 'init_from': base, 'lora_dropout': 0.2,
                          'gradient_accumulation_steps': 1}
    succeeded(run('train.py', **keys, out_dir=tmp_path / 'one'))
    succeeded(run('train.py', **keys, out_dir=tmp_path / 'two', launcher=TWO_RANKS))
    assert_same_curve(tmp_path / 'one', tmp_path / 'two')


def test_a_run_its_adapter_and_the_merged_model_write_the_same_text(tmp_path, adapted, base):
    keys = {'num_samples': 1, 'max_new_tokens': 20, 'temperature': 0, 'device': 'cpu',
            'dtype': 'float32'}
    _, out_dir = adapted
    merged = tmp_path / 'merged'
    expected = succeeded(run_here('sample.py', out_dir=out_dir, **keys))
    assert succeeded(run_here('sample.py', adapter=out_dir / 'adapter', **keys)) == expected
    succeeded(run_here('sample.py', adapter=out_dir / 'adapter', init_from=base, merge=merged,
                       device='cpu'))
    assert succeeded(run_here('sample.py', out_dir=merged, **keys)) == expected


def test_the_learning_rate_search_and_the_plan_know_adapters(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    stdout = succeeded(train(out_dir, char_data, init_from=base, find_lr=True, **LORA))
    assert '--learning_rate=' in stdout
    assert [path.name for path in out_dir.iterdir()] == ['find_lr.png']
    planned = succeeded(train(tmp_path / 'none', char_data, init_from=base, plan=True, **LORA))
    assert 'of them trained' in planned
    assert not (tmp_path / 'none').exists()


def test_a_new_run_moves_an_adapter_aside_too(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, init_from=base, **LORA | {'max_iters': 1}))
    succeeded(train(out_dir, char_data, max_iters=1))
    assert (out_dir / 'replaced' / '1' / 'adapter').is_dir()
    assert not (out_dir / 'adapter').exists()


# ---- resuming a LoRA run ----

def test_a_lora_run_resumes_exactly_without_its_flags(tmp_path, char_data, base, adapted):
    _, uninterrupted = adapted
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, init_from=base, **LORA | {'max_iters': 3}))
    succeeded(train(out_dir, char_data, init_from='resume', eval_interval=3))
    assert metrics(out_dir) == metrics(uninterrupted)
    assert equal_states(state(out_dir / 'last.pt'), state(uninterrupted / 'last.pt'))


def test_resume_auto_is_one_command_for_a_lora_run(tmp_path, char_data, base, adapted):
    _, uninterrupted = adapted
    keys = LORA | {'init_from': base, 'resume': 'auto'}
    succeeded(train(tmp_path / 'out', char_data, **keys | {'max_iters': 3}))
    succeeded(train(tmp_path / 'out', char_data, **keys))
    assert metrics(tmp_path / 'out') == metrics(uninterrupted)


def test_a_lora_run_without_its_base_says_where_that_was(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    moved = tmp_path / 'base'
    shutil.copytree(base, moved)
    succeeded(train(out_dir, char_data, init_from=moved, **LORA))
    moved.rename(tmp_path / 'elsewhere')
    ended = train(out_dir, char_data, init_from='resume')
    assert f'is an adapter of {moved}, which no longer exists: put it back' in refused(ended)
    moved.symlink_to(tmp_path / 'elsewhere')
    succeeded(train(out_dir, char_data, init_from='resume'))


def test_a_base_that_has_changed_is_refused_and_nothing_is_lost(tmp_path, char_data):
    last = tmp_path / 'out' / 'last.pt'
    succeeded(train(tmp_path / 'base', char_data, max_iters=1))
    keys = LORA | {'init_from': tmp_path / 'base', 'max_iters': 3}
    succeeded(train(tmp_path / 'out', char_data, **keys))
    succeeded(train(tmp_path / 'base', char_data, max_iters=2))
    before = last.read_bytes()
    ended = train(tmp_path / 'out', char_data, init_from='resume')
    assert 'belongs to other weights' in refused(ended)
    assert last.read_bytes() == before


def test_flags_that_a_resumed_adapter_can_not_follow_are_named(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, init_from=base, **LORA | {'max_iters': 1}))
    ended = train(out_dir, char_data, init_from='resume', max_iters=2, trainable='head')
    assert ended.returncode == 0
    assert 'trainable=head is not used' in ended.stderr


# ---- refusals ----

@pytest.mark.parametrize('keys, sentence', [
    ({'init_from': 'scratch'}, 'lora_rank adapts existing weights'),
    ({'init_from': 'scratch', 'resume': 'auto'}, 'lora_rank adapts existing weights'),
    ({'init_from': 'auto'}, "init_from='auto' is now --resume=auto"),
    ({'init_from': 'no/such'}, 'init_from=no/such is not scratch or resume, and no/such cannot'),
    ({'trainable': 'head'}, 'trains nothing but the adapter'),
    ({'lora_targets': 'lm_head'}, "lora_targets='lm_head'"),
    ({'lora_targets': 'lm_head', 'optimizer': 'muon'}, "lora_targets='lm_head'"),
])
def test_an_impossible_adapter_is_refused_before_anything_is_written(
        tmp_path, char_data, base, keys, sentence):
    keys = LORA | {'init_from': base} | keys
    ended = run('train.py', **TINY | keys, dataset=char_data, out_dir=tmp_path / 'out')
    assert sentence in refused(ended)
    assert not (tmp_path / 'out').exists()


def test_a_checkpoint_never_names_a_best_whose_adapter_could_not_be_written(
        tmp_path, char_data, base, monkeypatch):
    calls = []
    save_adapter = peft_adapter.save_adapter

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError('full')
        save_adapter(*arguments)

    monkeypatch.setattr(peft_adapter, 'save_adapter', fail_once)
    keys = LORA | {'max_iters': 1, 'eval_interval': 1, 'always_save_checkpoint': True}
    ended = train(tmp_path / 'out', char_data, init_from=base, **keys)
    assert 'could not be saved' in refused(ended)  # at the end, in its second save
    assert len(calls) == 2
    assert state(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 0
    assert state(tmp_path / 'out' / 'last.pt')['iter_num'] == 0
