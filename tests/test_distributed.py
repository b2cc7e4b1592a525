"""train.py under torchrun, with gloo on the CPU: any number of ranks trains the same model."""
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, refused, run, succeeded
from runs import TWO_RANKS, assert_same_curve, command, metrics, state


# 2 micro-batches are dealt out, 1 is cut by rows, and 3 on 2 ranks are cut too.
@pytest.mark.parametrize('accumulation', [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_draw_the_loss_curve_of_one(tmp_path, char_data, accumulation):
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': accumulation,
            'eval_iters': 3}
    succeeded(run('train.py', out_dir=tmp_path / 'one', **keys))
    stdout = succeeded(run('train.py', out_dir=tmp_path / 'two', launcher=TWO_RANKS, **keys))
    assert_same_curve(tmp_path / 'one', tmp_path / 'two')
    assert stdout.count('done: ') == 1  # one rank speaks
    assert stdout.count('step 6: loss') == 1


@pytest.mark.parametrize('accumulation', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_draw_the_dropout_of_one(tmp_path, char_data, accumulation):
    """In float32, also where the ranks share the rows of a micro-batch (accumulation 1)."""
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': accumulation,
            'dropout': 0.2}
    succeeded(run('train.py', out_dir=tmp_path / 'one', **keys))
    succeeded(run('train.py', out_dir=tmp_path / 'two', launcher=TWO_RANKS, **keys))
    assert_same_curve(tmp_path / 'one', tmp_path / 'two')
    succeeded(run('train.py', out_dir=tmp_path / 'without', **{**keys, 'dropout': 0.0}))
    assert metrics(tmp_path / 'without')[1]['loss'] != metrics(tmp_path / 'one')[1]['loss']


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def test_two_agents_on_one_machine_train_together(tmp_path, char_data):
    port = free_port()
    keys = {**TINY, 'dataset': char_data}
    agents = []
    for node in 0, 1:
        launcher = ['-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2',
                    f'--node_rank={node}', '--master_addr=127.0.0.1', f'--master_port={port}']
        arguments = command({**keys, 'out_dir': tmp_path / 'two'})[1:]
        agents.append(subprocess.Popen([sys.executable, *launcher, *arguments], cwd=tmp_path,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    (first_stdout, _), (second_stdout, _) = outputs
    assert 'done: ' in first_stdout
    assert second_stdout == ''
    succeeded(run('train.py', **keys, out_dir=tmp_path / 'one'))
    assert_same_curve(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.skipif(os.name != 'posix', reason='signals a group of processes')
def test_ctrl_c_under_torchrun_stops_all_ranks_at_one_step_and_saves_it(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 100_000,
            'eval_interval': 50_000}
    process = subprocess.Popen([sys.executable, *TWO_RANKS, *command(keys)[1:]],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    for line in process.stdout:
        if line.startswith('step 5:'):
            break
    # As a terminal does: torchrun gets the signal too, and passes it on.
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    stopped = re.search(r'stopped by SIGINT at step (\d+)', rest)
    assert stopped, rest
    assert state(tmp_path / 'out' / 'last.pt')['iter_num'] == int(stopped[1])


def test_ranks_that_cannot_share_the_work_are_told_which_can(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': 1, 'batch_size': 3}
    ended = run('train.py', out_dir=tmp_path / 'out', launcher=TWO_RANKS, **keys)
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert ('2 processes cannot share gradient_accumulation_steps=1 of batch_size=3 evenly: '
            '1 processes can') in errors[0]
    assert not (tmp_path / 'out').exists()


def test_a_mistake_on_the_command_line_is_said_once(tmp_path):
    ended = run('train.py', launcher=TWO_RANKS, n_layers=2)
    assert ended.returncode != 0
    assert ended.stderr.count('there is no key') == 1
    assert 'did you mean n_layer?' in refused(run('train.py', n_layers=2))


RANK_1_FAILS = """
import sys, time
sys.path.insert(0, {root!r})
from plaingpt.system.messages import RANK, UserError
if RANK == 1:
    raise UserError('only here')
time.sleep(60)
"""


def test_a_mistake_that_only_one_rank_meets_is_said_by_that_rank(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(RANK_1_FAILS.format(root=str(ROOT)), encoding='utf-8')
    ended = run(script, launcher=TWO_RANKS)
    assert ended.stderr.count('error: only here\n') == 1
    assert 'raise UserError' not in ended.stderr


@pytest.mark.slow
def test_compiled_ranks_draw_the_loss_curve_of_an_eager_one(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data}
    succeeded(run('train.py', out_dir=tmp_path / 'eager', **keys))
    ended = run('train.py', out_dir=tmp_path / 'compiled', launcher=TWO_RANKS, compile=True,
                **keys)
    assert 'compiled' in succeeded(ended).splitlines()[0]
    assert 'torch.compile failed' not in ended.stderr
    assert_same_curve(tmp_path / 'eager', tmp_path / 'compiled')
