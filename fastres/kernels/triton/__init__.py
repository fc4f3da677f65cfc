"""The Triton room: one module per op, whose functions carry the ops' names and positional arguments.

Importing this package does not import triton; its op modules do, when a backend is asked for.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import why_not_dense

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)


def why_not(*activations: Tensor) -> str | None:
    """Why no kernel of this room can run on these activations (their dtypes, layout, device, triton), or None."""
    x = activations[0]
    if x.dtype not in DTYPES:
        return f"it has no {str(x.dtype).removeprefix('torch.')} kernel"
    for other in activations[1:]:
        if other.dtype != x.dtype:
            return f"the activations must have one dtype, got {x.dtype} and {other.dtype}"
    return why_not_device(x.device) or why_not_dense(*activations)


@functools.cache
def why_not_device(device: torch.device) -> str | None:
    """Why Triton cannot run kernels on this device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"it needs triton {'.'.join(map(str, OLDEST_TRITON))} or newer, got {triton.__version__}"
    if triton_interpret():
        return None
    if device.type != "cuda":
        return f"it runs on cuda (or anywhere with TRITON_INTERPRET=1), the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"it needs compute capability {OLDEST_CAPABILITY} or newer, got {capability}"
    return None
