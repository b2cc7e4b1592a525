"""train.py as a user runs it: what it writes, how it resumes, and which weights it keeps."""
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, flags, refused, run_here, succeeded
from runs import TIMINGS, command, equal_states, losses, metrics, state, train

from model import GPT, GPTConfig
from plaingpt.training import checkpoints
from plaingpt.training.guard import Guard


@pytest.fixture(scope='module')
def finished(tmp_path_factory, char_data):
    """(stdout, out_dir) of a run of 6 steps with dropout, evaluated at 0, 3 and 6."""
    out_dir = tmp_path_factory.mktemp('finished') / 'out'
    stdout = succeeded(train(out_dir, char_data, eval_interval=3, dropout=0.2))
    return stdout, out_dir


# ---- a run ----

def test_a_run_says_what_it_does_and_ends_with_the_command_to_try(finished):
    stdout, out_dir = finished
    lines = stdout.splitlines()
    summary = ['machine', 'data', 'model', 'step', 'run', 'compute', 'memory', 'disk', 'scale']
    first_words = [line.split()[0] for line in lines]
    assert [word for word in first_words if word in summary][:9] == summary
    first_step = next(line for line in lines if line.startswith('step 1:'))
    for word in 'loss', 'lr', 'norm', 'ms', 'tokens/s', 'MFU n/a', 'ETA':
        assert word in first_step
    best = min(losses(out_dir).values())
    assert f'best validation loss {best:.4f}' in lines[-2]
    assert lines[-1] == f'python sample.py --out_dir={out_dir}'
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_a_run_takes_max_iters_steps_and_saves_its_end(finished):
    _, out_dir = finished
    lines = metrics(out_dir, timings=True)
    assert [line['step'] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert list(losses(out_dir)) == [0, 3, 6]
    assert lines[-1]['tokens'] == 6 * 2 * 4 * 16
    figures = {'step', 'tokens', 'loss', 'lr', 'grad_norm', 'clipped', 'weight_norm',
               'update_ratio', 'train_loss', 'val_loss'}
    assert set(lines[-1]) == figures | TIMINGS
    last = state(out_dir / 'last.pt')
    assert last['iter_num'] == 6
    nanogpts = {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    assert nanogpts < set(last)
    assert 'transformer.wte.weight' in last['model']
    assert last['tokenizer']['kind'] == 'char'
    assert last['model_args']['vocab_size'] == len(last['tokenizer']['chars'])


def test_the_loss_falls(tmp_path, char_data):
    keys = dict(max_iters=60, lr_decay_iters=60, eval_interval=60, log_interval=20)
    succeeded(train(tmp_path / 'out', char_data, **keys))
    evaluated = losses(tmp_path / 'out')
    assert evaluated[0] == pytest.approx(np.log(23), abs=0.3)
    assert evaluated[60] < 2.5


def test_the_learning_rate_follows_the_schedule(finished, tmp_path, char_data):
    rates = list(losses(finished[1], 'lr').values())
    warm_up = [1e-2 / 3, 2e-2 / 3, 1e-2]
    decay = [1e-3 + 9e-3 * (2 + 2 ** .5) / 4, 5.5e-3, 1e-3 + 9e-3 * (2 - 2 ** .5) / 4]
    assert rates == pytest.approx(warm_up + decay)
    ended = train(tmp_path / 'out', char_data, warmup_iters=3, lr_decay_iters=3, max_iters=5,
                  learning_rate=1e-4)
    succeeded(ended)
    assert 'warning: min_lr=0.001 is above learning_rate=0.0001' in ended.stderr
    assert metrics(tmp_path / 'out')[-1]['lr'] == 1e-3


def test_how_often_it_evaluates_does_not_change_the_training(finished, tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, eval_interval=2, dropout=0.2))
    assert losses(tmp_path / 'out', 'loss') == losses(finished[1], 'loss')
    assert equal_states(state(tmp_path / 'out' / 'last.pt'), state(finished[1] / 'last.pt'))


def test_the_printed_time_is_of_the_steps_alone(tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, eval_interval=1, eval_iters=20))
    lines = metrics(tmp_path / 'out', timings=True)
    in_steps = sum(line.get('ms_per_step', 0) for line in lines)
    in_all = 1000 * lines[-1]['elapsed']
    assert in_steps < in_all / 2  # the evaluations take 280 forward passes


