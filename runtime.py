"""
Which machine, precision and process this is: what train.py, sample.py and bench.py decide before they do anything.
"""
import contextlib
import math
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from errors import LOCAL_RANK, UserError, explain_user_errors, warn

RESTARTS = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))  # by torchrun, after a rank of this machine has died


# ---- device and precision ----

def default_device():
    """The best device here, as torch names it: 'cuda', 'mps' or 'cpu'."""
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def check_device(device):
    """torch.device of a device key; UserError where this machine has no such thing."""
    here = {'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available, 'cpu': lambda: True}
    try:
        parsed = torch.device(device)
        is_here = here[parsed.type]()
    except (RuntimeError, KeyError):
        raise UserError(f"device={device!r} is not supported: use 'cuda', 'cuda:1', 'mps' or 'cpu'") from None
    if not is_here:
        raise UserError(f'device={device!r} is not available to this torch ({torch.__version__}): '
                        f'use --device={default_device()}, or install the torch build for your hardware')
    if parsed.type == 'cuda' and (parsed.index or 0) >= torch.cuda.device_count():
        raise UserError(f'device={device!r}, but this machine has {torch.cuda.device_count()} GPU(s): start at most '
                        'that many processes on it (torchrun --nproc_per_node)')
    return parsed


def default_dtype(device, width, training=True):
    """The fastest safe precision on a torch.device: 'bfloat16', 'float16' or 'float32'. width: n_embd of the model.

    CUDA cards of compute capability 8 and newer multiply in bfloat16; older ones (T4, V100) only emulate it and take
    float16. CPUs with AMX or AVX512-BF16 are faster in bfloat16 where the model is not tiny (2 cores with AVX512-BF16,
    a step at n_embd 128: 1.7x, 384: 2.7x; sampling at 384: 1.7x, at 768: 3x; docs/benchmarks.md)."""
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    if device.type == 'cpu' and width >= (128 if training else 256):
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
        if capabilities.get('amx_bf16') or capabilities.get('avx512_bf16'):
            return 'bfloat16'
    return 'float32'


def precision(device, dtype, width):
    """For training: the resolved dtype name, a factory of autocast contexts, and the gradient scaler (active in float16
    only)."""
    name = default_dtype(device, width) if dtype == 'auto' else dtype

    def autocast():
        if name == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, name))

    return name, autocast, torch.amp.GradScaler(device.type, enabled=name == 'float16')


def seed_dropout(seed, step, unit, device):
    """Makes what dropout draws next a function of the seed, the step and the part of its batch: nothing to save."""
    # On a CPU past torch.manual_seed, which writes down for CUDA who called it: 0.1 to 0.5 ms of a step of 20.
    seed_all = torch.default_generator.manual_seed if device.type == 'cpu' else torch.manual_seed
    seed_all(((seed * 1_000_003 + step) * 1_000_003 + unit) % 2**63)


def set_up_math(seed, device):
    """Seeds torch, and lets what remains in float32 on CUDA use the tensor cores' TF32."""
    torch.manual_seed(seed)
    if device.type == 'cuda':  # on a CPU it would lower the precision too
        torch.set_float32_matmul_precision('high')


def hardware_name(device):
    """What the hardware calls itself, e.g. 'NVIDIA H200' or 'AMD EPYC (2 threads)'."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'mps':
        return f'{platform.machine()} (MPS)'
    name = getattr(torch.cpu, 'get_capabilities', dict)().get('cpu_name')
    return f'{name or platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)'


def synchronize(device):
    """Waits for the work queued on the device, so that a clock read next is true."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def peak_memory(device, children=False):
    """(bytes or None, what they count): the most memory this process, or any that it has waited for, has held on the
    device so far."""
    if device.type == 'cuda' and not children:
        return torch.cuda.max_memory_allocated(device), 'allocated on the GPU'
    if device.type == 'mps' and not children:
        return torch.mps.driver_allocated_memory(), 'held by Metal now'
    if os.name != 'posix':
        return None, 'unknown on this system'
    import resource
    unit = 1 if sys.platform == 'darwin' else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * unit, 'resident in RAM' + ', of the largest process' * children


def device_memory(device):
    """Bytes of memory that the device has, or None where nothing tells."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, 'sysconf') and 'SC_PHYS_PAGES' in os.sysconf_names:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return None


def room_for_batch(device):
    """Bytes that a batch of sequences to continue may take: half of what is free on a GPU, a quarter of the RAM."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0] // 2
    return (device_memory(device) or 2 ** 32) // 4


def compile_or_warn(model, trial, **options):
    """Compiles model in place (its state-dict names stay as they are) and runs trial(), which must call the model.

    torch.compile works only at the first call; whatever stops it there (no C++ compiler, no triton, an unsupported
    card) becomes one warning, and the model stays eager. Returns whether the model is compiled."""
    model.compile(**options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            trial()
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's failures share no class; the model itself is proven just below
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    model.compile(disable=True)
    trial()
    warn(f'torch.compile failed, going on without it ({reason})')
    return False


# ---- processes ----

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
