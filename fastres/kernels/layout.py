"""The memory-format rule every backend and every fake shares."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes of a pixel, and of every address: what the TMA unit asks


def memory_format(x: Tensor) -> torch.memory_format:
    """Memory format of an op's activation outputs, decided by its input ``x`` of shape (N, C, H, W).

    Contiguous where x is contiguous; else channels_last where the channels of x are adjacent in memory; else contiguous.
    """
    if x.dim() == 4 and not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1:
        return torch.channels_last
    return torch.contiguous_format


def why_not_dense(*activations: Tensor) -> str | None:
    """Refuse activations that are empty, or not all dense in one format (contiguous or channels_last)."""
    if activations[0].numel() == 0:
        return "the input is empty"
    expected = memory_format(activations[0])
    for tensor in activations:
        if not tensor.is_contiguous(memory_format=expected):
            strides = [tuple(t.stride()) for t in activations]
            return f"the activations are not all dense in one memory format, got strides {strides}"
    return None


def why_not_channels_last(name: str, tensor: Tensor) -> str | None:
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return None
    return f"{name} must be dense in channels_last, got strides {tuple(tensor.stride())}"


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill one block of memory with no gap and no overlap, in any order of dimensions."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


def with_strides_of(x: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself where it lies in memory as x does, else a copy that does: one format for a whole call."""
    if tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int] = (1, 1), ceil: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Height and width of the output of a convolution or a pool of images of a size, as PyTorch counts them."""
    found = []
    for s, k, step, pad, d in zip(size, kernel, stride, padding, dilation, strict=True):
        room = s + 2 * pad - d * (k - 1) - 1
        out = (-(-room // step) if ceil else room // step) + 1
        if ceil and (out - 1) * step >= s + pad:
            out -= 1  # the last window must start in the image or its left padding
        found.append(out)
    return found[0], found[1]


def full_padding(kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """The padding with which a convolution's gradient by its input is a convolution of the output's gradient."""
    return tuple((k - 1) * d - p for k, p, d in zip(kernel, padding, dilation, strict=True))


def pooled(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool
) -> tuple[Sequence[int], tuple[int, int]]:
    """The window of a pool, (0, 0) being all pixels, and its output's height and width, as PyTorch counts them."""
    kernel = kernel if any(kernel) else size
    return kernel, output_size(size, kernel, stride, padding, ceil=ceil)


def aligned(t: Tensor) -> Tensor:
    """A channels_last tensor where it is aligned, else a copy: a choice of backend is kept by shapes, not by addresses."""
    t = t.resolve_neg()
    return t.clone(memory_format=torch.channels_last) if t.data_ptr() % ALIGNMENT else t
