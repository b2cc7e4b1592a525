"""train.py as a user runs it: what it writes, how it resumes, what it refuses."""
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refused, run_here, succeeded

from plaingpt.training.guard import Guard

TIMINGS = {'ms_per_step', 'tokens_per_s', 'elapsed', 'mfu'}


def train(out_dir, data, **keys):
    return run_here('train.py', **{**TINY, 'dataset': data, 'out_dir': out_dir, **keys})


def metrics(out_dir, timings=False):
    lines = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    return lines if timings else [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def state(path):
    return torch.load(path, weights_only=True)


def equal_states(a, b):
    from plaingpt.training.checkpoints import digest
    return digest([a['model'], a['optimizer']]) == digest([b['model'], b['optimizer']])


@pytest.fixture(scope='module')
def finished(tmp_path_factory, char_data):
    """(stdout, out_dir) of an undisturbed run of 6 steps, with dropout, evaluated at 0, 3 and 6."""
    out_dir = tmp_path_factory.mktemp('finished') / 'out'
    return succeeded(train(out_dir, char_data, eval_interval=3, dropout=0.2)), out_dir


# ---- a run ----

def test_a_run_says_what_it_does_and_ends_with_the_command_to_try(finished):
    stdout, out_dir = finished
    lines = stdout.splitlines()
    summary = ['machine', 'data', 'model', 'step', 'run', 'compute', 'memory', 'disk', 'scale']
    assert [line.split()[0] for line in lines if line.split()[0] in summary][:9] == summary
    first = next(line for line in lines if line.startswith('step 1:'))
    assert 'loss' in first and all(word in first for word in ('lr', 'norm', 'ms', 'tokens/s', 'MFU n/a', 'ETA'))
    best = min(line['val_loss'] for line in metrics(out_dir) if 'val_loss' in line)
    assert f'best validation loss {best:.4f}' in lines[-2]
    assert lines[-1] == f'python sample.py --out_dir={out_dir}'
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_a_run_takes_max_iters_steps_and_saves_its_end(finished):
    _, out_dir = finished
    lines = metrics(out_dir, timings=True)
    assert [line['step'] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line['step'] for line in lines if 'val_loss' in line] == [0, 3, 6]
    assert lines[-1]['tokens'] == 6 * 2 * 4 * 16
    assert set(lines[-1]) == {'step', 'tokens', 'loss', 'lr', 'grad_norm', 'clipped', 'weight_norm', 'update_ratio',
                              'train_loss', 'val_loss'} | TIMINGS
    last = state(out_dir / 'last.pt')
    assert last['iter_num'] == 6
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} < set(last)
    assert 'transformer.wte.weight' in last['model'] and last['tokenizer']['kind'] == 'char'
    assert last['model_args']['vocab_size'] == len(last['tokenizer']['chars'])


def test_the_loss_falls(tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, max_iters=60, lr_decay_iters=60, eval_interval=60, log_interval=20))
    evaluations = [line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line]
    assert evaluations[0] == pytest.approx(np.log(23), abs=0.3) and evaluations[1] < 2.5


def test_the_rate_follows_the_schedule(finished, tmp_path, char_data):
    rates = [line['lr'] for line in metrics(finished[1])[1:]]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-3 + 9e-3 * (2 + 2 ** .5) / 4, 5.5e-3,
                                   1e-3 + 9e-3 * (2 - 2 ** .5) / 4])
    ended = train(tmp_path / 'out', char_data, warmup_iters=3, lr_decay_iters=3, max_iters=5, learning_rate=1e-4)
    succeeded(ended)
    assert 'warning: min_lr=0.001 is above learning_rate=0.0001' in ended.stderr
    assert metrics(tmp_path / 'out')[-1]['lr'] == 1e-3


def test_how_often_it_evaluates_does_not_change_the_training(finished, tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, eval_interval=2, dropout=0.2))
    losses = [line.get('loss') for line in metrics(tmp_path / 'out')]
    assert losses == [line.get('loss') for line in metrics(finished[1])]
    assert equal_states(state(tmp_path / 'out' / 'last.pt'), state(finished[1] / 'last.pt'))


def test_the_printed_time_is_of_the_steps_alone(tmp_path, char_data):
    succeeded(train(tmp_path / 'out', char_data, eval_interval=1, eval_iters=20))
    lines = metrics(tmp_path / 'out', timings=True)
    assert sum(line.get('ms_per_step', 0) for line in lines) < 1000 * lines[-1]['elapsed'] / 2  # of 280 forward passes


