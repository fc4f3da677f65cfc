"""Random tensors for the samples of ops, the same on every device."""

import torch
from torch import Tensor


class Draw:
    """Draws in float64 on the CPU; images come in the sample's dtype, parameters in float64 beside float64, else in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._images = device, dtype
        self._parameters = device, torch.float64 if dtype == torch.float64 else torch.float32

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, dtype=torch.float64)

    def images(self, *size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (self._normal(*size) * scale + mean).to(*self._images)

    def vector(self, size: int) -> Tensor:
        return self._normal(size).to(*self._parameters)

    def weight(self, *size: int) -> Tensor:
        """Of a convolution whose output varies as its input does."""
        return (self._normal(*size) / (size[1] * size[2] * size[3]) ** 0.5).to(*self._parameters)

    def norm(self, channels: int, mean: float = 0.0) -> list[Tensor]:
        """Weight, bias, mean and variance of a batch norm."""
        normal = [self._normal(channels) for _ in range(4)]
        normal[2:] = normal[2] * 0.2 + mean, normal[3].square() + 0.5
        return [t.to(*self._parameters) for t in normal]

    def layer(self, *size: int, bias: bool = False) -> list[Tensor | None]:
        """Weight and bias of a convolution, then its batch norm, as ``conv_bn_act`` takes them."""
        weight, norm = self.weight(*size), self.norm(size[0])
        return [weight, self.vector(size[0]) if bias else None, *norm]