def test_the_time_of_a_step_counts_the_wait_for_the_device(tmp_path, char_data, monkeypatch):
    read = Guard.read

    def slow_read(guard):
        time.sleep(0.2)
        return read(guard)

    monkeypatch.setattr(Guard, 'read', slow_read)
    succeeded(train(tmp_path / 'out', char_data, max_iters=3))
    for line in metrics(tmp_path / 'out', timings=True)[1:]:
        assert line['ms_per_step'] >= 200


WITH_MODULES_PRINTED = """
import atexit, runpy, sys
heavy = {{'transformers', 'datasets', 'tiktoken', 'wandb'}}
atexit.register(lambda: print(heavy & set(sys.modules)))
sys.argv = {argv!r}
runpy.run_path({script!r}, None, '__main__')
"""


def test_a_character_run_imports_nothing_heavy(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out'}
    script = str(ROOT / 'train.py')
    code = WITH_MODULES_PRINTED.format(argv=['train.py', *flags(keys)], script=script)
    ended = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True,
                           env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert ended.stdout.splitlines()[-1] == 'set()', ended.stderr


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_trains_too(finished, tmp_path, char_data, dtype):
    ended = train(tmp_path / 'out', char_data, dtype=dtype, eval_interval=3, dropout=0.2)
    assert dtype in succeeded(ended)
    ours = losses(tmp_path / 'out', 'loss')
    assert ours == pytest.approx(losses(finished[1], 'loss'), rel=0.02)
    scaler = state(tmp_path / 'out' / 'last.pt')['scaler']
    assert bool(scaler) == (dtype == 'float16')


# ---- resuming ----

def test_a_resumed_run_equals_an_undisturbed_one(finished, tmp_path, char_data):
    _, whole = finished
    out_dir = tmp_path / 'out'
    keys = dict(eval_interval=3, dropout=0.2)
    succeeded(train(out_dir, char_data, max_iters=3, **keys))
    # A kill leaves lines of steps after the last save, and an unfinished one.
    with (out_dir / 'metrics.jsonl').open('a', encoding='utf-8') as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    # No shape is given again: the checkpoint has it.
    resumed = {**TINY, **keys, 'init_from': 'resume', 'dataset': char_data, 'out_dir': out_dir}
    for key in 'n_layer', 'n_head', 'n_embd', 'block_size':
        del resumed[key]
    stdout = succeeded(run_here('train.py', **resumed))
    assert 'at step 3' in stdout
    assert 'max_iters 3 -> 6' in stdout
    assert 'step 3: loss' not in stdout  # that step was trained before
    assert metrics(out_dir) == metrics(whole)
    assert equal_states(state(out_dir / 'last.pt'), state(whole / 'last.pt'))


def test_a_resumed_run_evaluates_its_step_again_and_writes_the_same_line(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, max_iters=3, eval_interval=3, dropout=0.2))
    before = (out_dir / 'metrics.jsonl').read_bytes()
    stdout = succeeded(train(out_dir, char_data, init_from='resume', eval_interval=3, dropout=0.2))
    assert 'step 3: train loss' in stdout
    # Timings are equal too, since the checkpoint has them.
    assert (out_dir / 'metrics.jsonl').read_bytes().startswith(before)


