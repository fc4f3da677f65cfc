"""Which convolutions of a training step, and which of their gradients, the native kernels compute: those in which they are
faster than PyTorch. Shapes, dtypes and layouts alone decide, in a few microseconds.
"""

import functools
from typing import Any

import torch

from fastres.kernels.layout import full_padding, output_size, why_not_channels_last
from fastres.ops import _conv_rows

# The native ops that compute y and the two gradients: for few pixels, in tile registers (AMX), by Winograd's algorithm.
KERNELS = {
    "y": ("cpu_conv_inner", "cpu_conv_amx", "cpu_conv"),
    "x": ("cpu_conv_outer_input", "cpu_conv_amx_input", "cpu_conv"),
    "weight": ("cpu_conv_outer_weight", "cpu_conv_backward_weight_amx", "cpu_conv_backward_weight"),
}
WINOGRAD = tuple(kernels[2] for kernels in KERNELS.values())

# 2x2 tiles that repay the transform of the weights: with 512 channels the forward and the input gradient gain a thirtieth at 32
# tiles, a tenth at 64, a fifth at 128; with fewer channels far more (AMD EPYC, Zen 4, 2 threads, 2026-11-25).
LEAST_TILES = 64
# Gradients of so few pixels of the output take 0.1 to 0.9 of the time of PyTorch's by the kernels for few, and are no slower
# than those by Winograd, where weights are so many at least. A 1x1 kernel with stride 1 is one product of matrices, in which
# PyTorch is faster from fewer pixels on: the first number is the weights', the second x's. Weight gradients by Winograd, which
# transform no weights, take 0.35 to 0.9 of PyTorch's time from 8 tiles on (Intel Xeon, 1 thread, 2026-11-28).
MOST_PIXELS, MOST_PIXELS_OF_DENSE = 128, {"weight": 32, "x": 8}
LEAST_WEIGHTS = 2**16
# Weight gradients in tile registers take 0.1 to 0.95 of the time of PyTorch's, and less than those of the kernels for few from
# so many pixels on (Intel Xeon with AMX, 1 thread, 2026-11-29).
MOST_PIXELS_WITH_AMX = 32
# The other two by AMX, which pack the weights in less time than oneDNN, take 0.45 to 1.0 of its time from so many weights for
# each pixel on; the input gradient of a strided 1x1 kernel, which oneDNN computes slowly, 0.45 to 0.8 with any (as above).
LEAST_WEIGHTS_A_PIXEL_WITH_AMX = 512
# The weight gradient multiplies the zeros between rows and images too: where dilated taps reach over so many that there are
# more than this many places for each pixel, oneDNN, which leaves out such taps, takes 0.75 to 0.85 of its time (as above).
MOST_PLACES_A_PIXEL = 2.25
# The convolution itself: what PyTorch loses, when it lays out the weights anew, must be more than what it gains per pixel. For
# images of so few pixels of the output 4 to 30 times its speed; else with so many weights for each pixel (Xeon as above).
MOST_PIXELS_AN_IMAGE = {torch.float32: 9, torch.bfloat16: 1}
LEAST_WEIGHTS_A_PIXEL = {torch.float32: 2**15, torch.bfloat16: 2**16}
# With fewer than 32 channels most time goes into moving tiles, not multiplying them: 128 images of 16 channels gain a half at
# 8x8, a third at 16x16, nothing at 32x32; in bfloat16, where less is moved, a third at 8x8 and nothing at 16x16 (as above).
MOST_TILES_OF_FEW = {torch.float32: 2**14, torch.bfloat16: 2**12}


def why_not_fast(x, weight_shape, *geometry: Any) -> str | None:
    """Why a convolution of x, and its gradients, are left to PyTorch: shapes and layout alone, in a few microseconds."""
    if x.device.type == "cuda" and x.dim() == 4:
        return _conv_rows.why_not_fast(x, weight_shape, *geometry)
    size = x.shape[2:]
    return kernel("y", x, size, weight_shape, *geometry)[1] and kernel("weight", x, size, weight_shape, *geometry)[1]


def kernel(
    of, images, size, weight_shape, stride, padding, dilation, groups, weight=None
) -> tuple[str, None] | tuple[None, str]:
    """The native op that computes y (``of="y"``), or the gradient of x or weight; or else why none does.

    ``images``: x or grad_y; ``size``: x's rows and columns; ``weight``: whose layout matters to y and to the gradient of x.
    """
    if images.device.type != "cpu" or images.dtype not in (torch.float32, torch.bfloat16) or images.dim() != 4:
        got = f"{images.dim()} dimensions of {images.dtype} on {images.device.type}"
        return None, f"it convolves batches of images of float32 and bfloat16 on cpu, got {got}"
    amx = images.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    plain = None if weight is None else why_not_channels_last("weight", weight)
    sizes = tuple(images.shape), tuple(size), tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups
    found = _by_sizes(of, images.dtype, amx, plain, *sizes)
    layout = why_not_channels_last("the activations", images)
    return found if found[0] is None or layout is None else (None, layout)


