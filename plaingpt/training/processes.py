"""
The processes that train together: which one this is, its share of a step, and how they agree.
"""
import contextlib
import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plaingpt.system.devices import check_device
from plaingpt.system.messages import LOCAL_RANK, UserError, explain_user_errors

# How often torchrun has restarted the ranks of this machine after one of them died.
RESTARTS = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
# How long ranks wait for each other, as while the first saves a large state to a slow disk.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


class Unit(NamedTuple):
    """The part of a step that one forward and backward pass computes."""
    micro_batch: int  # its number within the step, over all ranks
    part: int         # this unit has the rows part, part + parts, … of the micro-batch
    parts: int        # 1: it has all rows


@dataclass(frozen=True)
class Process:
    """One process among those that train together; the default is a process alone."""
    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def share(self, micro_batches, batch_size):
        """This rank's Units of a step.

        If the number of ranks divides that of the micro-batches, ranks take turns at whole ones.
        If not, each micro-batch is cut by rows, so that any number of ranks computes the same step.
        UserError if the rows can't be cut evenly."""
        parts = self.parts(micro_batches, self.world_size)
        if batch_size % parts != 0:
            possible = []
            for ranks in range(1, self.world_size):
                if batch_size % self.parts(micro_batches, ranks) == 0:
                    possible.append(str(ranks))
            raise UserError(f'{self.world_size} processes cannot share '
                            f'gradient_accumulation_steps={micro_batches} of '
                            f'batch_size={batch_size} evenly: {", ".join(possible)} processes can')
        units = []
        for number in range(self.rank, micro_batches * parts, self.world_size):
            units.append(Unit(number // parts, number % parts, parts))
        return units

    @staticmethod
    def parts(micro_batches, ranks):
        """Into how many parts each micro-batch is cut, so that all ranks get equally many units."""
        return ranks // math.gcd(micro_batches, ranks)

    def sum(self, tensor):
        """Sum of the tensor over all ranks, in place; the tensor itself if there is one rank."""
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    def gather(self, number):
        """The ranks' whole numbers, each below 2**63, as a list in rank order.

        It waits for the other ranks, but not for the GPU: the numbers travel through CPU memory."""
        numbers = torch.zeros(self.world_size, dtype=torch.int64)
        numbers[self.rank] = number
        return self.sum(numbers).tolist()

    def any(self, condition):
        """Whether the condition holds on at least one rank."""
        return any(self.gather(int(condition)))

    def agree(self, number):
        """Whether all ranks have given the same whole number."""
        return len(set(self.gather(number))) == 1

    def wait(self):
        """Waits until all ranks have come here."""
        self.gather(0)

    @contextlib.contextmanager
    def together(self):
        """A context that ends on all ranks with a UserError if any rank raises one inside.

        A rank without an error of its own raises that of the lowest rank that has one. Other
        exceptions are not shared."""
        own_sentence = None
        try:
            yield
        except UserError as error:
            own_sentence = str(error)
        sentences = [own_sentence]
        if dist.is_initialized():
            sentences = [None] * self.world_size
            dist.all_gather_object(sentences, own_sentence)
        if own_sentence:
            raise UserError(own_sentence)
        for rank, sentence in enumerate(sentences):
            if sentence:
                raise UserError(f'on rank {rank}: {sentence}')

    def averaging(self, gpt):
        """The model to train: DDP around gpt, which averages gradients, or gpt itself if alone.

        DDP looks once at what requires gradients, so it must be made again when that changes."""
        if self.world_size == 1:
            return gpt
        device_ids = [self.device.index] if self.device.type == 'cuda' else None
        return DistributedDataParallel(gpt, device_ids=device_ids, gradient_as_bucket_view=True)

    def restarted(self):
        """Whether torchrun has restarted any rank of this job."""
        return self.any(RESTARTS > 0)


def set_up_process(device, backend):
    """The Process of this rank: alone, or in the group that torchrun describes.

    backend: that of CUDA ranks; others communicate through gloo. UserError if the device is
    missing, or if the ranks were not started by torchrun."""
    parsed = check_device(device)
    if 'RANK' not in os.environ:
        return Process(parsed)
    if 'MASTER_ADDR' not in os.environ or parsed.type == 'mps':
        raise UserError('several processes need torchrun to start them, and CUDA or --device=cpu')
    if parsed.type == 'cuda':
        parsed = check_device(f'cuda:{LOCAL_RANK}')
        torch.cuda.set_device(parsed)
        if backend == 'nccl':
            # Small numbers go through gloo, beside the GPU; Windows has no nccl at all.
            backend = 'cpu:gloo,cuda:nccl' if dist.is_nccl_available() else 'gloo'
    else:
        backend = 'gloo'

    rendezvous = dist.rendezvous('env://', timeout=RENDEZVOUS_TIMEOUT)
    store, rank, world_size = next(iter(rendezvous))
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        # torchrun's store keeps the addresses of ranks that were killed, and a restarted job could
        # wait for them for half an hour. Several machines do not count restarts alike: there
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
        store = dist.PrefixStore(f'restart {RESTARTS}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            timeout=COLLECTIVE_TIMEOUT,
                            device_id=parsed if 'nccl' in backend else None)
    explain_user_errors()  # init_process_group has put a hook of its own before ours
    return Process(parsed, rank, LOCAL_RANK, world_size)


def leave(status):
    """Ends this process with an exit status, and never before the other ranks.

    torchrun kills the ranks that are left when one has gone, and the first may still be saving."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # Without Python's clean-up: gloo's threads outlive a group that DDP has used (torch 2.13),
        # and now and then abort it ("terminate called without an active exception").
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
