"""R15: values that lie beyond 2^31 elements from the first, in memory of which only their pages exist."""

import itertools
import mmap

import torch

from fastres.budget import within_budget
from fastres.ops import REGISTRY, _mask
from reliability.board import Tally, scored
from reliability.parity import in_double, tuple_of

DISTANCES = (2**31, 2**32)  # elements, where int32 and uint32 end
DTYPES = (torch.float32, torch.bfloat16)


def spread(tensor: torch.Tensor, dim: int, distance: int) -> torch.Tensor:
    """The same values, the last along ``dim`` so many elements or more from the first."""
    strides = list(tensor.stride())
    strides[dim] = distance // (tensor.shape[dim] - 1) + 3
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, extent * tensor.element_size(), flags=flags)
    if hasattr(memory, "madvise"):
        memory.madvise(getattr(mmap, "MADV_NOHUGEPAGE", 15))
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def rows() -> list[tuple]:
    """Op, dtype, argument, dimension and distance of every case."""
    found = []
    for name, dtype in itertools.product(REGISTRY, DTYPES):
        args = REGISTRY[name].samples(torch.device("cpu"), dtype)[0].args
        for slot, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                dims = [dim for dim in range(arg.dim()) if arg.shape[dim] > 1]
                found += itertools.product([name], [dtype], [slot], dims, DISTANCES)
    return found


@scored("R15", "every op × tensor × dimension with index × stride beyond 2^31 and 2^32", full=600, short=60)
def far(tally: Tally, count: int) -> None:
    every = rows()
    for name, dtype, slot, dim, distance in every[:: max(1, len(every) // count)]:
        op = REGISTRY[name]
        near = op.samples(torch.device("cpu"), dtype)[0].args
        args = list(near)
        args[slot] = spread(near[slot], dim, distance)
        with tally.case(f"{name} {dtype} {op.parameters[slot]} dimension {dim} {distance}"), torch.no_grad():
            results = [tuple_of(found) for found in (op(*args), op.reference(*near), op.reference(*in_double(near)))]
            for index, (own, theirs, truth) in enumerate(zip(*results, strict=True)):
                if own.dtype == torch.uint8:  # bits: of this backend's own y
                    theirs = _mask.pack(results[0][0], args[-1])
                if not own.dtype.is_floating_point:
                    assert torch.equal(own, theirs), f"result {index} differs"
                    continue
                verdict = within_budget(own, theirs, truth, dtype)
                assert verdict.ok, f"result {index}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