def test_a_terminated_run_saves_and_resumes_as_if_nothing_had_happened(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'eval_interval': 3, 'dropout': 0.2, 'dataset': char_data}
    process = subprocess.Popen(command({**keys, 'out_dir': out_dir, 'max_iters': 100_000}),
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step 2'):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 75
    stopped_at = state(out_dir / 'last.pt')['iter_num']
    assert rest.splitlines()[-1] == (f'stopped by SIGTERM at step {stopped_at}; to continue, add '
                                     '--resume=auto to the same command')
    keys['max_iters'] = stopped_at + 4
    succeeded(run_here('train.py', **keys, out_dir=out_dir, resume='auto'))
    succeeded(run_here('train.py', **keys, out_dir=tmp_path / 'whole'))
    assert equal_states(state(out_dir / 'last.pt'), state(tmp_path / 'whole' / 'last.pt'))
    assert metrics(out_dir) == metrics(tmp_path / 'whole')


@pytest.fixture(scope='module')
def base(tmp_path_factory, char_data):
    """The out_dir of a run from which others start."""
    out_dir = tmp_path_factory.mktemp('base') / 'out'
    succeeded(train(out_dir, char_data, max_iters=20, lr_decay_iters=20, eval_interval=20))
    return out_dir


@pytest.mark.parametrize('before', ['nothing', 'a run killed before its first save'])
def test_resume_auto_starts_from_init_from_and_later_continues(tmp_path, char_data, base, before):
    out_dir = tmp_path / 'out'
    if before != 'nothing':
        out_dir.mkdir()
        (out_dir / '.last.pt.123.tmp').write_bytes(b'half a checkpoint')
        (out_dir / 'metrics.jsonl').write_text('{"step": 0, "val_loss": 9.0}\n', encoding='utf-8')
    keys = dict(init_from=base, resume='auto', eval_interval=3)
    stdout = succeeded(train(out_dir, char_data, max_iters=3, **keys))
    assert 'resuming' not in stdout
    assert losses(out_dir)[0] == pytest.approx(losses(base)[20], abs=1e-6)
    assert not (out_dir / 'replaced').exists()
    assert 'at step 3' in succeeded(train(out_dir, char_data, **keys))
    succeeded(train(tmp_path / 'whole', char_data, init_from=base, eval_interval=3))
    assert metrics(out_dir) == metrics(tmp_path / 'whole')
    assert equal_states(state(out_dir / 'last.pt'), state(tmp_path / 'whole' / 'last.pt'))


def test_resume_always_needs_a_run(tmp_path, char_data):
    sentence = refused(train(tmp_path / 'out', char_data, resume='always'))
    assert f"{tmp_path / 'out'} holds no checkpoint" in sentence
    assert not (tmp_path / 'out').exists()


def test_init_from_auto_is_refused_with_the_flag_to_use(tmp_path, char_data):
    assert '--resume=auto' in refused(train(tmp_path / 'out', char_data, init_from='auto'))
    assert not (tmp_path / 'out').exists()


def test_a_resumed_run_keeps_its_shape_and_data_and_the_rest_follows_the_flags(tmp_path,
                                                                              named_data):
    succeeded(train(tmp_path / 'out', named_data))
    resumed = train(tmp_path / 'out', 'elsewhere', init_from='resume', n_layer=5, max_iters=8,
                    weight_decay=0.5, beta2=0.9)
    stdout = succeeded(resumed)
    assert 'n_layer=5 is not used' in resumed.stderr
    assert 'dataset=elsewhere is not used' in resumed.stderr
    assert 'weight_decay 0.1 -> 0.5' in stdout
    assert 'beta2 0.95 -> 0.9' in stdout
    group = state(tmp_path / 'out' / 'last.pt')['optimizer']['param_groups'][0]
    assert group['weight_decay'] == 0.5
    assert group['betas'] == (0.9, 0.9)


def write_data_as_nanogpt(folder, text):
    """Makes a data set's folder as nanoGPT has it, with the vocabulary in meta.pkl; its ids."""
    chars = sorted(set(text))
    ids = np.array([chars.index(char) for char in text], dtype=np.uint16)
    ids[:-2000].tofile(folder / 'train.bin')
    ids[-2000:].tofile(folder / 'val.bin')
    numbers = {char: number for number, char in enumerate(chars)}
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': numbers}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    (folder / 'meta.json').unlink()
    return ids


def save_as_nanogpt(out_dir, dataset, ids, prefix):
    """Saves what nanoGPT saves after a step: its six keys, and the state of an unfused AdamW."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False,
                 vocab_size=int(ids.max()) + 1, dropout=0.0)
    model = GPT(GPTConfig(**shape, gelu='exact'))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': 0.1},
                                   {'params': vectors, 'weight_decay': 0.0}])
    x = torch.from_numpy(ids[:16].astype(np.int64))[None]
    _, loss = model(x, x)
    loss.backward()
    optimizer.step()
    config = {'dataset': dataset, 'gradient_accumulation_steps': 5, 'batch_size': 4,
              'block_size': 16}
    out_dir.mkdir()
    torch.save({
        'model': {prefix + name: tensor for name, tensor in model.state_dict().items()},
        'optimizer': optimizer.state_dict(),
        'model_args': shape,
        'iter_num': 250,
        'best_val_loss': torch.tensor(9.0),
        'config': config,
    }, out_dir / 'ckpt.pt')


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_a_run_of_nanogpt_resumes_and_samples(tmp_path, named_data, text, prefix):
    out_dir = tmp_path / 'out'
    ids = write_data_as_nanogpt(ROOT / 'data' / named_data, text)
    save_as_nanogpt(out_dir, named_data, ids, prefix)
    keys = {**TINY, 'init_from': 'resume', 'out_dir': out_dir, 'max_iters': 252,
            'eval_interval': 2}
    stdout = succeeded(run_here('train.py', **keys))
    assert 'at step 250' in stdout
    assert 'step 252' in stdout
    saved = state(out_dir / 'last.pt')
    assert saved['iter_num'] == 252
    assert saved['model_args']['gelu'] == 'exact'
    assert saved['optimizer']['state'][0]['step'] == 3
    assert saved['tokens_seen'] == (250 * 5 + 2 * 2) * 4 * 16  # nanoGPT's batches, then ours
    sampled = run_here('sample.py', out_dir=out_dir, num_samples=1, max_new_tokens=9, start='king')
    assert succeeded(sampled).startswith('king')
    assert 'Traceback' not in sampled.stderr


def test_eval_only_evaluates_and_writes_nothing_also_on_resume(finished, tmp_path, char_data):
    _, out_dir = finished
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    stdout = succeeded(train(out_dir, char_data, init_from='resume', eval_only=True, dropout=0.2,
                             max_iters=100))
    assert f'val loss {losses(out_dir)[6]:.4f}' in stdout
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before
    succeeded(train(tmp_path / 'out', char_data, eval_only=True))
    assert not (tmp_path / 'out').exists()


# ---- which weights it keeps ----

@pytest.mark.parametrize('always', [False, True])
def test_ckpt_is_the_best_or_the_newest_and_the_best_loss_stays(tmp_path, char_data, always):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, always_save_checkpoint=False))
    best = state(out_dir / 'ckpt.pt')['best_val_loss']
    succeeded(train(out_dir, char_data, init_from='resume', always_save_checkpoint=always,
                    max_iters=8, learning_rate=5.0, decay_lr=False))
    assert losses(out_dir)[8] > best
    assert state(out_dir / 'ckpt.pt')['iter_num'] == (8 if always else 6)
    assert state(out_dir / 'ckpt.pt')['best_val_loss'] == best
    assert state(out_dir / 'last.pt')['best_val_loss'] == best


def test_fine_tuning_that_never_beats_its_start_leaves_the_start_as_ckpt(tmp_path, char_data, base):
    out_dir = tmp_path / 'out'
    stdout = succeeded(train(out_dir, char_data, init_from=base, always_save_checkpoint=False,
                             eval_interval=3, learning_rate=1.0, decay_lr=False, warmup_iters=0))
    evaluated = losses(out_dir)
    assert evaluated[0] < min(evaluated[3], evaluated[6])
    assert f'best validation loss {evaluated[0]:.4f}' in stdout
    best = state(out_dir / 'ckpt.pt')
    assert best['iter_num'] == 0
    assert best['best_val_loss'] == evaluated[0]
    start = state(base / 'ckpt.pt')
    assert checkpoints.digest(best['model']) == checkpoints.digest(start['model'])


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_good_state(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data))
    before = {name: state(out_dir / name) for name in ('last.pt', 'ckpt.pt')}
    ended = train(out_dir, char_data, init_from='resume', max_iters=12, learning_rate=1e30,
                  decay_lr=False)
    assert 'stopped before they reached the weights' in refused(ended)
    for name, good in before.items():
        left = state(out_dir / name)
        assert left['iter_num'] == 6
        for old, new in ((good['model'], left['model']),
                         (good['optimizer']['state'], left['optimizer']['state'])):
            assert checkpoints.digest(new) == checkpoints.digest(old)


def test_a_bug_in_saving_is_not_reported_as_divergence(tmp_path, char_data, monkeypatch):
    def save(*arguments):
        raise ValueError('a bug')

    monkeypatch.setattr(checkpoints, 'save', save)
    with pytest.raises(ValueError, match='a bug'):
        train(tmp_path / 'out', char_data)
    for line in metrics(tmp_path / 'out'):
        assert 'error' not in line


def test_a_new_run_moves_the_old_one_aside_and_saves_every_checkpoint_interval(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data))
    old = (out_dir / 'ckpt.pt').read_bytes()
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'max_iters': 10**9,
            'eval_interval': 10**9, 'checkpoint_interval': 5}
    process = subprocess.Popen(command(keys), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    replaced = out_dir / 'replaced' / '1'
    step = 0
    while step == 0:  # the evaluation at the start is saved too
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if (replaced / 'metrics.jsonl').exists():
            with contextlib.suppress(FileNotFoundError):
                step = state(out_dir / 'last.pt')['iter_num']
    process.kill()
    process.wait()
    assert step % 5 == 0
    assert (replaced / 'ckpt.pt').read_bytes() == old
    # Between evaluations, last.pt alone is saved.
    assert state(out_dir / 'ckpt.pt')['iter_num'] == 0
