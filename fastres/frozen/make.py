"""``freeze``: a network recorded, and planned for the device that it is on."""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastres.errors import UnsupportedError, must, must_type
from fastres.frozen import file, int8
from fastres.frozen.base import DTYPES, RECORDED, Frozen, check_device, check_images, parameter_dtype, recorded
from fastres.frozen.calibrate import Calibration, calibrate, checked, judge
from fastres.frozen.int8 import Scale
from fastres.frozen.layers import Layer, Network, Output
from fastres.frozen.module import NativeFrozen
from fastres.frozen.record import Value
from fastres.kernels import native
from fastres.ops import _conv_cpu
from fastres.terminal import Progress

_REAL = ("upsample", "gate", "activation", "cat", "slice", "turn")  # layers that have no step for 8-bit integers
Quantised = TypeVar("Quantised", bound=Frozen)


def freeze(
    model: nn.Module,
    example: Tensor,
    dtype: torch.dtype | None = None,
    quantize: Calibration | Iterable[Any] | None = None,
) -> Frozen:
    """Make a static inference plan of a network: one native call on the CPU, one CUDA graph on a GPU.

    Equivalent to ``model.eval()`` without autograd, in ``dtype``. Batch norm is folded, weights are packed once,
    activations stay channels_last from end to end, and each convolution runs with its bias, addition and ReLU in one pass
    where that is the fastest. The model is left as it is, and later changes of it do not reach the plan; ``update(model)``
    takes them over. Other batch and image sizes are planned at their first call, on the branches that the network's Python
    took for the example; calls from several threads may overlap.

    On a GPU the kernel of every layer is the fastest, measured here, of those that keep the error budget on its shape: cuDNN's
    fused call, Triton, the CUDA kernel, PyTorch's own operations; a backend forced by ``fastres.use`` meanwhile is the only
    one. Batches are padded to the next power of two up to the example's batch, which itself is planned as it is, as is
    each larger one; a graph is captured for each such size and for each size of images, the 16 used last are kept. Calls take
    turns on the GPU, whatever their streams. What captures a call in a graph of its own gets the kernels, not the graph.
    float32 products use TF32 where ``torch.backends`` allows it when a size is planned.

    Args:
        model: a network from one image batch to one tensor, or to several in lists, tuples and dicts, as backbones return
            them: any composition of convolutions, batch norm, additions, concatenations and slices of channels, values
            enlarged by nearest pixels, channels scaled for each image (squeeze and excitation, ECA), ReLU, ReLU6, SiLU,
            sigmoid, hard swish, hard sigmoid, leaky ReLU, max and average pooling and linear layers, however its Python is
            written. What is enlarged to numbers, rather than by a factor or to the size of what it is added to or put
            beside, is planned for the example's size alone.
        example: images (N, C, H, W) on the model's device, float32, bfloat16 or, on a GPU, float16; the network runs once on
            them, on a GPU on the first two, in its parameters' dtype and without autocast.
        dtype: ``torch.float32`` or ``torch.bfloat16``, or on a GPU ``torch.float16``, for weights and activations; None is the
            parameters' own. In 16 bits sums, biases and batch norm are float32, and each layer rounds once; PyTorch's own
            operations, where they are the fastest, round after each.
        quantize: image batches, or pairs of one and its labels, or a ``fastres.Calibration`` of them: the network then runs
            in 8-bit integers, scaled for such images (signed weights with a scale for each output channel, unsigned
            activations with one scale each; sums exact, results float32), and ``save`` keeps it in a file. With the same
            scales a GPU gives the CPU's bytes; it needs a kernel that its architecture has validated, or that is forced, and
            answers an image that is not finite, which the CPU refuses, with NaN.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        UnsupportedError: an operation, the processor, a weight (not finite) or, for integers, a GPU that a plan cannot serve;
            the text says which.
        VerificationError: quantised, the network is not as good as the calibration asks.
    """
    dtype = _check(model, example, dtype, quantize)
    if example.device.type == "cuda":
        return by_ops(model, example, dtype, quantize)
    _check_processor(dtype)
    found, recording = recorded(model, example)
    _check_groups(found, dtype)
    frozen = NativeFrozen(found, dtype) if quantize is None else _natively(found, checked(quantize, found.channels))
    frozen.signature = recording.signature()
    frozen.images = None if quantize is not None else (min(len(example), RECORDED), *example.shape[1:])
    frozen.program(tuple(example.shape))
    return frozen


def by_ops(
    model: nn.Module, example: Tensor, dtype: torch.dtype, quantize: Calibration | Iterable[Any] | None = None
) -> Frozen:
    """The network as calls of ops on the example's device, captured in a graph where that is a GPU."""
    # Imported here: the tuner and its ops take time, and the CPU needs none.
    from fastres.frozen.device import GraphFrozen
    from fastres.frozen.device_int8 import IntegersFrozen, check_kernel

    first, device = example[:RECORDED], example.device
    if quantize is not None:
        check_kernel(device)
    found, recording = recorded(model, first)
    if quantize is None:
        frozen = GraphFrozen(found, dtype, device, len(example))
        frozen.images = tuple(first.shape)
    else:
        _check_groups(found, dtype)
        wanted = checked(quantize, found.channels, device)
        frozen = _quantized(found, wanted, lambda scales: IntegersFrozen(found, scales, device, len(example)))
    frozen.signature = recording.signature()
    frozen.plan(tuple(example.shape))
    return frozen


