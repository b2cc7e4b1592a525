"""
The device a script computes on: which one, in which precision, and how much memory it has.
"""
import contextlib
import gc
import os
import platform
import re
import sys

import torch

from plaingpt.system import cpu_runtime
from plaingpt.system.messages import UserError


# ---- choice of device and precision ----
def default_device():
    """The best device of this machine, as torch names it: 'cuda', 'mps' or 'cpu'."""
    if torch.cuda.is_available():
        return 'cuda'
    if torch.backends.mps.is_available():
        return 'mps'
    return 'cpu'


def check_device(device):
    """The torch.device that a device key names. UserError if this machine does not have it."""
    try:
        parsed = torch.device(device)
    except RuntimeError:  # torch knows no device of this name
        parsed = None
    if parsed is None or parsed.type not in ('cuda', 'mps', 'cpu'):
        raise UserError(f"device={device!r} is not supported: use 'cuda', 'cuda:1', 'mps' or 'cpu'")

    no_cuda = parsed.type == 'cuda' and not torch.cuda.is_available()
    no_mps = parsed.type == 'mps' and not torch.backends.mps.is_available()
    if no_cuda or no_mps:
        raise UserError(
            f'device={device!r} is not available to this torch ({torch.__version__}): '
            f'use --device={default_device()}, or install the torch build for your hardware')

    if parsed.type == 'cuda':
        parsed = torch.device('cuda', parsed.index or 0)
        gpus = torch.cuda.device_count()
        if parsed.index >= gpus:
            raise UserError(
                f'device={device!r}, but this machine has {gpus} GPU(s): start at most that many '
                'processes on it (torchrun --nproc_per_node)')
        _check_architecture(parsed)
    return parsed


def _check_architecture(device):
    """UserError if this torch has no kernels for a CUDA device."""
    capability = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()
    if has_kernels(capability, architectures):
        return
    major, minor = capability
    remedy = 'install a newer torch'
    if major < 8:
        remedy = 'install a torch built for CUDA 12.6, the last one that supports GPUs this old'
    raise UserError(
        f'this torch ({torch.__version__}, for {", ".join(architectures)}) has no kernels for '
        f'{torch.cuda.get_device_name(device)}, of compute capability {major}.{minor}: {remedy}, '
        'or use --device=cpu')


def has_kernels(capability, architectures):
    """Whether code for these architectures runs on a GPU of this compute capability.

    capability: (major, minor); architectures: as torch.cuda.get_arch_list() names them."""
    built_for = []
    for name in architectures:
        match = re.fullmatch(r'(sm|compute)_(\d+)(\d)([af]?)', name)
        if match:
            built_for.append(match.groups())
    if not built_for:
        return True  # the names are others, as those of AMD's GPUs

    for kind, major, minor, suffix in built_for:
        version = (int(major), int(minor))
        if suffix == 'a':
            runs = version == capability  # it uses what this version alone has
        elif kind == 'sm' or suffix == 'f':
            runs = version[0] == capability[0] and version <= capability
        else:
            runs = version <= capability  # PTX, which is translated for any later GPU
        if runs:
            return True
    return False


def default_dtype(device, width, training=True):
    """The fastest safe precision on a torch.device: 'bfloat16', 'float16' or 'float32'.

    width: n_embd of the model."""
    if device.type == 'cuda':
        # From compute capability 8 on, CUDA cards have bfloat16 units. Older ones (T4, V100) only
        # emulate bfloat16, and torch.cuda.is_bf16_supported() says True for them too.
        has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8
        return 'bfloat16' if has_bfloat16 else 'float16'

    # With AMX or AVX512-BF16, a CPU is faster in bfloat16 unless the model is tiny. On 2 cores with
    # AVX512-BF16: a training step at n_embd 128 1.4x, at 384 1.8x; one sample at 768 1.8x, ten at
    # 384 about as fast (docs/benchmarks.md).
    smallest_width = 128 if training else 256
    if device.type == 'cpu' and width >= smallest_width and has_bfloat16_units():
        return 'bfloat16'
    return 'float32'


def has_bfloat16_units():
    """Whether this CPU, as far as torch may use it, computes faster in bfloat16 than in float32."""
    capabilities = cpu_capabilities()
    has_units = capabilities.get('amx_bf16') or capabilities.get('avx512_bf16')
    return bool(has_units) and instruction_set() == 'AVX512'


