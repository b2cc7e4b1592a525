"""
Helpers for tests of whole runs: starting train.py, changing a piece of it, and comparing results.
"""
import json
import os
import sys

import pytest
import torch
from conftest import ROOT, TINY, flags, run, run_here

from model import GPT, GPTConfig
from plaingpt.training import checkpoints, run_folder

# The launcher, for conftest.run(), of two ranks on this machine.
TWO_RANKS = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
# The figures in metrics.jsonl that differ from run to run.
TIMINGS = {'ms_per_step', 'tokens_per_s', 'elapsed', 'mfu'}


# ---- starting a run ----

def train(out_dir, data, **keys):
    """Runs train.py with the keys TINY, changed by these, in this process."""
    return run_here('train.py', **{**TINY, 'dataset': data, 'out_dir': out_dir, **keys})


def command(keys):
    """The command that runs train.py with these keys, as a list."""
    return [sys.executable, str(ROOT / 'train.py'), *flags(keys)]


PATCHED_TRAIN = """
import hashlib, os, runpy, sys
sys.path.insert(0, {root!r})
sys.argv = ['train.py', *sys.argv[1:]]
rank = os.environ.get('RANK', '0')
import torch
{patch}
runpy.run_path({root!r} + '/train.py', run_name='__main__')
"""


def patched(tmp_path, patch, **names):
    """The path of a script that runs train.py after the statements of patch.

    patch: Python code, a template for str.format with these names."""
    script = tmp_path / 'patched.py'
    code = PATCHED_TRAIN.format(root=str(ROOT), patch=patch.format(**names))
    script.write_text(code, encoding='utf-8')
    return script


POISON = """
calls = []
def poisoned(parameters, limit, original=torch.nn.utils.clip_grad_norm_):
    parameters = list(parameters)
    calls.append(1)
    if len(calls) in {calls} and rank in {ranks!r}:
        parameters[3].grad[0] = float({value!r})
    return original(parameters, limit)
torch.nn.utils.clip_grad_norm_ = poisoned
"""


def poisoned(tmp_path, char_data, launcher=(), calls=(4,), ranks='0', value='nan', **keys):
    """(finished process, out_dir) of a run in which some gradients are replaced by a value.

    calls: the steps at which that happens, counted from 1. ranks: on which, as a string of digits.
    """
    script = patched(tmp_path, POISON, calls=calls, ranks=ranks, value=value)
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'checkpoint_interval': 1, **keys}
    return run(script, launcher=launcher, **keys), out_dir


# ---- its results ----

def metrics(out_dir, timings=False):
    """The lines of metrics.jsonl as dicts, without the figures that differ from run to run."""
    lines = []
    for line in (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
        entry = json.loads(line)
        if not timings:
            entry = {key: value for key, value in entry.items() if key not in TIMINGS}
        lines.append(entry)
    return lines


def losses(out_dir, key='val_loss'):
    """{step: loss} of the lines of metrics.jsonl that have a loss of this name."""
    return {line['step']: line[key] for line in metrics(out_dir) if key in line}


def assert_same_curve(a, b, tolerance=1e-5):
    """Asserts that the records of two runs agree, losses and rates to a relative tolerance."""
    a_lines = metrics(a)
    b_lines = metrics(b)
    assert [line['step'] for line in a_lines] == [line['step'] for line in b_lines]
    for ours, theirs in zip(a_lines, b_lines, strict=True):
        assert ours['tokens'] == theirs['tokens']
        for key in {'loss', 'val_loss', 'train_loss', 'grad_norm', 'lr'} & set(theirs):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (ours['step'], key)


def state(path):
    """The content of a checkpoint, as it is in the file."""
    return torch.load(path, weights_only=True)


def equal_states(a, b):
    """Whether weights and moments of two checkpoints are equal bit for bit."""
    first = checkpoints.digest([a['model'], a['optimizer']])
    second = checkpoints.digest([b['model'], b['optimizer']])
    return first == second


def outcome(out_dir):
    """What must be equal for two runs: steps and digests of their checkpoints, and the metrics."""
    saved = {}
    for name in 'last.pt', 'ckpt.pt':
        checkpoint = state(out_dir / name)
        saved[name] = (checkpoint['iter_num'], checkpoint['digest'])
    return saved, metrics(out_dir)


def resumable_step(out_dir):
    """The step that --resume=auto would continue from, after the files of a kill are cleared."""
    run_folder._claims.clear()
    run_folder.claim(str(out_dir))
    assert not [name for name in os.listdir(out_dir) if 'tmp' in name]
    run_folder._claims.clear()
    checkpoint, _ = checkpoints.load_to_resume(str(out_dir))
    return checkpoint['iter_num']


# ---- checkpoints without a run ----

# Fields of the GPTConfig of a small model, as nanoGPT has them.
SMALL = dict(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8, dropout=0.0, bias=True)


def trained_model(seed=0, **changes):
    """(model, optimizer) of a small GPT after two steps."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    take_step(model, optimizer)
    take_step(model, optimizer)
    return model, optimizer


def take_step(model, optimizer):
    optimizer.zero_grad()
    _, loss = model(torch.arange(8).view(1, 8), torch.arange(1, 9).view(1, 8))
    loss.backward()
    optimizer.step()


def small_checkpoint(step=1, model_args=None, **entries):
    """A checkpoint of a small model, of other weights for each step.

    model_args: changes of SMALL, or None. entries: further entries of the checkpoint."""
    model_args = {**SMALL, 'gelu': 'tanh', **(model_args or {})}
    model, optimizer = trained_model(step, **model_args)
    return {
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'model_args': model_args,
        'iter_num': step,
        'best_val_loss': 1.5,
        'config': {'dataset': 'x'},
        **entries,
    }
