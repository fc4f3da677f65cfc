"""Memory of CPU tensors: ``reuse_memory``, an opt-in setting of the C library's allocator, and memory in large pages."""

import contextlib
import ctypes
import mmap
import platform

import torch
from torch import Tensor

from fastres.errors import UnsupportedError

_LARGE_PAGE = 2 << 20
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's parameters, from glibc's malloc.h


def reuse_memory() -> None:
    """Keep the memory of freed CPU tensors for new ones, instead of returning it to the system, until the process ends.

    By default glibc maps every large tensor anew and unmaps it when it is freed, so that each step of a training loop waits
    for the system to clear the same pages again. This sets ``M_MMAP_MAX`` to 0 and ``M_TRIM_THRESHOLD`` to its largest
    value for everything in this process that allocates: call it once, before the first step. The price: memory once used
    stays with the process, and gaps that no new tensor fits into may make it grow.

    Raises:
        UnsupportedError: the C library is not glibc, or it refuses.
    """
    if platform.libc_ver()[0] != "glibc":
        raise UnsupportedError(f"fastres.reuse_memory: needs glibc, this is {platform.system()} without it")
    mallopt = ctypes.CDLL(None).mallopt
    for name, parameter, value in (("M_MMAP_MAX", _MMAP_MAX, 0), ("M_TRIM_THRESHOLD", _TRIM_THRESHOLD, -1)):
        if mallopt(parameter, value) != 1:
            raise UnsupportedError(f"fastres.reuse_memory: mallopt({name}, {value}) was refused by this C library")


def large_pages(size: int) -> Tensor:
    """Fresh bytes, in large pages where the system has them: fewer TLB misses.

    They come straight from the system: memory from the allocator may have been used before, in small pages that stay small.
    (ResNet-50 in int8 at batch 8 then took 75 ms in one process and 82 ms in another. AMD EPYC, 2026-11-25.)
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    return block[-block.data_ptr() % _LARGE_PAGE :][:size]
