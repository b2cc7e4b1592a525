"""
Memory in large pages, for matrices that a CPU reads from beginning to end.

A CPU looks up the address of each page, and fetches ahead only within one. With pages of 2 MiB
instead of 4 KiB, two cores of an AMD EPYC read 30 GB/s instead of 22.
"""
import contextlib
import mmap

import torch

PAGE = 2 << 20  # bytes of a large page
LINE = 64       # bytes of a line of the CPU's cache


def move(tensors):
    """Moves contiguous CPU tensors, in place, to large pages, one after the other.

    Where the system has none, and where all of them fill less than a page, they stay."""
    tensors = list(tensors)
    sizes = [-(-tensor.nbytes // LINE) * LINE for tensor in tensors]
    if sum(sizes) < PAGE or not hasattr(mmap, 'MADV_HUGEPAGE'):  # only Linux has it
        return
    memory = _allocate(sum(sizes))
    for tensor, part in zip(tensors, memory.split(sizes), strict=True):
        copy = part[:tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = copy.copy_(tensor.data)


def _allocate(size):
    """A uint8 tensor of so many bytes that begins with a page."""
    pages = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE
    return memory[begin:begin + size]
