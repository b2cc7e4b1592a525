"""What this repository promises of a run: whatever kills it, and whenever, it goes on as if nothing had happened."""
import contextlib
import errno
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY, refused, run, run_here, succeeded
from test_distributed import STANDALONE as TWO_RANKS
from test_distributed import same_curve
from test_train import metrics

from plaingpt.system.signals import RESUMABLE
from plaingpt.training import checkpoints, run_folder

STEPS = 300
NET = {**TINY, 'n_embd': 64, 'block_size': 32, 'dropout': 0.2, 'max_iters': STEPS, 'lr_decay_iters': STEPS,
       'eval_interval': 60}
NEVER = 10**9
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='forks and kills as POSIX systems do')


def command(keys):
    return [sys.executable, str(ROOT / 'train.py'), *[f'--{key}={value}' for key, value in keys.items()]]


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
    run_folder._claims.clear()
    run_folder.claim(str(out_dir))
    assert not [name for name in os.listdir(out_dir) if 'tmp' in name]
    run_folder._claims.clear()
    return checkpoints.load_to_resume(str(out_dir))[0]['iter_num']


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
        when = dict(save=chance.randint(1, max(1, share // interval)), at=chance.randint(1, operations + 1))
        if STEPS - steps < 3 * interval:  # it must not end before its last kill
            when['at'] = 1
        if not in_save:  # or in one, if that is sooner
            when['after'] = chance.uniform(0, window)
        assert forked.train({**keys, 'out_dir': out_dir, 'init_from': start}, **when) == -9, forked.log.read_text()
        if any((out_dir / name).exists() for name in run_folder.CHECKPOINTS):
            before, steps, start = steps, one_state(out_dir), later
            assert before <= steps < STEPS
            if not in_save:
                window = min(3, window * (1.3 if steps - before < share else 0.7))
        in_saves += in_save
    assert in_saves >= 0.4 * kills and steps > 0
    assert forked.train({**keys, 'out_dir': out_dir, 'init_from': later}) == 0
    assert outcome(out_dir) == outcome(tmp_path / 'whole')
    assert set(os.listdir(out_dir)) - {'replaced'} == set(os.listdir(tmp_path / 'whole'))  # starts without a save


SAVE_ONCE = """
import sys
import torch
from plaingpt.training import checkpoints
checkpoints.save(sys.argv[1], torch.load(sys.argv[2], weights_only=True), ['last', 'ckpt'])
"""


@pytest.mark.parametrize('names', [('last.pt',), ('ckpt.pt', 'last.pt')])
def test_the_best_model_is_in_place_before_the_state_that_knows_of_it(tmp_path, char_data, monkeypatch, names):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'eval_interval': 3, 'init_from': 'auto',
                   'always_save_checkpoint': False}
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) in names:
            raise OSError(errno.EIO, 'Input/output error')
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail)
        assert 'could not be saved' in refused(run_here('train.py', **keys | {'max_iters': 3}))
    succeeded(run_here('train.py', **keys))
    best = min(line['val_loss'] for line in metrics(tmp_path / 'out') if line['step'] and 'val_loss' in line)
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['best_val_loss'] == best


def test_the_best_loss_is_that_of_a_model_on_the_disk(tmp_path, char_data, monkeypatch):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'eval_interval': 1, 'max_iters': 3,
                   'always_save_checkpoint': False}
    save, saves = checkpoints.save, []

    def fail_once(folder, state, names):
        saves.append(state['iter_num'])
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, 'No space left on device')
        save(folder, state, names)

    monkeypatch.setattr(checkpoints, 'save', fail_once)
    stdout = succeeded(run_here('train.py', **keys))
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    losses = {line['step']: line['val_loss'] for line in metrics(tmp_path / 'out')}
    assert saved['best_val_loss'] == losses[saved['iter_num']]
    assert f"best validation loss {saved['best_val_loss']:.4f}" in stdout


