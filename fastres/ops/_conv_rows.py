"""The CUDA kernels for convolutions of few input channels, the stem of a network (csrc/cuda/conv_kernel.cu and beside it).

fp16 and bf16, channels_last, one group, no dilation: in NHWC a row of a window is then one run of values, 9 to 24 of them, as
in 7x7 and 3x3 windows over 3 channels. Forward with folded weights (``conv_bn_act``), also with the pool behind it
(``conv_bn_act_maxpool``); forward in training (``conv``); and the weight gradient.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastres import dispatch, tune
from fastres.kernels import native
from fastres.kernels.layout import aligned, memory_format
from fastres.ops import _fold

DTYPES = (torch.float16, torch.bfloat16)
MOST_ROWS, MOST_STRIDE, MOST_PADDING = 7, 8, 127  # of a window
LEAST_VALUES, MOST_VALUES = 9, 24  # of a row of a window, including one before it where that aligns it
OPS = ("conv_rows", "conv_rows_backward_weight", "conv_rows_maxpool")


def is_few(x: Tensor) -> bool:
    """Whether these kernels are the ones for x: its channels are few, no multiple of 8."""
    return x.shape[1] % 8 != 0


def why_not(x: Tensor, weight_shape, stride, padding, dilation, groups: int, op: str = OPS[0]) -> str | None:
    """Why the kernels cannot run a convolution of x."""
    if x.device.type != "cuda":
        return f"it runs on cuda, the tensors are on {x.device.type}"
    reason = native.why_not(op) or why_not_device(x.device)
    return reason or why_not_arguments(x, x.dtype, weight_shape, stride, padding, dilation, groups)


@functools.cache
def why_not_device(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, got {'.'.join(map(str, capability))}"


def why_not_arguments(x: Tensor, dtype: torch.dtype, weight_shape, stride, padding, dilation, groups: int) -> str | None:
    """What they require of the arguments, on any device, once x has the dtype."""
    if not is_few(x):
        return f"it is for few input channels, got {x.shape[1]}, a multiple of 8"
    if dtype not in DTYPES:
        return f"it has float16 and bfloat16 kernels, got {dtype}"
    if groups != 1 or dilation != (1, 1):
        return f"it convolves in one group without dilation, got groups={groups}, dilation={dilation}"
    values = weight_shape[3] * x.shape[1] + padding[1] * x.shape[1] % 2
    if not LEAST_VALUES <= values <= MOST_VALUES or weight_shape[2] > MOST_ROWS:
        window = f"{tuple(weight_shape[2:])} over {x.shape[1]} channels, padding={padding}"
        return f"its windows are of at most {MOST_ROWS} rows of {LEAST_VALUES} to {MOST_VALUES} values, got {window}"
    if max(stride) > MOST_STRIDE or max(padding) > MOST_PADDING:
        return f"its strides are at most {MOST_STRIDE}, paddings {MOST_PADDING}, got stride={stride}, padding={padding}"
    if weight_shape[0] % 8 or weight_shape[0] >= 2**20:
        return f"output channels must be a multiple of 8, got {weight_shape[0]}"
    if x.numel() == 0 or x.shape[0] >= 2**31 or max(x.shape[2:]) >= 2**24:
        return f"x must not be empty, of images of less than 2^24 pixels a side, got {tuple(x.shape)}"
    if memory_format(x) is not torch.channels_last or not x.is_contiguous(memory_format=torch.channels_last):
        return f"x must be dense in channels_last, got strides {tuple(x.stride())}"
    return None


def why_not_fast(x: Tensor, weight_shape, *geometry: Any) -> str | None:
    """Why a convolution in training is left to PyTorch, which ``conv`` would run in the end too."""
    if not is_few(x):
        return "on cuda it convolves few input channels, not multiples of 8"
    dtype = x.dtype
    if torch.is_autocast_enabled("cuda") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cuda")
    reason = why_not_arguments(x, dtype, weight_shape, *geometry) or native.why_not(OPS[0]) or why_not_device(x.device)
    if reason or dispatch.is_forced():
        return reason
    return tune.why_not_validated("conv", "cuda", x.device)


def _pack(weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The weights in the order in which the kernel reads them."""
    return native.op("conv_rows_pack")(weight.permute(0, 2, 3, 1).contiguous(), padding[1])


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    packed = _pack(weight, padding)
    return native.op("conv_rows")(aligned(x), packed, bias, len(weight), weight.shape[2:], stride, padding, "none")


def _folded(x: Tensor, parameters: tuple[Any, ...], eps: float, padding) -> tuple[Any, ...]:
    """A convolution's parameters as kernels take them, folded and packed once: weights, bias, channels, kernel."""

    def finish(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _pack(w.to(x.dtype), padding), b.float()

    packed, bias = _fold.folded(parameters, eps, (OPS[0], x.dtype, padding[1]), finish)
    channels, _, *kernel = parameters[0].shape
    return packed, bias, channels, kernel


def run_folded(x: Tensor, parameters: tuple[Any, ...], eps: float, stride, padding, act: str) -> Tensor:
    """One launch; parameters as ``_fold.folded`` takes them."""
    return native.op(OPS[0])(aligned(x), *_folded(x, parameters, eps, padding), stride, padding, act)


def run_pooled(x: Tensor, parameters: tuple[Any, ...], eps: float, stride, padding) -> Tensor:
    """The same with a ReLU and a pool of 3x3, stride 2 and padding 1 behind it, in one kernel of its own."""
    return native.op(OPS[2])(aligned(x), *_folded(x, parameters, eps, padding), stride, padding)


def run_weight(grad_y: Tensor, x: Tensor, kernel, stride, padding, dilation, groups: int) -> Tensor:
    grad_weight = native.op("conv_rows_backward_weight")(aligned(grad_y), aligned(x), kernel, stride, padding)
    return grad_weight.permute(0, 3, 1, 2)  # channels_last, as x is
