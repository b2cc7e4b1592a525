"""train.py under torchrun, with gloo on the CPU: any number of ranks trains the same model."""
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, refused, run, succeeded
from test_train import metrics

STANDALONE = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def same_curve(a, b, tolerance=1e-5):
    a, b = metrics(a), metrics(b)
    assert [line['step'] for line in a] == [line['step'] for line in b]
    for ours, theirs in zip(a, b, strict=True):
        assert ours['tokens'] == theirs['tokens']
        for key in {'loss', 'val_loss', 'train_loss', 'grad_norm', 'lr'} & set(theirs):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance)


# 2 micro-batches are dealt out, 1 is cut by rows, and 3 over 2 ranks are cut too.
@pytest.mark.parametrize('accumulation', [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_draw_the_loss_curve_of_one(tmp_path, char_data, accumulation):
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': accumulation, 'eval_iters': 3}
    succeeded(run('train.py', out_dir=tmp_path / 'one', **keys))
    stdout = succeeded(run('train.py', out_dir=tmp_path / 'two', launcher=STANDALONE, **keys))
    same_curve(tmp_path / 'one', tmp_path / 'two')
    assert stdout.count('done: ') == stdout.count('step 6: loss') == 1  # one rank speaks


def test_two_agents_on_one_machine_train_together(tmp_path, char_data):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'two'}
    agents = [subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2', f'--node_rank={node}',
         '--master_addr=127.0.0.1', f'--master_port={port}', str(ROOT / 'train.py'),
         *[f'--{key}={value}' for key, value in keys.items()]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for node in (0, 1)]
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert 'done: ' in outputs[0][0] and outputs[1][0] == ''
    succeeded(run('train.py', **{**keys, 'out_dir': tmp_path / 'one'}))
    same_curve(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.skipif(os.name != 'posix', reason='signals a group of processes')
def test_ctrl_c_under_torchrun_stops_all_ranks_at_one_step_and_saves_it(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out', 'max_iters': 100_000, 'eval_interval': 50_000}
    command = [sys.executable, *STANDALONE, ROOT / 'train.py', *[f'--{key}={value}' for key, value in keys.items()]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    for line in process.stdout:
        if line.startswith('step 5:'):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun, which gets it too, passes it on
    rest, _ = process.communicate(timeout=60)
    stopped = re.search(r'stopped by SIGINT at step (\d+)', rest)
    assert stopped, rest
    assert torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['iter_num'] == int(stopped[1])


def test_ranks_that_cannot_share_the_work_are_told_which_can(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data, 'gradient_accumulation_steps': 1, 'batch_size': 3}
    ended = run('train.py', out_dir=tmp_path / 'out', launcher=STANDALONE, **keys)
    sentences = [line for line in ended.stderr.splitlines() if line.startswith('error: ')]
    assert ended.returncode and len(sentences) == 1
    assert '2 processes cannot share gradient_accumulation_steps=1 of batch_size=3 evenly: 1' in sentences[0]
    assert not (tmp_path / 'out').exists()


def test_a_mistake_on_the_command_line_is_said_once(tmp_path):
    ended = run('train.py', launcher=STANDALONE, n_layers=2)
    assert ended.stderr.count('there is no key') == 1 and ended.returncode
    assert 'did you mean n_layer?' in refused(run('train.py', n_layers=2))


def test_what_only_one_rank_meets_is_said_by_that_rank(tmp_path, char_data):
    script = tmp_path / 'script.py'
    script.write_text(f'import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom plaingpt.system.messages import RANK, UserError\n'
                      'if RANK == 1:\n    raise UserError("only here")\ntime.sleep(60)\n')
    ended = run(script, launcher=STANDALONE)
    assert ended.stderr.count('error: only here\n') == 1 and 'raise UserError' not in ended.stderr


@pytest.mark.slow
def test_compiled_ranks_draw_the_loss_curve_of_an_eager_one(tmp_path, char_data):
    keys = {**TINY, 'dataset': char_data}
    succeeded(run('train.py', out_dir=tmp_path / 'eager', **keys))
    compiled = run('train.py', out_dir=tmp_path / 'compiled', launcher=STANDALONE, compile=True, **keys)
    assert 'compiled' in succeeded(compiled).splitlines()[0] and 'torch.compile failed' not in compiled.stderr
    same_curve(tmp_path / 'eager', tmp_path / 'compiled')
