"""The backends of an op whose kernels exist under its own name: native CPU, native CUDA, Triton."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from fastres.dispatch import Backend
from fastres.kernels import native
from fastres.kernels.triton import why_not_device

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GPU_DTYPES = _CPU_DTYPES[:3]


def _refuse(args: tuple, devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
    x = next(arg for arg in args if isinstance(arg, torch.Tensor))
    if x.device.type not in devices:
        return f"it runs on {' and '.join(devices)}, the tensors are on {x.device.type}"
    if x.dtype not in dtypes:
        return f"it has no {str(x.dtype).removeprefix('torch.')} kernel"
    return None


def cpu(op: str, why_not: Callable[..., str | None]) -> Backend:
    """Native C++ on the CPU: ``torch.ops.fastres_C.cpu_<op>``."""

    def refuse(*args: object) -> str | None:
        return _refuse(args, ("cpu",), _CPU_DTYPES) or native.why_not(f"cpu_{op}") or why_not(*args)

    return Backend("cpu", refuse, lambda: native.op(f"cpu_{op}"))


def cuda(op: str, why_not: Callable[..., str | None]) -> Backend:
    """Native CUDA C++: ``torch.ops.fastres_C.cuda_<op>``."""

    def refuse(*args: object) -> str | None:
        return _refuse(args, ("cuda",), _GPU_DTYPES) or native.why_not(f"cuda_{op}") or why_not(*args)

    return Backend("cuda", refuse, lambda: native.op(f"cuda_{op}"))


def triton(op: str, why_not: Callable[..., str | None], module: str | None = None) -> Backend:
    """Triton: the function ``<op>`` of ``fastres.kernels.triton.<module>``, imported when first chosen."""

    def refuse(*args: object) -> str | None:
        return why_not_triton(*args) or why_not(*args)

    return Backend("triton", refuse, lambda: getattr(triton_module(module or op), op))


def triton_module(name: str) -> ModuleType:
    return importlib.import_module(f"fastres.kernels.triton.{name}")


def why_not_triton(*args: object) -> str | None:
    """What every Triton kernel needs: the package, a GPU or the interpreter, a dtype it has."""
    x = next(arg for arg in args if isinstance(arg, torch.Tensor))
    return why_not_device(x.device) or _refuse(args, (x.device.type,), _GPU_DTYPES)


def all_kernels(op: str, why_not: Callable[..., str | None], module: str | None = None) -> list[Backend]:
    """cpu, cuda and triton, in this order of preference."""
    return [cpu(op, why_not), cuda(op, why_not), triton(op, why_not, module)]
