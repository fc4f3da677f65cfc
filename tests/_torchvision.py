"""torchvision beside any torch: one built for another lacks two operators at import, declared here."""

import pytest
import torch

try:
    import torchvision
except ImportError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

NETWORKS = [  # those of the same names in fastres.models
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip
__all__ = ["NETWORKS", "torchvision"]
