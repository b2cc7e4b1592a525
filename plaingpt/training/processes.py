"""
Which machine, precision and process this is: what train.py, sample.py and bench.py decide before they do anything.
"""
import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plaingpt.system.devices import check_device
from plaingpt.system.messages import LOCAL_RANK, UserError, explain_user_errors

RESTARTS = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))  # by torchrun, after a rank of this machine has died


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""
    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def share(self, micro_batches, batch_size):
        """(parts, units): this rank's share of a step of so many micro-batches of batch_size rows.

        Unit u is part u % parts of micro-batch u // parts, and goes to rank u % world_size. parts is 1 if the ranks
        divide the micro-batches; else these are cut by rows, so that any number of ranks computes the same step."""
        parts = self.world_size // math.gcd(micro_batches, self.world_size)
        if batch_size % parts:
            fine = [n for n in range(1, self.world_size) if batch_size % (n // math.gcd(micro_batches, n)) == 0]
            raise UserError(f'{self.world_size} processes cannot share gradient_accumulation_steps={micro_batches} of '
                            f'batch_size={batch_size} evenly: {", ".join(map(str, fine))} processes can')
        return parts, range(self.rank, micro_batches * parts, self.world_size)

    def sum(self, tensor):
        """Sum of the tensor over all ranks, in place; the tensor itself when there is one rank."""
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    def total(self, *numbers):
        """Sums of small whole numbers over all ranks, as a list of int, for which this rank has waited, but not for its
        GPU: they travel beside it."""
        return self.sum(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def agree(self, number):
        """Whether all ranks have given the same number, of at most 24 bits: then its variance is 0."""
        total, squares = self.total(number, number * number)
        return total == self.world_size * number and squares == self.world_size * number * number

    def averaging(self, gpt):
        """gpt; of several ranks DDP around it, which averages the gradients of what is trainable now."""
        if self.world_size == 1:
            return gpt
        return DistributedDataParallel(gpt, device_ids=[self.device.index] if self.device.type == 'cuda' else None,
                                       gradient_as_bucket_view=True)

    def restarted(self):
        """Whether torchrun has started any rank of this job before."""
        return self.total(RESTARTS)[0] > 0


def set_up_process(device, backend):
    """Process of this rank: alone, or in the group that torchrun describes. backend serves CUDA; others take gloo."""
    parsed = check_device(device)
    if 'RANK' not in os.environ:
        return Process(parsed)
    if 'MASTER_ADDR' not in os.environ or parsed.type == 'mps':
        raise UserError('several processes need torchrun to start them, and CUDA or --device=cpu')
    if parsed.type == 'cuda':
        parsed = check_device(f'cuda:{LOCAL_RANK}')
        torch.cuda.set_device(parsed)
        backend = backend if dist.is_nccl_available() else 'gloo'  # Windows has no nccl
        backend = 'cpu:gloo,cuda:nccl' if backend == 'nccl' else backend
    else:
        backend = 'gloo'
    store, rank, world_size = next(iter(dist.rendezvous('env://', timeout=timedelta(minutes=30))))
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        # torchrun's store keeps the addresses of ranks that were killed, for which a restart could wait half an hour.
        # Several machines do not count restarts alike: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
        store = dist.PrefixStore(f'restart {RESTARTS}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            device_id=parsed if 'nccl' in backend else None)
    explain_user_errors()  # init_process_group has put a hook of its own before ours
    return Process(parsed, rank, LOCAL_RANK, world_size)


def leave(status):
    """Ends this process. One of several waits for the others, since torchrun kills those that are left when one has
    gone, and the first may still be saving; and it goes without Python's clean-up: gloo's threads outlive a group that
    DDP has used (torch 2.13), and now and then abort that ("terminate called without an active exception")."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