@pytest.mark.parametrize('stride', [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_of_its_operations_leaves_a_whole_state(forked, tmp_path, stride):
    from test_checkpoints import state
    (tmp_path / 'save_once.py').write_text(SAVE_ONCE)
    torch.save(state(2), tmp_path / 'new.pt')
    before, out_dir, found = tmp_path / 'before', tmp_path / 'out', []
    checkpoints.save(str(before), state(1), ['last', 'ckpt'])
    (before / 'metrics.jsonl').write_text('{"step": 1}\n')

    def step_after_a_kill(at):
        shutil.copytree(before, out_dir)
        assert forked.run(tmp_path / 'save_once.py', out_dir, tmp_path / 'new.pt', save=1, at=at) == -9
        assert checkpoints.load_to_sample(str(out_dir))[0]['iter_num'] in (1, 2)
        found.append(one_state(out_dir))
        shutil.rmtree(out_dir)

    step_after_a_kill(NEVER)
    last = forked.operations() + 1  # right after it
    for at in [*range(1, last - 20, stride), *range(last - 20, last + 1)]:  # the last of them put it in place
        step_after_a_kill(at)
    assert found[0] == 2 and found[1:] == sorted(found[1:]) and set(found) == {1, 2}


# ---- a full disk, a folder that goes, a folder in use ----

@pytest.mark.parametrize('number', ['ENOSPC', 'EIO', 'EROFS', 'EACCES', 'ESTALE'])
def test_a_save_that_the_disk_refuses_is_warned_of_and_tried_again(tmp_path, char_data, monkeypatch, number):
    out_dir, saved, calls, fsync = tmp_path / 'out', [], [], os.fsync

    def refuse_the_second_save(descriptor):
        calls.append(1)
        if 4 <= len(calls) <= 6:  # a save syncs metrics.jsonl, its own file, and the folder
            saved.append((out_dir / 'last.pt').read_bytes())
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', refuse_the_second_save)
    ended = run_here('train.py', **TINY | {'dataset': char_data, 'out_dir': out_dir, 'eval_interval': 1})
    assert succeeded(ended).count('step 6: train loss') == 1
    for step in 2, 3, 4:
        assert f'the state of step {step} could not be saved in {out_dir} ([Errno' in ended.stderr
    assert saved[0] == saved[1] == saved[2] and ended.stderr.count('warning') == 3
    assert one_state(out_dir) == 6 and len(metrics(out_dir)) == 7


def test_a_folder_removed_while_a_run_goes_on_is_made_anew_with_a_warning(tmp_path, char_data, monkeypatch):
    out_dir, save = tmp_path / 'out', checkpoints.save

    def save_and_lose(folder, state, names):
        save(folder, state, names)
        if state['iter_num'] == 2:
            shutil.rmtree(folder)

    monkeypatch.setattr(checkpoints, 'save', save_and_lose)
    ended = run_here('train.py', **TINY | {'dataset': char_data, 'out_dir': out_dir, 'eval_interval': 2})
    succeeded(ended)
    assert 'metrics.jsonl cannot be written (No such file or directory)' in ended.stderr
    assert one_state(out_dir) == 6 and [line['step'] for line in metrics(out_dir)] == [3, 4, 5, 6]


def test_what_could_not_be_saved_or_written_at_the_end_is_an_error(tmp_path, char_data, monkeypatch):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'init_from': 'auto'}
    full = Mock(side_effect=OSError(errno.ENOSPC, 'No space left on device'))
    with monkeypatch.context() as patch:
        patch.setattr('plaingpt.training.metrics.open', full, raising=False)
        assert 'the last lines of' in refused(run_here('train.py', **keys))
    with monkeypatch.context() as patch:
        patch.setattr(os, 'link', full), patch.setattr(shutil, 'copyfile', full)
        assert 'the state of step 9 could not be saved' in refused(run_here('train.py', **keys | {'max_iters': 9}))
    assert one_state(tmp_path / 'out') == 6


def start(keys, until='step 1:'):
    """A running train.py, which has printed a line that begins so."""
    process = subprocess.Popen(command(keys), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.communicate())


def test_two_runs_do_not_share_a_folder_and_the_second_goes_on_when_the_first_is_dead(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'init_from': 'auto'}
    first = start(keys | {'max_iters': 10**6, 'checkpoint_interval': 1})
    first.stdout.readline()  # of step 2, which comes after the save of step 1
    assert 'another run is writing into' in refused(run_here('train.py', **keys))
    first.kill(), first.communicate()
    reached = one_state(tmp_path / 'out')
    succeeded(run_here('train.py', **keys | {'max_iters': reached + 2}))
    assert [line['step'] for line in metrics(tmp_path / 'out')] == list(range(reached + 3))


# ---- signals ----

@pytest.mark.parametrize('number', [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow)
                                                      for number in (signal.SIGINT, signal.SIGHUP))])
def test_a_signal_ends_the_step_saves_and_says_that_the_run_can_be_resumed(tmp_path, char_data, number):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 10**6}
    process = start(keys)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == RESUMABLE == 75
    reached = one_state(tmp_path / 'out')
    assert number == signal.SIGHUP or f'stopped by {number.name} at step {reached}, nothing is lost' in said