def _check_processor(dtype: torch.dtype) -> None:
    reason = native.why_not("cpu_plan") or _conv_cpu.lacks(dtype)
    if reason is not None:
        raise UnsupportedError(f"fastres.freeze: the plan's kernels cannot run: {reason}")


def _check_groups(found: Network, dtype: torch.dtype) -> None:
    for layer in found.layers:
        if layer.groups > 1 and layer.weight is not None:
            channels = layer.groups * layer.weight.shape[1]
            reason = _conv_cpu.why_not_groups(channels, layer.out_channels, layer.groups, dtype)
            if reason is not None:
                raise UnsupportedError(f"fastres.freeze: the convolution {layer.name!r} cannot run: {reason}")


def _natively(found: Network, wanted: Calibration) -> NativeFrozen:
    return _quantized(found, wanted, lambda scales: NativeFrozen(found, torch.int8, scales))


def _quantized(found: Network, wanted: Calibration, make: Callable[[Mapping[Value, Scale]], Quantised]) -> Quantised:
    """The network in 8-bit integers, made with its scales, if that is good enough."""
    if not isinstance(found.form, Output):
        raise UnsupportedError("fastres.freeze: in 8-bit integers the network must return one tensor, not a container")
    if lacks := {layer.function or layer.kind for layer in found.layers if layer.kind in _REAL or layer.divisor}:
        raise UnsupportedError(f"fastres.freeze: in 8-bit integers a plan has no step for {', '.join(sorted(lacks))}")
    last = found.layers[-1]
    if last.kind not in ("conv", "linear", "add", "relu") or last.relu:  # kernels whose results can be float32 write no ReLU
        found.layers.append(Layer("relu", "dequantize", last.y, Value(last.y.shape)))
        found.outputs = [found.layers[-1].y]
    batches = len(list(wanted.batches))
    with Progress(f"Quantising {found.name}", 3 * batches, quiet=not wanted.progress) as progress:
        calibrated = calibrate(found.layers, found.x, wanted, progress)
        int8.with_int8_weights(found.layers)
        frozen, results = make(calibrated.scales), []
        for index, (images, _) in enumerate(calibrated.batches):
            progress.step(f"results, batch {index + 1} of {batches}")
            results.append(frozen(images))
    frozen.quality = judge(results, calibrated, wanted)
    return frozen


def load_frozen(path: str | os.PathLike[str], example: Tensor | None = None) -> Frozen:
    """A quantised network as ``Frozen.save`` wrote it, on whatever device.

    Nothing in the file is run: it holds safetensors, and the layers as JSON, each checked.

    Args:
        example: images (N, C, H, W) on the device where the network is to run, which is planned for them at once, as by
            ``freeze``; None for the CPU.

    Raises:
        TypeError, ValueError: the file is not such a one, or is damaged; the example is no batch of images that fits.
        UnsupportedError: this processor, or the example's GPU, cannot run it.
    """
    if example is not None:
        check_images("example", example)
    if example is not None and example.device.type == "cuda":
        return _loaded_by_ops(path, example)
    _check_processor(torch.int8)
    found, scales, quality = file.read(path)
    frozen = NativeFrozen(found, torch.int8, scales)
    frozen.quality = quality
    if example is not None:
        frozen.check(example.detach())
        frozen.program(tuple(example.shape))
    return frozen


def _loaded_by_ops(path: str | os.PathLike[str], example: Tensor) -> Frozen:
    from fastres.frozen.device_int8 import IntegersFrozen, check_kernel  # as above

    check_kernel(example.device)
    found, scales, quality = file.read(path)
    for layer, name in itertools.product(found.layers, ("weight", "bias", "scale")):
        if (tensor := getattr(layer, name)) is not None:
            setattr(layer, name, tensor.to(example.device))
    frozen = IntegersFrozen(found, scales, example.device, len(example))
    frozen.quality = quality
    frozen.check(example.detach())
    frozen.plan(tuple(example.shape))
    return frozen


def _check(model: object, example: object, dtype: object, quantize: object) -> torch.dtype:
    if not isinstance(model, nn.Module):
        raise must_type("freeze", "model", "a torch.nn.Module", model)
    if isinstance(model, Frozen):
        raise must("freeze", "model", "the network itself", "one that is frozen already")
    check_images("example", example)
    example = cast(Tensor, example)
    if quantize is not None and dtype not in (None, torch.int8):
        raise must("freeze", "dtype", "None or torch.int8 with quantize", dtype)
    if quantize is None and dtype == torch.int8:
        raise must("freeze", "quantize", "given for torch.int8", "None", "give image batches to find the scales with")
    dtype = dtype or parameter_dtype(model) or example.dtype
    dtypes = DTYPES[example.device.type]
    if quantize is None and dtype not in dtypes:
        raise must("freeze", "dtype", f"torch.{' or torch.'.join(str(d)[6:] for d in dtypes)}", dtype)
    check_device(model, example.device)
    return torch.int8 if quantize is not None else dtype  # type: ignore[return-value]