def precision(device, dtype, width):
    """What mixed-precision training needs: the dtype's name, autocast and the gradient scaler.

    dtype: the config key, 'auto' or a name. autocast: a function that returns a context manager.
    The scaler does nothing unless the dtype is float16."""
    name = default_dtype(device, width) if dtype == 'auto' else dtype

    def autocast():
        if name == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, name))

    # float16 loses small gradients unless the loss is scaled up; bfloat16 has float32's range.
    scaler = torch.amp.GradScaler(device.type, enabled=name == 'float16')
    return name, autocast, scaler


def residual_dtype(bf16_residual, precision_name):
    """The dtype for GPT.residual_dtype: bfloat16 if the key of that name asks for it, else None.

    UserError if the run does not compute in bfloat16."""
    if not bf16_residual:
        return None
    if precision_name != 'bfloat16':
        raise UserError(f'bf16_residual=True needs dtype=bfloat16, and this run uses '
                        f'{precision_name}')
    return torch.bfloat16


def set_up_math(seed, device, keep_memory=True):
    """Seeds torch and prepares the device.

    On CUDA this GPU becomes the current one, and products may use TF32. On a CPU, threads do not
    spin on cores that other programs need, and with keep_memory malloc keeps freed memory, which
    makes steps faster but leaves gaps: 0.6 GB of them where checkpointing is to save memory."""
    torch.manual_seed(seed)
    if device.type == 'cpu':
        cpu_runtime.start_watching()
        if keep_memory:
            cpu_runtime.keep_freed_memory()
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # on a CPU this would lower the precision too


def seed_generator(device, seed):
    """Seeds the generator from which dropout on a device is drawn.

    torch.manual_seed() seeds those of all devices, and notes its caller: 0.1 to 0.5 ms."""
    if device.type == 'cuda':
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == 'mps':
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def place(gpt, device, dtype=None):
    """Moves a GPT to its device, in place, and gives it the kernels for that device."""
    from plaingpt.system.cpu_kernels import CpuKernels
    from plaingpt.system.cuda_kernels import CudaKernels
    gpt.to(device=device, dtype=dtype)
    if device.type == 'cpu':
        gpt.use_kernels(CpuKernels())
    elif device.type == 'cuda':
        gpt.use_kernels(CudaKernels(device))
    return gpt


# ---- what the hardware is ----
def hardware_name(device):
    """The name that the hardware gives itself, e.g. 'NVIDIA H200' or 'AMD EPYC (2 threads)'."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'mps':
        return f'{platform.machine()} (MPS)'
    name = cpu_capabilities().get('cpu_name') or platform.processor() or platform.machine()
    return f'{name} ({torch.get_num_threads()} threads)'


def cpu_capabilities():
    """{instruction set: whether this CPU has it, …, 'cpu_name': …}; {} from an older torch."""
    get_capabilities = getattr(torch.cpu, 'get_capabilities', None)
    if get_capabilities is None:
        return {}
    return get_capabilities()


def instruction_set():
    """The instructions that torch uses on this CPU: 'AVX512', 'AVX2', 'NO AVX', 'DEFAULT', …"""
    return torch.backends.cpu.get_cpu_capability()


def synchronize(device):
    """Waits for the work queued on the device; a clock read next includes it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


# ---- memory ----
def peak_memory(device, children=False):
    """The most memory that this process has used so far: (bytes or None, what they count).

    children: measure the largest child process that has ended, in RAM, instead of this process."""
    if device.type == 'cuda' and not children:
        return torch.cuda.max_memory_allocated(device), 'allocated on the GPU'
    if device.type == 'mps' and not children:
        return torch.mps.driver_allocated_memory(), 'held by Metal now'
    if os.name != 'posix':
        return None, 'unknown on this system'

    import resource  # POSIX only
    unit = 1 if sys.platform == 'darwin' else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    if children:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return peak * unit, 'resident in RAM, of the largest process'
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * unit, 'resident in RAM'


def reset_peak_memory(device):
    """Makes peak_memory() count from now on, on CUDA; elsewhere the system does not offer that."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)


def release_memory(device):
    """Gives memory that torch keeps for later tensors back to the GPU."""
    if device.type == 'cuda':
        gc.collect()  # a compiled model is a cycle of objects, which keeps its weights
        torch.cuda.empty_cache()


def device_memory(device):
    """Bytes of memory of the GPU, else of the machine; None where the system does not tell."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, 'sysconf') and 'SC_PHYS_PAGES' in os.sysconf_names:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return None


def room_for_batch(device):
    """Bytes that a batch may take in sampling: half of a GPU's free memory, or a quarter of RAM."""
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    ram = device_memory(device) or 2 ** 32  # unknown: assume 4 GiB
    return ram // 4
