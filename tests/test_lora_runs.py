"""train.py with LoRA, and from checkpoints of its own: what is trained, saved, resumed and sampled."""
import shutil

import pytest
import torch
from conftest import TINY, refused, run, run_here, succeeded
from test_distributed import STANDALONE as TWO_RANKS
from test_distributed import same_curve
from test_train import equal_states, metrics, state, train

LORA = dict(lora_rank=2, lora_alpha=8.0, lora_dropout=0.1, lora_targets='c_attn,mlp.c_proj', eval_interval=3)


@pytest.fixture(scope='module')
def base(tmp_path_factory, char_data):
    """The folder of a run to go on from."""
    folder = tmp_path_factory.mktemp('base') / 'out'
    succeeded(train(folder, char_data, max_iters=30, lr_decay_iters=30, eval_interval=30))
    return folder


@pytest.fixture(scope='module')
def adapted(tmp_path_factory, char_data, base):
    """(stdout, out_dir) of 6 steps of LoRA on that."""
    out_dir = tmp_path_factory.mktemp('adapted') / 'out'
    return succeeded(train(out_dir, char_data, init_from=base, **LORA)), out_dir


def test_a_run_goes_on_from_the_weights_of_another_as_a_new_one(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, init_from=base, max_iters=2, n_layer=4))
    assert metrics(out_dir)[0]['step'] == 0
    assert metrics(out_dir)[0]['val_loss'] == pytest.approx(metrics(base)[-1]['val_loss'], abs=1e-6)
    assert state(out_dir / 'last.pt')['model_args']['n_layer'] == TINY['n_layer']  # the base's, not the flag's


def test_a_context_without_a_table_of_positions_grows_and_says_so(tmp_path, char_data):
    succeeded(train(tmp_path / 'base', char_data, max_iters=1, position='rope'))
    for name, keys in ('all', {}), ('lora', LORA):
        ended = run('train.py', **TINY | keys | {'dataset': char_data, 'out_dir': tmp_path / name, 'block_size': 24,
                                                 'init_from': tmp_path / 'base', 'max_iters': 2})
        assert ended.returncode == 0 and 'block_size=24 is more than the 16 tokens of' in ended.stderr
        assert state(tmp_path / name / 'last.pt')['model_args']['block_size'] == 24
        succeeded(train(tmp_path / name, char_data, init_from='resume', max_iters=3))


def test_the_adapter_alone_is_trained_and_saved_and_peft_can_read_it(adapted, base):
    from safetensors import safe_open
    stdout, out_dir = adapted
    last = state(out_dir / 'last.pt')
    assert last['model'] and all('.lora_' in name for name in last['model'])
    assert {name.split('.')[4] for name in last['model']} == {'c_attn', 'c_proj'}
    assert len(last['optimizer']['state']) == len(last['model']) == 2 * 2 * 2
    assert (out_dir / 'last.pt').stat().st_size < (base / 'last.pt').stat().st_size
    trained = sum(tensor.numel() for tensor in last['model'].values())
    assert f'{trained:,} of them trained' in stdout
    with safe_open(out_dir / 'adapter' / 'adapter_model.safetensors', 'pt') as file:
        saved = {name.removeprefix('base_model.model.'): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert saved.keys() == last['model'].keys() and all(torch.equal(saved[name], last['model'][name]) for name in saved)


def test_an_adapter_learns(tmp_path, char_data, base):
    keys = LORA | dict(max_iters=60, lr_decay_iters=60, eval_interval=60, lora_dropout=0.0, learning_rate=0.03,
                       lora_targets='c_attn,c_proj,c_fc')
    succeeded(train(tmp_path / 'out', char_data, init_from=base, **keys))
    first, last = (line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line)
    assert last < first - 0.02


def test_a_lora_run_without_its_base_says_where_that_was(tmp_path, char_data, base):
    moved = tmp_path / 'base'
    shutil.copytree(base, moved)
    succeeded(train(tmp_path / 'out', char_data, init_from=moved, **LORA))
    moved.rename(tmp_path / 'elsewhere')
    sentence = refused(run('train.py', **TINY | dict(dataset=char_data, out_dir=tmp_path / 'out', init_from='resume')))
    assert f'is an adapter of {moved}, which is not there any more: put it back' in sentence
    moved.symlink_to(tmp_path / 'elsewhere')
    succeeded(train(tmp_path / 'out', char_data, init_from='resume'))


def test_a_lora_run_resumes_exactly_without_its_flags(tmp_path, char_data, base, adapted):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, init_from=base, **LORA | {'max_iters': 3}))
    succeeded(train(out_dir, char_data, init_from='resume', eval_interval=3))
    assert metrics(out_dir) == metrics(adapted[1])
    assert equal_states(state(out_dir / 'last.pt'), state(adapted[1] / 'last.pt'))


