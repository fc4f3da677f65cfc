"""Post-training quantisation: the range of every activation on the user's images, and whether the result is good enough."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.errors import UnsupportedError, VerificationError, must, must_type
from fastres.frozen.int8 import LEVELS, Scale
from fastres.frozen.layers import Layer
from fastres.frozen.plain import PLAIN
from fastres.frozen.record import Value
from fastres.terminal import Progress

_BINS = 4096
_SHARES = tuple(i / 64 for i in range(16, 65))  # shares of the observed range that are tried
INHERIT = ("max_pool", "pad")  # layers whose output has the scale of their input


@dataclass
class Calibration:
    """Images to quantise a network with, and how good it must be on them.

    Args:
        batches: image batches (N, C, H, W), or pairs of a batch and its labels (N,); a few hundred typical images.
        accuracy: least share, 0..1, of labels that the quantised network must predict; None for no threshold.
        agreement: least share of images for which it must predict the same class as in float32; None for no threshold.
        error: largest relative L2 distance of its outputs from those in float32; None for no threshold.
        progress: whether to show progress on stderr.
    """

    batches: Iterable[Any]
    accuracy: float | None = None
    agreement: float | None = None
    error: float | None = 0.1
    progress: bool = True


@dataclass
class Quality:
    """How a quantised network does on its calibration images, compared with float32: shares, and the relative L2 error."""

    images: int
    error: float
    agreement: float | None = None
    accuracy: float | None = None
    float_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Calibrated:
    """Scales of all activations, and the batches with the outputs that the float32 network gave."""

    scales: dict[Value, Scale]
    batches: list[tuple[Tensor, Tensor | None]]
    outputs: list[Tensor]


def checked(
    calibration: Calibration | Iterable[Any], channels: int, device: torch.device = torch.device("cpu")  # noqa: B008
) -> Calibration:
    """The calibration with a list of pairs for batches, on the device.

    Raises:
        TypeError, ValueError: there is no image, one is not finite, or all pixels are equal; a threshold is not a share.
    """
    if not isinstance(calibration, Calibration):
        if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
            raise must_type("freeze", "quantize", "a fastres.Calibration or an iterable of image batches", calibration)
        calibration = Calibration(calibration)
    for name in ("accuracy", "agreement", "error"):
        value = getattr(calibration, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise must_type("freeze", f"quantize.{name}", "a number or None", value)
    for name in ("accuracy", "agreement"):
        value = getattr(calibration, name)
        if value is not None and not 0 <= value <= 1:
            raise must("freeze", f"quantize.{name}", "a share of 0..1 or None", value)
    if calibration.error is not None and not calibration.error >= 0:
        raise must("freeze", "quantize.error", "at least 0 or None", calibration.error)
    pairs = [_pair(index, batch, channels, device) for index, batch in enumerate(calibration.batches)]
    if not pairs:
        raise must("freeze", "quantize", "batches of images", "none", "give a few hundred images like those to come")
    low, high = min(x.min().item() for x, _ in pairs), max(x.max().item() for x, _ in pairs)
    if low == high:
        raise must("freeze", "quantize", "images that differ", f"only pixels of {low}", "a constant shows no range")
    if calibration.accuracy is not None and any(labels is None for _, labels in pairs):
        raise must("freeze", "quantize", "of pairs (images, labels) where accuracy is asked for", "batches without labels")
    return Calibration(pairs, calibration.accuracy, calibration.agreement, calibration.error, calibration.progress)


def _pair(index: int, batch: Any, channels: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    name = f"quantize: batch {index}"
    x, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(x, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        raise must_type("freeze", name, "images, or a pair of images and labels", batch)
    if any(t is not None and (t.is_nested or t.layout is not torch.strided) for t in (x, labels)):
        raise must("freeze", name, "of strided tensors", "another layout", "call .to_dense()")
    places = [torch.device("cpu"), *[device] * (device.type != "cpu")]
    if x.dim() != 4 or x.shape[1] != channels or x.numel() == 0 or x.device not in places or not x.is_floating_point():
        what = f"floating-point images (N, {channels}, H, W) on {' or '.join(map(str, places))}"
        raise must("freeze", name, what, f"{tuple(x.shape)} {x.dtype} on {x.device}")
    if labels is not None and (labels.shape != x.shape[:1] or labels.is_floating_point()):
        raise must("freeze", name, f"with {len(x)} integer labels", f"{tuple(labels.shape)} {labels.dtype}")
    if not bool(x.isfinite().all()):
        raise must("freeze", name, "finite", "NaN or infinity")
    return x.detach().float().to(device), None if labels is None else labels.to(device)


def calibrate(layers: list[Layer], x: Value, calibration: Calibration, progress: Progress) -> Calibrated:
    """Run the layers in float32 twice: for the range of each activation, then for how its values are spread in it.

    Raises:
        UnsupportedError: an activation is not finite.
    """
    last = layers[-1]
    own = [x, *(layer.y for layer in layers if layer.kind not in INHERIT and layer is not last)]
    names = {layer.y: layer.name for layer in layers} | {x: "the images"}
    ranges = dict.fromkeys(own, (torch.inf, -torch.inf))
    counts = {value: torch.zeros(_BINS, dtype=torch.float32, device="cpu") for value in own}
    batches, outputs = list(calibration.batches), list[Tensor]()

    def widen(value: Value, tensor: Tensor) -> None:
        if value in ranges:
            low, high = (bound.item() for bound in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise UnsupportedError(f"fastres.freeze: {names[value]} is not finite in calibration")
            ranges[value] = min(ranges[value][0], low), max(ranges[value][1], high)

    def count(value: Value, tensor: Tensor) -> None:
        if value in ranges and ranges[value][0] < ranges[value][1]:
            counts[value] += torch.histc(tensor, _BINS, *ranges[value]).cpu()

    for index, (images, _) in enumerate(batches):
        progress.step(f"ranges, batch {index + 1} of {len(batches)}")
        outputs.append(run(layers, x, images, widen))
    for index, (images, _) in enumerate(batches):
        progress.step(f"distributions, batch {index + 1} of {len(batches)}")
        run(layers, x, images, count)
    scales = {value: best_scale(*ranges[value], counts[value]) for value in own}
    for layer in layers:
        if layer.kind in INHERIT and layer is not last:
            scales[layer.y] = scales[layer.x]
    return Calibrated(scales, batches, outputs)


def best_scale(low: float, high: float, counts: Tensor) -> Scale:
    """The scale with the least squared error for values distributed like this over [low, high]. Ranges from a quarter to all of
    it are tried: a smaller one clips a few values and is finer for the rest.
    """
    if low == high == 0.0:
        return Scale(1.0 / LEVELS, 0)  # always zero in calibration
    step = (high - low) / _BINS
    middle = low + step * (torch.arange(_BINS, dtype=torch.float64, device="cpu") + 0.5)
    low, high = min(low, 0.0), max(high, 0.0)  # zero is exact
    best, least = Scale(1.0, 0), torch.inf
    for share in _SHARES:
        scale = share * (high - low) / LEVELS
        zero = round(-share * low / scale)
        stored = (middle / scale + zero).round().clamp(0, LEVELS)
        error = (((stored - zero) * scale - middle).square() * counts).sum().item()
        if error < least or (share == 1.0 and least == 0.0):
            best, least = Scale(scale, zero), error
    return best


def run(layers: list[Layer], x: Value, images: Tensor, see: Any = lambda value, tensor: None) -> Tensor:
    """Run the layers as PyTorch's own operations, in the weights' dtype; ``see(value, tensor)`` is called with every result."""
    last = {value: index for index, layer in enumerate(layers) for value in (layer.x, layer.residual) if value is not None}
    values = {x: images.contiguous(memory_format=torch.channels_last)}
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False), _without_tf32():
        see(x, images)
        for index, layer in enumerate(layers):
            values[layer.y] = result(layer, values)
            see(layer.y, values[layer.y])
            for value in [value for value, end in last.items() if end == index]:
                del values[value]
    return values[layers[-1].y]


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Float32 convolutions without TF32, whatever is allowed on this GPU."""
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def result(layer: Layer, values: dict[Value, Tensor]) -> Tensor:
    """What a layer computes, by PyTorch's own operations in the dtype of its input."""
    x, weight, bias = values[layer.x], layer.weight, layer.bias
    if layer.kind in ("conv", "linear"):
        assert weight is not None and bias is not None
        dtype = x.dtype
        x = F.conv2d(x, weight.to(dtype), bias.to(dtype), layer.stride, layer.padding, layer.dilation)
    elif layer.kind == "bn":
        assert weight is not None
        mean, scale, shift = (row.view(-1, 1, 1) for row in weight)
        x = (x - mean) * scale + shift
    elif layer.kind in PLAIN:
        x = PLAIN[layer.kind](layer, x)
    if layer.residual is not None:
        x = x + values[layer.residual]
    return F.relu(x) if layer.relu else x


