"""Parameters and multiply-adds of a network, counted by PyTorch on tensors without storage, beside the paper's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.experiments.twin import torch_twin
from fastres.nn import Bottleneck

# He et al. 2016: parameters of table 6, multiply-adds of table 1. Those of table 1 are for a stride on the first 1x1
# convolution of a block; torchvision's networks, and these, have it on the 3x3 one.
PARAMETERS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6, 1202: 19.4e6}
FLOPS = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image's convolutions and linear layers, as the paper counts; the model may be on the meta device."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        torch_twin(model).eval()(torch.empty(1, *shape, device=device))
    return counter.get_total_flops() // 2


def stride_first(model: nn.Module) -> nn.Module:
    """The model with every bottleneck's stride on its first convolution, as in table 1."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    return model


def beside_paper(
    kind: str, depth: int, family: str, make: Callable[..., nn.Module], shape: tuple[int, int, int], classes: int
) -> dict[str, Any]:
    """Counts of the network as trained, and at the paper's input (32x32 or 224x224 in colour) next to the paper's figures."""
    with torch.device("meta"):
        trained = make(kind, depth, family, classes, shape[0])
        theirs = make(kind, depth, family, 10 if family == "cifar" else 1000, 3)
    size = 32 if family == "cifar" else 224
    return {
        "parameters": parameters(trained), "multiply_adds": multiply_adds(trained, shape),
        "paper": {
            "parameters": PARAMETERS.get(depth) if family == "cifar" else None,
            "multiply_adds": FLOPS.get(depth) if family == "imagenet" else None,
            "parameters_here": parameters(theirs),
            "multiply_adds_here": multiply_adds(stride_first(theirs), (3, size, size)),
        },
    }  # fmt: skip
