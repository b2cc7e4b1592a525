"""plaingpt/training/processes.py: ranks share each step, and agree."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from runs import TWO_RANKS

from plaingpt.system.messages import UserError
from plaingpt.training.processes import Process, Unit, set_up_process

CPU = torch.device('cpu')


def shares(world_size, micro_batches, batch_size):
    """The Units of each rank."""
    ranks = [Process(CPU, rank, rank, world_size) for rank in range(world_size)]
    return [process.share(micro_batches, batch_size) for process in ranks]


def test_a_process_alone_computes_whole_micro_batches():
    assert shares(1, 3, 4) == [[Unit(0, 0, 1), Unit(1, 0, 1), Unit(2, 0, 1)]]


def test_ranks_take_turns_at_micro_batches():
    assert shares(2, 4, 5) == [[Unit(0, 0, 1), Unit(2, 0, 1)], [Unit(1, 0, 1), Unit(3, 0, 1)]]


def test_ranks_that_do_not_divide_the_micro_batches_cut_them_by_rows():
    assert shares(2, 1, 4) == [[Unit(0, 0, 2)], [Unit(0, 1, 2)]]
    assert shares(4, 2, 4) == [[Unit(0, 0, 2)], [Unit(0, 1, 2)], [Unit(1, 0, 2)], [Unit(1, 1, 2)]]


@pytest.mark.parametrize('world_size', range(1, 7))
@pytest.mark.parametrize('micro_batches', range(1, 7))
def test_each_row_of_each_micro_batch_is_computed_once_and_all_ranks_have_equally_much(
        world_size, micro_batches):
    batch_size = 60
    ranks = shares(world_size, micro_batches, batch_size)
    assert len({len(units) for units in ranks}) == 1
    rows = []
    for units in ranks:
        for unit in units:
            for row in range(unit.part, batch_size, unit.parts):
                rows.append((unit.micro_batch, row))
    assert len(rows) == micro_batches * batch_size
    assert len(set(rows)) == len(rows)


def test_rows_that_cannot_be_cut_evenly_are_refused_with_the_numbers_that_can():
    with pytest.raises(UserError) as refusal:
        shares(4, 2, 5)
    assert str(refusal.value) == ('4 processes cannot share gradient_accumulation_steps=2 of '
                                  'batch_size=5 evenly: 1, 2 processes can')
    with pytest.raises(UserError, match='evenly: 1, 2, 3 processes can'):
        shares(4, 3, 6)


def test_a_process_alone_agrees_with_itself():
    process = Process(CPU)
    tensor = torch.ones(2)
    assert process.sum(tensor) is tensor
    assert process.gather(2**62 + 1) == [2**62 + 1]
    assert process.any(True)
    assert not process.any(False)
    assert process.agree(5)
    process.wait()


AGREE = """
import sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from datetime import timedelta
from plaingpt.training.processes import leave, set_up_process
process = set_up_process('cpu', 'nccl')
rank = process.rank
assert process.world_size == 2
assert process.sum(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
assert process.gather(2**62 + rank) == [2**62, 2**62 + 1]
assert process.any(rank == 1)
assert process.any(rank == 0)
assert not process.any(False)
assert process.agree(2**47)
assert not process.agree(rank)
process.wait()
backend = dist.group.WORLD._get_backend(torch.device('cpu'))
assert backend.options._timeout == timedelta(hours=1)  # a save to a slow disk takes some
if rank == 1:
    print('agreed', flush=True)
leave(0)
"""


def test_two_ranks_agree(tmp_path):
    script = tmp_path / 'agree.py'
    script.write_text(AGREE.format(root=str(ROOT)), encoding='utf-8')
    ended = run(script, launcher=TWO_RANKS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == 'agreed\n'


FAIL_ALONE = """
import os, sys
sys.path.insert(0, {root!r})
from plaingpt.system.messages import UserError
from plaingpt.training.processes import set_up_process
process = set_up_process('cpu', 'nccl')
with process.together():
    pass
with process.together():
    if process.rank == 1:
        raise UserError('train.bin is missing')
print('unreachable')
"""


def test_an_error_of_one_rank_ends_all_with_its_sentence(tmp_path):
    script = tmp_path / 'fail_alone.py'
    script.write_text(FAIL_ALONE.format(root=str(ROOT)), encoding='utf-8')
    ended = run(script, launcher=TWO_RANKS)
    assert ended.returncode != 0
    assert ended.stdout == ''
    assert 'error: on rank 1: train.bin is missing\n' in ended.stderr
    assert 'connection' not in ended.stderr


def test_an_error_of_a_process_alone_stays_as_it_is():
    process = Process(CPU)
    with process.together():
        pass
    with pytest.raises(UserError, match='^train.bin is missing$'), process.together():
        raise UserError('train.bin is missing')


def test_several_processes_without_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    with pytest.raises(UserError, match='need torchrun'):
        set_up_process('cpu', 'gloo')


def test_a_process_alone_leaves_with_its_status():
    code = 'from plaingpt.training.processes import leave; leave(75)'
    ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT)
    assert ended.returncode == 75
