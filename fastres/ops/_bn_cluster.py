"""The second CUDA backend of batch norm in training (csrc/cuda/bn_cluster_kernel.cu): a cluster of blocks holds all values of a
few channels in its shared memory from computing their statistics to using them, so that x is read once.

fp16, bf16 and fp32, channels_last, a multiple of 8 channels, and so few pixels that 16 channels of them fit into eight
blocks: in ResNet-50 stages 3 and 4 with up to 64 images, also in backward, where the gradient of y is held beside x. No GPU
has run it yet: it is chosen where ``fastres tune`` found it fastest, or forced.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastres.dispatch import Backend
from fastres.kernels import native
from fastres.kernels.layout import aligned, memory_format

NAME = "cuda_cluster"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VECTOR, LEAST_VECTORS = 8, 2  # channels of a vector; vectors of a slice
THREADS, CLUSTER = 256, 8  # of a block; blocks
HELD_BYTES = 200 << 10  # by a block


def backend(op: str, why_not: Callable[..., str | None]) -> Backend:
    """``torch.ops.fastres_C.cluster_<op>`` as a backend of the op."""

    def refuse(*args: object) -> str | None:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type != "cuda":
            return f"it runs on cuda, the tensors are on {device.type}"
        reason = why_not_device(device) or native.why_not(f"cluster_{op}")
        return reason or why_not(*args) or why_not_arguments(op, *args)

    return Backend(NAME, refuse, lambda: runner(op), only_tuned=True)


def runner(op: str) -> Callable:
    """The native op, behind copies of activations whose addresses are not aligned."""
    run = native.op(f"cluster_{op}")

    def call(*args):
        return run(*(aligned(arg) if isinstance(arg, Tensor) and arg.dim() == 4 else arg for arg in args))

    return call


@functools.cache
def why_not_device(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"clusters of blocks need compute capability 9.0, got {major}.{minor}"
    if reason := native.why_not_cuda():
        return reason
    archs = native.build_info()["cuda_archs"]
    has_code = any(90 <= int(arch.rstrip("af")) <= 10 * major + minor for arch in archs)
    return None if has_code else f"the native library was built for {archs}, none of them from 90 to {10 * major + minor}"


def most_pixels(op: str, dtype: torch.dtype) -> int:
    """Most pixels of a batch of which a cluster can hold the narrowest slice of channels: of x, in backward of grad_y too."""
    held = (2 if op.endswith("_backward") else 1) * VECTOR * dtype.itemsize
    return CLUSTER * (THREADS // LEAST_VECTORS) * (HELD_BYTES // THREADS // held)


def why_not_arguments(op: str, *args: object) -> str | None:
    """What it requires of the arguments, on any device."""
    x = next(arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 4)
    if x.dtype not in DTYPES:
        return f"it has float16, bfloat16 and float32 kernels, got {x.dtype}"
    if memory_format(x) is not torch.channels_last or x.shape[1] % VECTOR:
        return f"x must be channels_last, of a multiple of {VECTOR} channels, got {tuple(x.shape)} with strides {x.stride()}"
    pixels, most = x.shape[0] * x.shape[2] * x.shape[3], most_pixels(op, x.dtype)
    return None if pixels <= most else f"shared memory holds a slice of at most {most} pixels of {x.dtype}, got {pixels}"