def test_a_character_run_imports_nothing_heavy(tmp_path, char_data):
    flags = [f'--{k}={v}' for k, v in {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out'}.items()]
    code = ('import atexit, runpy, sys; heavy = {"transformers", "datasets", "tiktoken", "wandb"}; '
            f'atexit.register(lambda: print(heavy & set(sys.modules))); sys.argv = ["train.py"] + {flags!r}; '
            f'runpy.run_path({str(ROOT / "train.py")!r}, None, "__main__")')
    ended = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True,
                           capture_output=True)
    assert ended.stdout.splitlines()[-1] == 'set()', ended.stderr


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_trains_too(finished, tmp_path, char_data, dtype):
    assert dtype in succeeded(train(tmp_path / 'out', char_data, dtype=dtype, eval_interval=3, dropout=0.2))
    for ours, full in zip(metrics(tmp_path / 'out'), metrics(finished[1]), strict=True):
        assert ours.get('loss', 0) == pytest.approx(full.get('loss', 0), rel=0.02)
    assert bool(state(tmp_path / 'out' / 'last.pt')['scaler']) == (dtype == 'float16')


# ---- resuming ----

def test_a_resumed_run_equals_an_undisturbed_one(finished, tmp_path, char_data):
    _, whole = finished
    keys = dict(eval_interval=3, dropout=0.2)
    succeeded(train(tmp_path / 'out', char_data, max_iters=3, **keys))
    # What a kill leaves: lines of steps after the last save, the last one unfinished. And no shape is given again.
    with (tmp_path / 'out' / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    shape = ('n_layer', 'n_head', 'n_embd', 'block_size')
    flags = [f'--{k}={v}' for k, v in {**TINY, **keys, 'init_from': 'resume', 'out_dir': tmp_path / 'out'}.items()
             if k not in shape] + [f'--dataset={char_data}']
    stdout = succeeded(run_here('train.py', *flags))
    assert 'at step 3' in stdout and 'max_iters 3 -> 6' in stdout and 'step 3:' not in stdout
    assert metrics(tmp_path / 'out') == metrics(whole)
    assert equal_states(state(tmp_path / 'out' / 'last.pt'), state(whole / 'last.pt'))


def test_a_terminated_run_saves_and_resumes_as_if_nothing_had_happened(finished, tmp_path, char_data):
    keys = {**TINY, 'eval_interval': 3, 'dropout': 0.2, 'dataset': char_data, 'out_dir': tmp_path / 'out'}
    flags = [f'--{key}={value}' for key, value in {**keys, 'max_iters': 100_000}.items()]
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', *flags], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step 2'):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 75 and 'stopped by SIGTERM at step' in rest
    stopped_at = state(tmp_path / 'out' / 'last.pt')['iter_num']
    assert f'at step {stopped_at},' in rest.splitlines()[-1]
    end = stopped_at + 4
    succeeded(run_here('train.py', **{**keys, 'init_from': 'resume', 'max_iters': end}))
    succeeded(run_here('train.py', **{**keys, 'out_dir': tmp_path / 'whole', 'max_iters': end}))
    assert equal_states(state(tmp_path / 'out' / 'last.pt'), state(tmp_path / 'whole' / 'last.pt'))
    assert metrics(tmp_path / 'out') == metrics(tmp_path / 'whole')


def test_shape_and_data_of_a_resumed_run_stay_and_the_rest_follows_the_flags(tmp_path, named_data):
    succeeded(train(tmp_path / 'out', named_data))
    resumed = train(tmp_path / 'out', 'elsewhere', init_from='resume', n_layer=5, max_iters=8, weight_decay=0.5,
                    beta2=0.9)
    stdout = succeeded(resumed)
    assert 'n_layer=5 is not used' in resumed.stderr and 'dataset=elsewhere is not used' in resumed.stderr
    assert 'weight_decay 0.1 -> 0.5' in stdout and 'beta2 0.95 -> 0.9' in stdout
    group = state(tmp_path / 'out' / 'last.pt')['optimizer']['param_groups'][0]
    assert group['weight_decay'] == 0.5 and group['betas'] == (0.9, 0.9)


def nanogpt_checkpoint(out_dir, data, text, prefix):
    """What nanoGPT saves after a step: its six keys, AdamW unfused, the vocabulary in the data's meta.pkl."""
    from model import GPT, GPTConfig
    chars = sorted(set(text))
    (data / 'meta.json').unlink()
    ids = np.array([chars.index(char) for char in text], dtype=np.uint16)
    ids[:-2000].tofile(data / 'train.bin')
    ids[-2000:].tofile(data / 'val.bin')
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=len(chars), dropout=0.0)
    model = GPT(GPTConfig(**shape, gelu='exact'))
    optimizer = torch.optim.AdamW([{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
                                   {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}])
    x = torch.from_numpy(ids[:16].astype(np.int64))[None]
    model(x, x)[1].backward()
    optimizer.step()
    out_dir.mkdir()
    torch.save({'model': {prefix + name: tensor for name, tensor in model.state_dict().items()},
                'optimizer': optimizer.state_dict(), 'model_args': shape, 'iter_num': 250,
                'best_val_loss': torch.tensor(9.0), 'config': {
                    'dataset': data.name, 'gradient_accumulation_steps': 5, 'batch_size': 4, 'block_size': 16}},
               out_dir / 'ckpt.pt')
    return model, x


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_a_run_of_nanogpt_resumes_and_samples(tmp_path, named_data, text, prefix):
    nanogpt_checkpoint(tmp_path / 'out', ROOT / 'data' / named_data, text, prefix)
    flags = {**TINY, 'init_from': 'resume', 'out_dir': tmp_path / 'out', 'max_iters': 252, 'eval_interval': 2}
    stdout = succeeded(run_here('train.py', **flags))
    assert 'at step 250' in stdout and 'step 252' in stdout
    saved = state(tmp_path / 'out' / 'last.pt')
    assert saved['iter_num'] == 252 and saved['model_args']['gelu'] == 'exact'
    assert saved['optimizer']['state'][0]['step'] == 3
    assert saved['tokens_seen'] == (250 * 5 + 2 * 2) * 4 * 16  # nanoGPT's batches, then ours
    sampled = run_here('sample.py', out_dir=tmp_path / 'out', num_samples=1, max_new_tokens=9, start='king')
    assert succeeded(sampled).startswith('king') and 'Traceback' not in sampled.stderr


def test_eval_only_evaluates_and_writes_nothing_also_on_resume(finished, tmp_path, char_data):
    _, out_dir = finished
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    stdout = succeeded(train(out_dir, char_data, init_from='resume', eval_only=True, dropout=0.2, max_iters=100))
    assert f"val loss {metrics(out_dir)[-1]['val_loss']:.4f}" in stdout
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before
    succeeded(train(tmp_path / 'out', char_data, eval_only=True))
    assert not (tmp_path / 'out').exists()


# ---- keeping what is good ----

@pytest.mark.parametrize('always', [False, True])
def test_ckpt_is_the_best_or_the_newest_and_the_best_loss_stays(tmp_path, char_data, always):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data, always_save_checkpoint=False))
    best = state(out_dir / 'ckpt.pt')['best_val_loss']
    succeeded(train(out_dir, char_data, init_from='resume', always_save_checkpoint=always, max_iters=8,
                    learning_rate=5.0, decay_lr=False))
    assert metrics(out_dir)[-1]['val_loss'] > best
    assert state(out_dir / 'ckpt.pt')['iter_num'] == (8 if always else 6)
    assert state(out_dir / 'ckpt.pt')['best_val_loss'] == state(out_dir / 'last.pt')['best_val_loss'] == best


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_good_state(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data))
    before = (out_dir / 'last.pt').read_bytes(), (out_dir / 'ckpt.pt').read_bytes()
    ended = train(out_dir, char_data, init_from='resume', max_iters=12, learning_rate=1e30, decay_lr=False)
    assert 'stopped before they reached the weights' in refused(ended)
    assert before == ((out_dir / 'last.pt').read_bytes(), (out_dir / 'ckpt.pt').read_bytes())


def test_a_new_run_moves_the_old_one_aside_and_checkpoint_interval_saves_between_evaluations(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data))
    old = (out_dir / 'ckpt.pt').read_bytes()
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', *[f'--{key}={value}' for key, value in {
        **TINY, 'dataset': char_data, 'out_dir': out_dir, 'max_iters': 10**9, 'eval_interval': 10**9,
        'checkpoint_interval': 5}.items()]], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out_dir / 'last.prev.pt').exists() or not (out_dir / 'last.pt').exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill(), process.wait()
    assert (out_dir / 'replaced' / '1' / 'ckpt.pt').read_bytes() == old and not (out_dir / 'ckpt.pt').exists()
    assert state(out_dir / 'last.prev.pt')['iter_num'] % 5 == 0


def test_the_time_of_a_step_counts_the_wait_for_the_device(tmp_path, char_data, monkeypatch):
    def slow_look(*arguments, look=Guard.look):
        time.sleep(0.2)
        return look(*arguments)

    monkeypatch.setattr(Guard, 'look', slow_look)
    succeeded(run_here('train.py', **TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 3}))
    assert all(line['ms_per_step'] >= 200 for line in metrics(tmp_path / 'out', timings=True)[1:])
