"""
The hardware that a run is planned for: this machine, or cards that are known by name only.
"""
import os
from typing import NamedTuple

from plaingpt.planning.data_sheets import data_sheet, is_before_ampere, lacks_tf32
from plaingpt.planning.memory import usable
from plaingpt.system.cuda_kernels import CudaKernels
from plaingpt.system.devices import (cpu_capabilities, device_memory, hardware_name, peak_memory)


class Hardware(NamedTuple):
    """One or several devices of the same kind."""
    name: str
    count: int
    device_type: str               # 'cuda', 'mps' or 'cpu'
    memory: float | None           # bytes of each that a run can use; None: unknown
    flops: float | None = None     # peak FLOP/s of each; None: unknown
    program: float = 0             # bytes of that memory that this process already takes
    float32_buffers: bool = False  # see has_float32_buffers()
    has_flash: bool = True         # whether CudaKernels has FlashAttention, if it is a CUDA device

    @classmethod
    def here(cls, device, count):
        """Devices like this torch.device of this machine.

        Call it before the run has any tensors: on a CPU it notes how much memory the process takes.
        There the ranks of this machine share its memory evenly."""
        name = hardware_name(device)
        memory = device_memory(device)
        if device.type != 'cpu':
            if memory is not None:
                memory = usable(memory)
            has_flash = device.type != 'cuda' or CudaKernels(device).has_flash
            return cls(name, count, device.type, memory, has_flash=has_flash)

        if memory is not None:
            memory /= int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        program, _ = peak_memory(device)
        return cls(name, count, 'cpu', memory, program=program or 0,
                   float32_buffers=has_float32_buffers())

    @classmethod
    def named(cls, name, count, precision):
        """Devices with this name, which must have a data sheet.

        precision: 'float32', 'bfloat16' or 'float16'. Float32 products run in TF32, at half the
        speed of 16 bits; devices without TF32 take eight times as long."""
        sheet = data_sheet(name)
        flops = sheet.flops
        if precision == 'float32':
            flops /= 8 if lacks_tf32(name) else 2
        return cls(name, count, 'cuda', usable(sheet.memory), flops,
                   has_flash=not is_before_ampere(name))


def has_float32_buffers():
    """Whether this CPU adds up each bfloat16 product in a float32 buffer of the product's size.

    oneDNN (torch 2.13) does so on CPUs with AVX-512 but no bfloat16 units. CPUs with such units
    need small buffers only, and on those without AVX-512 torch takes another way, with none."""
    capabilities = cpu_capabilities()
    bfloat16_units = capabilities.get('avx512_bf16') or capabilities.get('amx_bf16')
    return bool(capabilities.get('avx512_f') and not bfloat16_units)
