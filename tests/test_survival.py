"""A run survives kills, full disks and signals: it continues as if nothing had happened."""
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
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY, flags, refused, run, run_here, succeeded
from runs import (TWO_RANKS, assert_same_curve, command, losses, metrics, outcome, patched,
                  resumable_step, small_checkpoint, state)

from plaingpt.system.signals import RESUMABLE
from plaingpt.training import checkpoints

STEPS = 300
NET = {**TINY, 'n_embd': 64, 'block_size': 32, 'dropout': 0.2, 'max_iters': STEPS,
       'lr_decay_iters': STEPS, 'eval_interval': 60}
ENDLESS = 10**6  # steps, of a run that a test stops
NEVER = 10**9    # a number of a save or an operation that no run reaches

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='forks and kills as POSIX systems do')
on_linux = pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds processes in /proc')


# ---- kills ----

class Forked:
    """Runs scripts in children of a process that has imported torch; see forked.py."""

    def __init__(self, log):
        self.log = log
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
        self.process = subprocess.Popen([sys.executable, ROOT / 'tests' / 'forked.py'],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment)
        assert self.process.stdout.readline() == 'ready\n'

    def train(self, keys, **when):
        """Runs train.py, and kills it when forked.py is told to; the exit status."""
        return self.run('train.py', *flags(keys), **when)

    def run(self, *argv, **when):
        arguments = [str(argument) for argument in argv]
        order = {'argv': arguments, 'log': str(self.log), **when}
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def operations(self):
        """How many file operations the last save took, if it was not killed before its end."""
        log = self.log.read_text(encoding='utf-8')
        _, _, rest = log.rpartition('file operations of this save: ')
        return int(rest.split()[0])

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope='module')
def forked(tmp_path_factory):
    server = Forked(tmp_path_factory.mktemp('forked') / 'log')
    yield server
    server.close()


@pytest.mark.parametrize('dtype, first, later, kills', [
    ('float32', {}, {'init_from': 'resume'}, 5),
    ('bfloat16', {'resume': 'auto'}, {'resume': 'auto'}, 5),
    pytest.param('float32', {'resume': 'auto'}, {'resume': 'auto'}, 100, marks=pytest.mark.slow),
    pytest.param('bfloat16', {}, {'init_from': 'resume'}, 100, marks=pytest.mark.slow),
])
def test_a_run_killed_anywhere_ends_as_an_undisturbed_one(forked, tmp_path, char_data, dtype,
                                                          first, later, kills):
    """first: flags of the starts until a save was finished; later: those of the others."""
    chance = random.Random(kills)
    interval = 12 if kills < 50 else 2
    keys = {**NET, 'dataset': char_data, 'dtype': dtype, 'checkpoint_interval': interval}
    assert forked.train({**keys, 'out_dir': tmp_path / 'whole'}, save=NEVER, at=NEVER) == 0
    operations = forked.operations()

    out_dir = tmp_path / 'out'
    start = first
    steps = 0
    window = 1.0  # seconds within which a kill comes that does not wait for a save
    kills_in_saves = 0
    for kill in range(kills):
        share = (STEPS - steps) // (kills + 1 - kill)  # of the steps that are left
        when = {'save': chance.randint(1, max(1, share // interval)),
                'at': chance.randint(1, operations + 1)}
        if STEPS - steps < 3 * interval:  # the run must not end before its last kill
            when['at'] = 1
        waits_for_save = kill % 2 == 0
        if waits_for_save:
            kills_in_saves += 1
        else:  # or in a save, if that comes sooner
            when['after'] = chance.uniform(0, window)
        status = forked.train({**keys, 'out_dir': out_dir, **start}, **when)
        assert status == -signal.SIGKILL, forked.log.read_text(encoding='utf-8')
        if checkpoints.present(out_dir):
            before = steps
            steps = resumable_step(out_dir)
            start = later
            assert before <= steps < STEPS
            if not waits_for_save:
                slow = steps - before < share
                window = min(3, window * (1.3 if slow else 0.7))
    assert kills_in_saves >= 0.4 * kills
    assert steps > 0

    assert forked.train({**keys, 'out_dir': out_dir, **later}) == 0
    assert outcome(out_dir) == outcome(tmp_path / 'whole')
    # A start that was killed before its first save may have been set aside.
    assert set(os.listdir(out_dir)) - {'replaced'} == set(os.listdir(tmp_path / 'whole'))


@pytest.mark.parametrize('names', [('last.pt',), ('ckpt.pt', 'last.pt')])
def test_the_best_model_is_in_place_before_the_state_that_knows_of_it(tmp_path, char_data,
                                                                      monkeypatch, names):
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'eval_interval': 3,
            'resume': 'auto', 'always_save_checkpoint': False}
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) in names:
            raise OSError(errno.EIO, 'Input/output error')
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail)
        assert 'could not be saved' in refused(run_here('train.py', **{**keys, 'max_iters': 3}))
    succeeded(run_here('train.py', **keys))
    assert state(out_dir / 'ckpt.pt')['best_val_loss'] == min(losses(out_dir).values())