def judge(results: list[Tensor], calibrated: Calibrated, wanted: Calibration) -> Quality:
    """How good the quantised network's results are.

    Raises:
        VerificationError: not as good as the user wants; the text gives each number.
    """
    truth = torch.cat([y.flatten(1) for y in calibrated.outputs]).double()
    found = torch.cat([y.flatten(1) for y in results]).double()
    quality = Quality(len(truth), ((found - truth).norm() / truth.norm().clamp_min(1e-300)).item())
    if truth.shape[1] > 1:
        quality.agreement = (found.argmax(1) == truth.argmax(1)).double().mean().item()
    if all(labels is not None for _, labels in calibrated.batches):
        labels = torch.cat([labels for _, labels in calibrated.batches if labels is not None])
        quality.accuracy = (found.argmax(1) == labels).double().mean().item()
        quality.float_accuracy = (truth.argmax(1) == labels).double().mean().item()
    wants = [
        ("error", quality.error, wanted.error, wanted.error is None or quality.error <= wanted.error),
        *((name, value, least, least is None or (value is not None and value >= least))
          for name, value, least in (("agreement", quality.agreement, wanted.agreement),
                                     ("accuracy", quality.accuracy, wanted.accuracy))),
    ]  # fmt: skip
    missed = [f"{name} is {value}, wanted {bound}" for name, value, bound, fine in wants if not fine]
    if missed:
        raise VerificationError(
            f"fastres.freeze: quantised, the network is not good enough on its {quality.images} calibration images:"
            f" {'; '.join(missed)}; give more images like those to come, or set Calibration's thresholds"
        )
    return quality
