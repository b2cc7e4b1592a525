"""
Which machine, precision and process this is: what train.py, sample.py and bench.py decide before they do anything.
"""
import contextlib
import os
import platform
import sys
import warnings

import torch

from plaingpt.system.messages import UserError, warn


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