def test_the_best_loss_is_that_of_a_model_on_the_disk(tmp_path, char_data, monkeypatch):
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'eval_interval': 1, 'max_iters': 3,
            'always_save_checkpoint': False}
    save = checkpoints.save

    def fail_once(folder, checkpoint, names):
        if checkpoint['iter_num'] == 2:
            raise OSError(errno.ENOSPC, 'No space left on device')
        save(folder, checkpoint, names)

    monkeypatch.setattr(checkpoints, 'save', fail_once)
    stdout = succeeded(run_here('train.py', **keys))
    saved = state(out_dir / 'ckpt.pt')
    assert saved['best_val_loss'] == losses(out_dir)[saved['iter_num']]
    assert f"best validation loss {saved['best_val_loss']:.4f}" in stdout


SAVE_ONCE = """
import sys
import torch
from plaingpt.training import checkpoints
checkpoints.save(sys.argv[1], torch.load(sys.argv[2], weights_only=True), ['last', 'ckpt'])
"""


@pytest.mark.parametrize('stride', [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_of_its_operations_leaves_a_whole_state(forked, tmp_path, stride):
    script = tmp_path / 'save_once.py'
    script.write_text(SAVE_ONCE, encoding='utf-8')
    torch.save(small_checkpoint(2), tmp_path / 'new.pt')
    before = tmp_path / 'before'
    out_dir = tmp_path / 'out'
    checkpoints.save(str(before), small_checkpoint(1), ['last', 'ckpt'])
    (before / 'metrics.jsonl').write_text('{"step": 1}\n', encoding='utf-8')

    def step_after_a_kill(at):
        shutil.copytree(before, out_dir)
        status = forked.run(script, out_dir, tmp_path / 'new.pt', save=1, at=at)
        assert status == -signal.SIGKILL
        sampled, _ = checkpoints.load_to_sample(str(out_dir))
        assert sampled['iter_num'] in (1, 2)
        step = resumable_step(out_dir)
        shutil.rmtree(out_dir)
        return step

    assert step_after_a_kill(NEVER) == 2
    last = forked.operations() + 1  # a kill right after the save
    # Every operation at the end, which puts the files in place, and some of the many before.
    kills = [*range(1, last - 20, stride), *range(last - 20, last + 1)]
    steps = [step_after_a_kill(at) for at in kills]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


# ---- a full disk, a folder that vanishes, a folder in use ----

@pytest.mark.parametrize('name', ['ENOSPC', 'EIO', 'EROFS', 'EACCES', 'ESTALE'])
def test_a_save_that_the_disk_refuses_is_warned_of_and_tried_again(tmp_path, char_data,
                                                                   monkeypatch, name):
    out_dir = tmp_path / 'out'
    number = getattr(errno, name)
    fsync = os.fsync
    refusals = []  # last.pt at each of them

    def refuse_three_saves(descriptor):
        if len(refusals) < 3 and steps_in_record(out_dir) >= 2:
            refusals.append((out_dir / 'last.pt').read_bytes())
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', refuse_three_saves)
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'eval_interval': 1}
    ended = run_here('train.py', **keys)
    assert succeeded(ended).count('step 6: train loss') == 1
    for step in 2, 3, 4:
        sentence = f'the state of step {step} could not be saved in {out_dir} ([Errno'
        assert sentence in ended.stderr
    assert ended.stderr.count('warning') == 3
    assert refusals[0] == refusals[1] == refusals[2]
    assert resumable_step(out_dir) == 6
    assert len(metrics(out_dir)) == 7


def steps_in_record(out_dir):
    """The last step in metrics.jsonl, which is written before the state of the step is saved."""
    lines = metrics(out_dir)
    return lines[-1]['step'] if lines else 0


def test_a_folder_removed_during_a_run_is_made_again_with_a_warning(tmp_path, char_data,
                                                                    monkeypatch):
    out_dir = tmp_path / 'out'
    save = checkpoints.save

    def save_and_lose(folder, checkpoint, names):
        save(folder, checkpoint, names)
        if checkpoint['iter_num'] == 2:
            shutil.rmtree(folder)

    monkeypatch.setattr(checkpoints, 'save', save_and_lose)
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'eval_interval': 2}
    ended = run_here('train.py', **keys)
    succeeded(ended)
    assert 'metrics.jsonl cannot be written (No such file or directory)' in ended.stderr
    assert resumable_step(out_dir) == 6
    assert [line['step'] for line in metrics(out_dir)] == [3, 4, 5, 6]