@pytest.mark.slow
def test_two_ranks_train_the_adapter_of_one(tmp_path, char_data, base):
    keys = TINY | LORA | {'dataset': char_data, 'init_from': base, 'lora_dropout': 0.0}
    succeeded(run('train.py', **keys, out_dir=tmp_path / 'one'))
    succeeded(run('train.py', **keys, out_dir=tmp_path / 'two', launcher=TWO_RANKS))
    same_curve(tmp_path / 'one', tmp_path / 'two')


def test_text_of_the_run_of_its_adapter_and_of_the_merged_model_is_the_same(tmp_path, adapted, base):
    keys = dict(num_samples=1, max_new_tokens=20, temperature=0, device='cpu', dtype='float32')
    out_dir, merged = adapted[1], tmp_path / 'merged'
    texts = [succeeded(run_here('sample.py', out_dir=out_dir, **keys)),
             succeeded(run_here('sample.py', adapter=out_dir / 'adapter', **keys))]
    succeeded(run_here('sample.py', adapter=out_dir / 'adapter', init_from=base, merge=merged, device='cpu'))
    assert texts[0] == texts[1] == succeeded(run_here('sample.py', out_dir=merged, **keys))


def test_a_base_that_has_changed_is_refused_and_nothing_is_lost(tmp_path, char_data):
    succeeded(train(tmp_path / 'base', char_data, max_iters=1))
    succeeded(train(tmp_path / 'out', char_data, init_from=tmp_path / 'base', **LORA | {'max_iters': 3}))
    succeeded(train(tmp_path / 'base', char_data, max_iters=2))
    kept = (tmp_path / 'out' / 'last.pt').read_bytes()
    assert 'belongs to other weights' in refused(train(tmp_path / 'out', char_data, init_from='resume'))
    assert (tmp_path / 'out' / 'last.pt').read_bytes() == kept


def test_the_search_for_a_rate_and_the_plan_know_adapters(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    stdout = succeeded(train(out_dir, char_data, init_from=base, find_lr=True, **LORA))
    assert '--learning_rate=' in stdout and [path.name for path in out_dir.iterdir()] == ['find_lr.png']
    planned = succeeded(train(tmp_path / 'none', char_data, init_from=base, plan=True, **LORA))
    assert 'of them trained' in planned and not (tmp_path / 'none').exists()


@pytest.mark.parametrize('keys, sentence', [
    (dict(init_from='scratch'), 'adapts weights that are there'), (dict(init_from='auto'), 'adapts weights'),
    (dict(lora_targets='lm_head'), "lora_targets='lm_head'"), (dict(trainable='head'), 'nothing but the adapter'),
    (dict(init_from='no/such'), 'init_from=no/such is not scratch'),
    (dict(lora_targets='lm_head', optimizer='muon'), "lora_targets='lm_head'")])
def test_what_cannot_be_adapted_is_refused_before_anything_is_written(tmp_path, char_data, base, keys, sentence):
    keys = LORA | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'init_from': base} | keys
    ended = run('train.py', **TINY | keys)
    assert sentence in refused(ended) and not (tmp_path / 'out').exists()


def test_a_run_is_not_adapted_in_its_own_folder(tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, max_iters=1))
    for name in 'out', 'out/ckpt.pt':
        ended = train(tmp_path / 'out', char_data, init_from=tmp_path / name, **LORA)
        assert 'is out_dir, whose run a new one would move aside' in refused(ended)
    assert (tmp_path / 'out' / 'ckpt.pt').exists()


def test_a_folder_may_be_called_what_a_run_begins_with(tmp_path, char_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for init_from in 'scratch', 'scratch', 'resume':  # of which the second moves the first aside
        succeeded(train('scratch', char_data, init_from=init_from, max_iters=1))
    assert 'is out_dir' in refused(train('.', char_data, init_from='ckpt.pt', max_iters=1))


def test_what_a_resumed_adapter_cannot_follow_is_said(tmp_path, char_data, base):
    succeeded(train(tmp_path / 'out', char_data, init_from=base, **LORA | {'max_iters': 1}))
    ended = train(tmp_path / 'out', char_data, init_from='resume', max_iters=2, trainable='head')
    assert 'trainable=head is not used' in ended.stderr and ended.returncode == 0


def test_a_new_run_moves_an_adapter_aside_too(tmp_path, char_data, base):
    succeeded(train(tmp_path / 'out', char_data, init_from=base, **LORA | {'max_iters': 1}))
    succeeded(train(tmp_path / 'out', char_data, max_iters=1))
    assert (tmp_path / 'out' / 'replaced' / '1' / 'adapter').is_dir() and not (tmp_path / 'out' / 'adapter').exists()
