"""The three shortcuts of He et al. 2016 (section 3.3; compared in section 4.1, table 3)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.errors import must
from fastres.nn.conv import conv1x1

OPTIONS = ("A", "B", "C")


class ZeroPadShortcut(nn.Module):
    """The identity at another size: every ``stride``-th pixel, channels of zeros added behind (option A).

    Equivalent to ``F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, planes - inplanes))``; no parameters.

    Args:
        inplanes, planes: channels of x and of the result, ``planes >= inplanes``.
        stride: of the block that it bypasses.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        if planes < inplanes:
            raise must("nn.ZeroPadShortcut", "planes", f"at least inplanes ({inplanes})", planes, "use option B")
        if stride < 1:
            raise must("nn.ZeroPadShortcut", "stride", "at least 1", stride)
        self.inplanes, self.planes, self.stride = inplanes, planes, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.planes - self.inplanes))

    def extra_repr(self) -> str:
        return f"{self.inplanes}, {self.planes}, stride={self.stride}"


def shortcut(
    option: str,
    inplanes: int,
    planes: int,
    stride: int = 1,
    norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
) -> nn.Module | None:
    """Make a block's ``downsample``, or None where the shortcut is the identity.

    Args:
        option: ``"A"`` identity, with zero padding where dimensions change; ``"B"`` projection (1x1
            convolution and norm) where dimensions change; ``"C"`` projection everywhere.
        inplanes, planes: channels that enter and leave the block.
        stride: of the block.
        norm_layer: follows the convolution of a projection; None for the bare one of pre-activation blocks.
    """
    if option not in OPTIONS:
        raise must("nn.shortcut", "option", f"one of {OPTIONS}", repr(option))
    changes = stride != 1 or inplanes != planes
    if option == "A":
        return ZeroPadShortcut(inplanes, planes, stride) if changes else None
    if option == "B" and not changes:
        return None
    convolution = conv1x1(inplanes, planes, stride)
    return convolution if norm_layer is None else nn.Sequential(convolution, norm_layer(planes))