def test_a_record_or_a_state_that_could_not_be_written_at_the_end_is_an_error(tmp_path, char_data,
                                                                             monkeypatch):
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'resume': 'auto'}
    full = Mock(side_effect=OSError(errno.ENOSPC, 'No space left on device'))
    with monkeypatch.context() as patch:
        patch.setattr('plaingpt.training.metrics.open', full, raising=False)
        assert 'the last lines of' in refused(run_here('train.py', **keys))
    with monkeypatch.context() as patch:
        patch.setattr(os, 'link', full)
        patch.setattr(shutil, 'copyfile', full)
        ended = run_here('train.py', **{**keys, 'max_iters': 9})
        assert 'the state of step 9 could not be saved' in refused(ended)
    assert resumable_step(out_dir) == 6


def start(keys, until='step 1:'):
    """A running train.py, which has printed a line that begins so."""
    process = subprocess.Popen(command(keys), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    read_until(process, until)
    return process


def read_until(process, beginning):
    """Reads the output of a process up to a line that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.communicate())


def test_two_runs_do_not_share_a_folder_and_the_second_continues_once_the_first_is_dead(tmp_path,
                                                                                       char_data):
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'resume': 'auto'}
    first = start({**keys, 'max_iters': ENDLESS, 'checkpoint_interval': 1})
    assert 'another run is writing into' in refused(run_here('train.py', **keys))
    first.kill()
    first.communicate()
    reached = resumable_step(out_dir)
    succeeded(run_here('train.py', **{**keys, 'max_iters': reached + 2}))
    assert [line['step'] for line in metrics(out_dir)] == list(range(reached + 3))


# ---- signals ----

@pytest.mark.parametrize('number', [
    signal.SIGTERM,
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
])
def test_a_signal_ends_the_step_saves_and_says_how_to_continue(tmp_path, char_data, number):
    process = start({**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out',
                     'max_iters': ENDLESS})
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == RESUMABLE == 75
    reached = resumable_step(tmp_path / 'out')
    assert reached >= 1
    sentence = (f'stopped by {number.name} at step {reached}; to continue, add --resume=auto to '
                'the same command\n')
    assert sentence in said


def test_a_run_whose_terminal_is_closed_saves_its_state(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': ENDLESS}
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, if the tests run under it, ignores it
        os.execv(sys.executable, command(keys))
    while b'step 3:' not in os.read(terminal, 10**5):
        pass
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == RESUMABLE
    assert resumable_step(tmp_path / 'out') >= 3


def test_a_run_whose_output_nobody_reads_saves_its_state(tmp_path, char_data):
    process = start({**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out',
                     'max_iters': ENDLESS})
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=60) == RESUMABLE
    assert resumable_step(tmp_path / 'out') >= 1
    assert process.stderr.read() == ''
    process.stderr.close()


def test_a_second_ctrl_c_quits_at_once_and_the_run_can_still_be_resumed(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out'}
    succeeded(run_here('train.py', **keys))
    # A step of hours, whose end the first Ctrl-C waits for.
    long_step = {'init_from': 'resume', 'max_iters': 9, 'gradient_accumulation_steps': 10**6}
    process = start({**keys, **long_step}, until='step 6: train loss')
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert resumable_step(tmp_path / 'out') == 6


# Where the tests run in the background of a shell, SIGINT is ignored: hence the handler.
SLEEP = """
import signal, sys, time
sys.path.insert(0, {root!r})
import plaingpt.system.messages
signal.signal(signal.SIGINT, signal.default_int_handler)
print('ready', flush=True)
time.sleep(60)
"""


def test_ctrl_c_before_the_first_step_leaves_no_traceback(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SLEEP.format(root=str(ROOT)), encoding='utf-8')
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ('', '')
    assert process.returncode == 128 + signal.SIGINT


# ---- ranks ----

def ranks(agent):
    """Process ids of the ranks that a torchrun has started."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            _, _, fields = path.read_text(encoding='utf-8').rpartition(')')
            parent = int(fields.split()[1])
            if parent == agent.pid:
                found.append(int(path.parent.name))
    return sorted(found)


@on_linux
@pytest.mark.parametrize('kills', [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_job_whose_ranks_are_killed_restarts_and_ends_as_an_undisturbed_one(tmp_path, char_data,
                                                                             kills):
    chance = random.Random(kills)
    keys = {**NET, 'dataset': char_data, 'eval_interval': 100, 'checkpoint_interval': 10,
            'max_iters': 20 * kills + 40}
    succeeded(run('train.py', launcher=TWO_RANKS, **keys, out_dir=tmp_path / 'whole'))
    arguments = command({**keys, 'out_dir': tmp_path / 'out'})[1:]
    log = tmp_path / 'log'
    with log.open('w') as output:
        agent = subprocess.Popen([sys.executable, *TWO_RANKS, '--max-restarts=20', *arguments],
                                 stdout=output, stderr=output)

    def said():
        return log.read_text(encoding='utf-8')

    def wait_until(condition, *arguments):
        deadline = time.monotonic() + 60
        while not condition(*arguments):
            assert agent.poll() is None, said()[-3000:]
            assert time.monotonic() < deadline, said()[-3000:]
            time.sleep(0.05)

    seen = set()  # process ids of all ranks so far

    def two_have_started():
        return len(set(ranks(agent)) - seen) == 2  # without the survivor of the last kill

    def have_done(steps):
        return said().count('\nstep ') >= steps

    for kill in range(kills):
        wait_until(two_have_started)
        wait_until(have_done, said().count('\nstep ') + chance.randint(1, 9))
        alive = ranks(agent)
        seen.update(alive)
        os.kill(alive[kill % 2], signal.SIGKILL)
    assert agent.wait(timeout=120) == 0, said()[-3000:]
    assert said().count('lost its connection to another rank') == kills
    assert said().count('resuming') <= kills
    assert said().count('done: ') == 1
    assert outcome(tmp_path / 'out') == outcome(tmp_path / 'whole')
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_at_one_step_and_the_job_can_be_continued(tmp_path,
                                                                                     char_data):
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'dataset': char_data, 'resume': 'auto'}
    arguments = command({**keys, 'out_dir': out_dir, 'max_iters': ENDLESS})[1:]
    agent = subprocess.Popen([sys.executable, *TWO_RANKS, *arguments], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True)
    read_until(agent, 'step 3:')
    agent.terminate()
    said, _ = agent.communicate(timeout=60)
    reached = resumable_step(out_dir)
    assert f'stopped by SIGTERM at step {reached}' in said
    keys['max_iters'] = reached + 3
    succeeded(run('train.py', launcher=TWO_RANKS, **keys, out_dir=out_dir))
    succeeded(run_here('train.py', **keys, out_dir=tmp_path / 'whole'))
    assert_same_curve(out_dir, tmp_path / 'whole')


SLOW_SAVE = """
import time
from plaingpt.training import checkpoints
def save(*arguments, original=checkpoints.save):
    time.sleep(3)
    original(*arguments)
checkpoints.save = save
"""


@on_linux
def test_a_signal_to_one_rank_stops_all_and_none_leaves_before_the_state_is_saved(tmp_path,
                                                                                 char_data):
    script = patched(tmp_path, SLOW_SAVE)
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': ENDLESS,
            'eval_interval': NEVER}
    agent = subprocess.Popen([sys.executable, *TWO_RANKS, script, *flags(keys)],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    read_until(agent, 'step 3:')
    os.kill(ranks(agent)[1], signal.SIGTERM)
    said, _ = agent.communicate(timeout=90)
    assert f"at step {resumable_step(tmp_path / 'out')}; to continue, add --resume=auto" in said


# Writes down each row of each training batch: step, micro-batch, row, and a hash of its content.
HASH_BATCHES = """
from plaingpt.text import token_files
def batch(self, seed, stream, step, micro_batch, batch_size, block_size, device, part=0, parts=1,
          original=token_files.TokenFile.batch):
    x, y = original(self, seed, stream, step, micro_batch, batch_size, block_size, device, part,
                    parts)
    if stream == 'train':
        with open({log!r} + rank, 'a') as file:
            for number, row in enumerate(zip(x, y)):
                digest = hashlib.sha256(torch.stack(row).numpy().tobytes()).hexdigest()
                print(step, micro_batch, part + number * parts, digest, file=file)
    return x, y
token_files.TokenFile.batch = batch
"""


def hashed_batches(tmp_path, name):
    """All lines that HASH_BATCHES has written, on any rank."""
    lines = []
    for path in tmp_path.glob(f'{name}[0-9]'):
        lines.extend(path.read_text(encoding='utf-8').splitlines())
    return sorted(lines)


@pytest.mark.slow
def test_on_1_then_2_then_4_then_1_ranks_a_run_sees_the_same_batches_and_draws_the_same_curve(
        tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': 4, 'eval_interval': 25,
            'lr_decay_iters': 50, 'resume': 'auto'}
    script = patched(tmp_path, HASH_BATCHES, log=str(tmp_path / 'changing'))
    for world_size, end in (1, 12), (2, 25), (4, 38), (1, 50):
        launcher = ('-m', 'torch.distributed.run', '--standalone',
                    f'--nproc_per_node={world_size}')
        succeeded(run(script, launcher=launcher, **{**keys, 'max_iters': end},
                      out_dir=tmp_path / 'changing_out'))
    script = patched(tmp_path, HASH_BATCHES, log=str(tmp_path / 'whole'))
    succeeded(run(script, **{**keys, 'max_iters': 50}, out_dir=tmp_path / 'whole_out'))
    whole = hashed_batches(tmp_path, 'whole')
    assert hashed_batches(tmp_path, 'changing') == whole
    assert len(whole) == 50 * 4 * TINY['batch_size']
    assert_same_curve(tmp_path / 'changing_out', tmp_path / 'whole_out')


def test_ranks_that_see_different_runs_in_out_dir_do_not_start(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    elsewhere = tmp_path / 'elsewhere'
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'resume': 'auto'}
    succeeded(run_here('train.py', **keys))
    before = outcome(out_dir)
    script = patched(tmp_path, "if rank == '1': sys.argv.append('--out_dir={other}')",
                     other=elsewhere)
    ended = run(script, launcher=TWO_RANKS, **{**keys, 'max_iters': 8})
    assert ended.returncode != 0
    assert 'error: the processes find different states in' in ended.stderr
    assert outcome(out_dir) == before
    assert not elsewhere.exists()


# ---- a long run ----

class Usage(NamedTuple):
    """What a process has in use at some step."""
    pages: int        # of memory
    descriptors: int  # open files
    files: int        # in its out_dir


def usage(process, out_dir):
    statm = Path(f'/proc/{process.pid}/statm').read_text(encoding='utf-8')
    descriptors = os.listdir(f'/proc/{process.pid}/fd')
    return Usage(int(statm.split()[1]), len(descriptors), len(os.listdir(out_dir)))


@on_linux
@pytest.mark.slow
def test_a_run_of_5000_steps_keeps_its_memory_and_its_number_of_files(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'max_iters': 5000,
            'lr_decay_iters': 5000, 'eval_interval': 250, 'checkpoint_interval': 50,
            'log_interval': 10}
    process = start(keys)
    used = []
    for line in process.stdout:
        step = line.removeprefix('step ').partition(':')[0]
        if step.isdecimal() and int(step) % 500 == 0:
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                used.append(usage(process, out_dir))
    assert process.wait() == 0
    assert len(used) > 8
    pages = [each.pages for each in used]
    descriptors = [each.descriptors for each in used]
    files = [each.files for each in used]
    assert max(pages[2:]) < 1.02 * pages[1], used
    # A save may be going on.
    assert max(descriptors) - min(descriptors) <= 2, used
    assert max(files) - min(files) <= 2, used
