"""What this repository promises of a run: whatever kills it, and whenever, it goes on as if nothing had happened."""
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from test_train import metrics

import checkpoint
import folder

STEPS = 300
NET = {**TINY, 'n_embd': 64, 'block_size': 32, 'dropout': 0.2, 'max_iters': STEPS, 'lr_decay_iters': STEPS,
       'eval_interval': 60}
NEVER = 10**9
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='forks and kills as POSIX systems do')


class Forked:
    """Scripts in children of a process that has imported torch; see forked.py."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen([sys.executable, ROOT / 'tests' / 'forked.py'], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert self.process.stdout.readline() == 'ready\n'

    def train(self, keys, **when):
        return self.run('train.py', *[f'--{key}={value}' for key, value in keys.items()], **when)

    def run(self, *argv, **when):
        order = {'argv': [str(argument) for argument in argv], 'log': str(self.log), **when}
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def operations(self):
        """How many file operations the last save took, if it was not killed before its end."""
        return int(self.log.read_text().rpartition('file operations of this save: ')[2].split()[0])


@pytest.fixture(scope='module')
def forked(tmp_path_factory):
    server = Forked(tmp_path_factory.mktemp('forked') / 'log')
    yield server
    server.process.stdin.close(), server.process.wait(), server.process.stdout.close()


def outcome(out_dir):
    """What must be equal of two runs: the digests of each checkpoint, and metrics.jsonl but for timings."""
    saved = {name: torch.load(out_dir / name, weights_only=True) for name in ('last.pt', 'ckpt.pt')}
    return {name: (state['iter_num'], state['digest']) for name, state in saved.items()}, metrics(out_dir)


def one_state(out_dir):
    """The step of the state that would be resumed. Fails if a file of a finished save is broken."""
    folder._claims.clear()
    folder.claim(str(out_dir))
    assert not [name for name in os.listdir(out_dir) if 'tmp' in name]
    folder._claims.clear()
    return checkpoint.load_to_resume(str(out_dir))[0]['iter_num']


# ---- kills ----

@pytest.mark.parametrize('dtype, first, later, kills', [
    ('float32', 'scratch', 'resume', 5), ('bfloat16', 'auto', 'auto', 5),
    pytest.param('float32', 'auto', 'auto', 100, marks=pytest.mark.slow),
    pytest.param('bfloat16', 'scratch', 'resume', 100, marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_ends_as_an_undisturbed_one(forked, tmp_path, char_data, dtype, first, later, kills):
    chance, window, interval = random.Random(kills), 1.0, 12 if kills < 50 else 2
    keys = {**NET, 'dataset': char_data, 'dtype': dtype, 'checkpoint_interval': interval}
    assert forked.train({**keys, 'out_dir': tmp_path / 'whole'}, save=NEVER, at=NEVER) == 0
    operations = forked.operations()
    out_dir, start, steps, in_saves = tmp_path / 'out', first, 0, 0
    for kill in range(kills):
        in_save, share = kill % 2 == 0, (STEPS - steps) // (kills + 1 - kill)  # of the steps that are left
        when = dict(after=chance.uniform(0, window))
        if in_save:
            when = dict(save=chance.randint(1, max(1, share // interval)), at=chance.randint(1, operations + 1))
        assert forked.train({**keys, 'out_dir': out_dir, 'init_from': start}, **when) == -9, forked.log.read_text()
        if any((out_dir / name).exists() for name in folder.CHECKPOINTS):
            before, steps, start = steps, one_state(out_dir), later
            assert before <= steps < STEPS
            if not in_save:  # it must not end before its last kill
                window *= 1.3 if steps - before < share else 0.7
        in_saves += in_save
    assert in_saves >= 0.4 * kills and steps > 0
    assert forked.train({**keys, 'out_dir': out_dir, 'init_from': later}) == 0
    assert outcome(out_dir) == outcome(tmp_path / 'whole')
    assert sorted(os.listdir(out_dir)) == sorted(os.listdir(tmp_path / 'whole'))


SAVE_ONCE = """
import sys
import torch
import checkpoint
checkpoint.save(sys.argv[1], torch.load(sys.argv[2], weights_only=True), ['last', 'ckpt'])
"""


@pytest.mark.parametrize('stride', [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_of_its_operations_leaves_a_whole_state(forked, tmp_path, stride):
    from test_checkpoint import state
    (tmp_path / 'save_once.py').write_text(SAVE_ONCE)
    torch.save(state(2), tmp_path / 'new.pt')
    before, out_dir, found = tmp_path / 'before', tmp_path / 'out', []
    checkpoint.save(str(before), state(1), ['last', 'ckpt'])
    (before / 'metrics.jsonl').write_text('{"step": 1}\n')

    def step_after_a_kill(at):
        shutil.copytree(before, out_dir)
        assert forked.run(tmp_path / 'save_once.py', out_dir, tmp_path / 'new.pt', save=1, at=at) == -9
        assert checkpoint.load_to_sample(str(out_dir))[0]['iter_num'] in (1, 2)
        found.append(one_state(out_dir))
        shutil.rmtree(out_dir)

    step_after_a_kill(NEVER)
    last = forked.operations() + 1  # right after it
    for at in [*range(1, last - 20, stride), *range(last - 20, last + 1)]:  # the last of them put it in place
        step_after_a_kill(at)
    assert found[0] == 2 and found[1:] == sorted(found[1:]) and set(found) == {1, 2}
