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

__all__ = ["torchvision"]
