"""``reuse_memory``: an opt-in word to the C library's allocator, which serves PyTorch's CPU tensors."""

import ctypes
import platform

from fastres.errors import UnsupportedError

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's parameters, from glibc's malloc.h


def reuse_memory() -> None:
    """Let freed CPU tensors be used again instead of going back to the system, until the process ends.

    By default glibc maps every large tensor anew and unmaps it when it dies, so that each step of a training loop waits
    for the system to clear the same pages again. This sets ``M_MMAP_MAX`` to 0 and ``M_TRIM_THRESHOLD`` to its largest
    value for the whole process, for whatever allocates in it: call it once, before the first step. The price: memory
    once used stays with the process, and what it holds may grow by what no new tensor fits into.

    Raises:
        UnsupportedError: the C library is not glibc, or it refuses; nothing has changed then.
    """
    if platform.libc_ver()[0] != "glibc":
        raise UnsupportedError(f"fastres.reuse_memory: needs glibc, this is {platform.system()} without it")
    mallopt = ctypes.CDLL(None).mallopt
    for name, parameter, value in (("M_MMAP_MAX", _MMAP_MAX, 0), ("M_TRIM_THRESHOLD", _TRIM_THRESHOLD, -1)):
        if mallopt(parameter, value) != 1:
            raise UnsupportedError(f"fastres.reuse_memory: mallopt({name}, {value}) was refused by this C library")