@functools.lru_cache(4096)
def _by_sizes(
    of, dtype, amx, plain, shape, size, weight_shape, stride, padding, dilation, groups
) -> tuple[str, None] | tuple[None, str]:
    """``kernel``, were the activations in channels_last; ``plain``: why the weights are not."""
    geometry = stride, padding, dilation, groups
    few, by_tiles, winograd = KERNELS[of]
    if plain is None and why_not_few(of, dtype, amx, shape, size, weight_shape, *geometry) is None:
        return few, None
    if amx:  # with which oneDNN too is faster than Winograd's: ResNet-18 and -50 1.2 to 1.4 times (2026-11-28)
        reason = why_not_amx(of, shape, size, weight_shape, *geometry) or plain
        return (None, reason) if reason is not None else (by_tiles, None)
    if of == "x":
        reason = f"its padding is at most 2 pixels, got {padding}" if max(padding) > 2 else None
        geometry = stride, full_padding(weight_shape[2:], padding, dilation), dilation, groups
        weight_shape = (weight_shape[1], weight_shape[0], *weight_shape[2:])
        reason = reason or why_not_winograd(dtype, shape, weight_shape, *geometry)
    else:
        least_tiles = LEAST_TILES if of == "y" else 1
        reason = why_not_winograd(dtype, shape, weight_shape, *geometry, least_tiles=least_tiles)
    return (None, reason) if reason is not None else (winograd, None)


def why_not_amx(of, shape, size, weight_shape, stride, padding, dilation, groups) -> str | None:
    """Why y, or the gradient of x or weight, is not computed in tile registers."""
    out_channels, channels, *taps = weight_shape
    if groups != 1 or out_channels % 16 or channels % 16 or max(out_channels, channels) > 16384:
        return f"AMX multiplies multiples of 16 channels up to 16384 in one group, got {tuple(weight_shape)}, groups={groups}"
    if 0 in shape:
        return f"it needs images, got {shape}"
    if of == "x" and any(by > 1 and spread > 1 for by, spread in zip(stride, dilation, strict=True)):
        return f"on a side with a stride it takes no dilation, got {dilation}"
    height, width = output_size(size, taps, stride, padding, dilation)
    weights, pixels = out_channels * channels * taps[0] * taps[1], shape[0] * height * width
    reach = [max(p, d * (k - 1) - p) // by for p, d, k, by in zip(padding, dilation, taps, stride, strict=True)]
    places = (height + reach[0]) * (width + reach[1])
    if of == "weight" and dilation != (1, 1) and places > MOST_PLACES_A_PIXEL * height * width:
        return f"taps that reach so far ({reach} pixels beyond {height}x{width}) leave too little to multiply"
    strided = of == "x" and taps == [1, 1] and stride != (1, 1)
    if of != "weight" and not strided and weights < LEAST_WEIGHTS_A_PIXEL_WITH_AMX * pixels:
        return f"oneDNN is faster with fewer than {LEAST_WEIGHTS_A_PIXEL_WITH_AMX} weights a pixel, got {weights} for {pixels}"
    return None


def why_not_few(of, dtype, amx, shape, size, weight_shape, stride, padding, dilation, groups) -> str | None:
    """Why y, or the gradient of x or weight, is not computed by the kernels for few pixels."""
    out_channels, channels, *kernel = weight_shape
    weights = out_channels * channels * kernel[0] * kernel[1]
    most_channels = max(out_channels, channels)
    if groups != 1 or out_channels % 16 or channels % 16 or most_channels > 16384 or weights < LEAST_WEIGHTS:
        return f"it needs {LEAST_WEIGHTS} weights or more, in multiples of 16 channels up to 16384, got {tuple(weight_shape)}"
    height, width = output_size(size, kernel, stride, padding, dilation)
    dense = kernel == [1, 1] and stride == (1, 1)
    pixels, most = shape[0] * height * width, MOST_PIXELS_OF_DENSE.get(of, MOST_PIXELS) if dense else MOST_PIXELS
    if of == "y" and height * width > MOST_PIXELS_AN_IMAGE[dtype]:
        most = min(MOST_PIXELS, weights // LEAST_WEIGHTS_A_PIXEL[dtype])
    if of == "weight" and amx:
        most = min(most, MOST_PIXELS_WITH_AMX)
    if not 0 < pixels <= most:
        return f"it supports 1 to {most} pixels, got {pixels}"
    return None


def why_not_winograd(dtype, shape, weight_shape, stride, padding, dilation, groups, least_tiles=LEAST_TILES) -> str | None:
    """Why Winograd's algorithm is not taken."""
    if weight_shape[2:] != (3, 3) or stride != (1, 1) or dilation != (1, 1) or groups != 1:
        return "it convolves 3x3 kernels with stride 1, without dilation, in one group"
    n, _, height, width = shape
    out = (height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)
    least = min(weight_shape[:2])
    if weight_shape[0] % 16 or weight_shape[1] % 16 or least < 16 or any(side < 4 and side != 2 for side in out):
        return f"it needs multiples of 16 channels and outputs 2 or at least 4 pixels a side, got {tuple(weight_shape)}, {out}"
    tiles = n * -(-out[0] // 2) * -(-out[1] // 2)
    if tiles < least_tiles:
        return f"so few pixels ({tiles} tiles of 2x2, it wants {least_tiles}) do not repay the transform of the weights"
    if least < 32 and tiles > MOST_TILES_OF_FEW[dtype]:
        return f"so few channels ({least}) do not repay the transform of so many pixels ({tiles} tiles of 2x2)"
    return None