def test_a_run_whose_terminal_is_closed_saves_its_state(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 10**6}
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests run under nohup
        os.execv(sys.executable, command(keys))
    while b'step 3:' not in os.read(terminal, 10**5):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == RESUMABLE
    assert one_state(tmp_path / 'out') >= 3


def test_a_run_that_nobody_listens_to_saves_its_state(tmp_path, char_data):
    process = start(TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 10**6})
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=60) == RESUMABLE and one_state(tmp_path / 'out') >= 1
    assert process.stderr.read() == ''
    process.stderr.close()


def test_a_second_ctrl_c_quits_at_once_and_the_run_can_still_be_resumed(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'checkpoint_interval': 1}
    succeeded(run_here('train.py', **keys))
    # One step of hours, in which the first is waiting for its end.
    process = start({**keys, 'init_from': 'resume', 'max_iters': 9, 'gradient_accumulation_steps': 10**7}, 'memory')
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT and one_state(tmp_path / 'out') == 6


def test_ctrl_c_before_the_first_step_leaves_no_traceback(tmp_path, char_data):
    script = tmp_path / 'script.py'
    script.write_text(f'import signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport plaingpt.system.messages\n'
                      'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # ignored where tests run behind &
                      'print("ready", flush=True)\ntime.sleep(60)\n')
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ('', '') and process.returncode == 130


# ---- ranks ----

def ranks(agent):
    """Process ids of the ranks that a torchrun has started."""
    found = []
    for status in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(status.read_text().rpartition(')')[2].split()[1]) == agent.pid:
                found.append(int(status.parent.name))
    return sorted(found)


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds processes as Linux lists them')
@pytest.mark.parametrize('kills', [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_job_whose_ranks_are_killed_goes_on_by_itself_and_ends_as_an_undisturbed_one(tmp_path, char_data, kills):
    chance = random.Random(kills)
    keys = NET | {'dataset': char_data, 'eval_interval': 100, 'checkpoint_interval': 10, 'max_iters': 20 * kills + 40}
    succeeded(run('train.py', launcher=TWO_RANKS, **keys, out_dir=tmp_path / 'whole'))
    launcher = [sys.executable, *TWO_RANKS, '--max-restarts=20', *command(keys | {'out_dir': tmp_path / 'out'})[1:]]
    log, seen = tmp_path / 'log', set()
    with log.open('w') as output:
        agent = subprocess.Popen(launcher, stdout=output, stderr=output)
    for kill in range(kills):
        deadline, started = time.monotonic() + 60, None  # no hang
        while started is None or log.read_text().count('\nstep ') < started + chance.randint(1, 9):
            assert agent.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            if started is None and len(seen.union(ranks(agent))) == 2 * kill + 2:  # not the survivors of the last kill
                started = log.read_text().count('\nstep ')
            time.sleep(0.05)
        seen.update(ranks(agent))
        os.kill(ranks(agent)[kill % 2], signal.SIGKILL)
    assert agent.wait(timeout=120) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert said.count('has lost another') == kills and said.count('resuming') <= kills and said.count('done: ') == 1
    assert outcome(tmp_path / 'out') == outcome(tmp_path / 'whole')
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_at_one_step_and_a_restart_of_the_job_goes_on(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'init_from': 'auto'}
    launcher = [sys.executable, *TWO_RANKS, *command(keys | {'max_iters': 10**6})[1:]]
    agent = subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in agent.stdout:
        if line.startswith('step 3:'):
            break
    agent.terminate()
    said, _ = agent.communicate(timeout=60)
    reached = one_state(tmp_path / 'out')
    assert f'stopped by SIGTERM at step {reached}' in said
    succeeded(run('train.py', launcher=TWO_RANKS, **keys | {'max_iters': reached + 3}))
    succeeded(run_here('train.py', **keys | {'out_dir': tmp_path / 'whole', 'max_iters': reached + 3}))
    same_curve(tmp_path / 'out', tmp_path / 'whole')


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds processes as Linux lists them')
def test_a_signal_to_one_rank_stops_all_and_none_leaves_before_the_state_is_saved(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 10**6}
    script = patched(tmp_path, SLOW_SAVE)
    flags = command(keys)[2:]
    agent = subprocess.Popen([sys.executable, *TWO_RANKS, script, *flags], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.DEVNULL)
    for line in agent.stdout:
        if line.startswith('step 3:'):
            break
    os.kill(ranks(agent)[1], signal.SIGTERM)
    said, _ = agent.communicate(timeout=90)
    assert f"at step {one_state(tmp_path / 'out')}, nothing is lost" in said


SLOW_SAVE = """
import time
from plaingpt.training import checkpoints
def save(*arguments, original=checkpoints.save):
    time.sleep(3)
    original(*arguments)
checkpoints.save = save
"""
PATCHED = """
import hashlib, os, runpy, sys
sys.path.insert(0, {root!r})
sys.argv = ['train.py', *sys.argv[1:]]
rank = os.environ.get('RANK', '0')
import torch
{patch}
runpy.run_path({root!r} + '/train.py', run_name='__main__')
"""
HASH_BATCHES = """
from plaingpt.text import token_files
rows = {{}}
def batch(self, seed, stream, step, micro_batch, *arguments, original=token_files.TokenFile.batch):
    x, y = original(self, seed, stream, step, micro_batch, *arguments)
    if stream == 'train':
        part, parts = (*arguments[3:], 0, 1)[:2]
        with open({log!r} + rank, 'a') as file:
            for number, row in enumerate(zip(x, y)):
                digest = hashlib.sha256(torch.stack(row).numpy().tobytes()).hexdigest()
                print(step, micro_batch, part + number * parts, digest, file=file)
    return x, y
token_files.TokenFile.batch = batch
"""


def patched(tmp_path, patch, **names):
    """A script that runs train.py with something in it replaced."""
    script = tmp_path / 'patched.py'
    script.write_text(PATCHED.format(root=str(ROOT), patch=patch.format(**names)))
    return script


@pytest.mark.slow
def test_on_1_then_2_then_4_then_1_ranks_a_run_sees_the_same_batches_and_draws_the_same_curve(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'gradient_accumulation_steps': 4, 'eval_interval': 25, 'lr_decay_iters': 50,
                   'init_from': 'auto'}
    script = patched(tmp_path, HASH_BATCHES, log=str(tmp_path / 'changing'))
    for world_size, end in (1, 12), (2, 25), (4, 38), (1, 50):
        launcher = ('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world_size}')
        succeeded(run(script, launcher=launcher, **keys | {'max_iters': end}, out_dir=tmp_path / 'changing_out'))
    whole = patched(tmp_path, HASH_BATCHES, log=str(tmp_path / 'whole'))
    succeeded(run(whole, **keys | {'max_iters': 50}, out_dir=tmp_path / 'whole_out'))
    changing, one = (sorted(line for path in tmp_path.glob(f'{name}[0-9]') for line in path.read_text().splitlines())
                     for name in ('changing', 'whole'))
    assert changing == one and len(one) == 50 * 4 * TINY['batch_size']
    same_curve(tmp_path / 'changing_out', tmp_path / 'whole_out')


def test_ranks_that_see_different_runs_in_out_dir_do_not_start(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'init_from': 'auto'}
    succeeded(run_here('train.py', **keys))
    before = outcome(tmp_path / 'out')
    script = patched(tmp_path, "if rank == '1': sys.argv.append('--out_dir={other}')", other=tmp_path / 'elsewhere')
    ended = run(script, launcher=TWO_RANKS, **keys | {'max_iters': 8})
    assert ended.returncode and 'error: the processes find different states in' in ended.stderr
    assert outcome(tmp_path / 'out') == before and not (tmp_path / 'elsewhere').exists()


# ---- a long run ----

@pytest.mark.slow
def test_a_run_of_5000_steps_keeps_its_memory_and_its_number_of_files(tmp_path, char_data):
    keys = TINY | {'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 5000, 'lr_decay_iters': 5000,
                   'eval_interval': 250, 'checkpoint_interval': 50, 'log_interval': 10}
    process, used = start(keys), {}
    for line in process.stdout:
        if line.startswith('step ') and (step := int(line[5:].partition(':')[0])) % 500 == 0:
            with contextlib.suppress(OSError):
                pages = int(Path(f'/proc/{process.pid}/statm').read_text(encoding='utf-8').split()[1])
                used[step] = pages, len(os.listdir(f'/proc/{process.pid}/fd')), len(os.listdir(tmp_path / 'out'))
    assert process.wait() == 0 and len(used) > 8
    pages, descriptors, files = zip(*(used[step] for step in sorted(used)), strict=True)
    assert max(pages[2:]) < 1.02 * pages[1], used
    assert max(descriptors) - min(descriptors) <= 2 and max(files) - min(files) <= 2, used  # a save may be going on
