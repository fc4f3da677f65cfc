"""Which modules are plain, so that a fused step may read them instead of calling them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as _any_global_hook

Act = nn.Module | str | None
_FUSIBLE: dict[type, Any] = {kind: kind.forward for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)}
_FROZEN = "torchvision.ops.misc", "FrozenBatchNorm2d"  # recognised by name: neither library need be there
_NORM_ACT = "timm.layers.norm_act", "BatchNormAct2d"
_AFFINE, _STATISTICS = {"weight", "bias"}, {"running_mean", "running_var"}


def is_named(module: Any, name: tuple[str, str]) -> bool:
    """Whether a module's class, also where optimize put its own on top, is the one of this module and name."""
    kind = type(module)
    return (kind.__module__, kind.__qualname__) == name


def is_frozen_norm(module: Any) -> bool:
    """Whether it is torchvision's batch norm of fixed statistics, weight and bias, all of them buffers."""
    return is_named(module, _FROZEN)


def is_norm_act(module: Any) -> bool:
    """Whether it is timm's batch norm that applies its child ``act`` itself."""
    return is_named(module, _NORM_ACT)


def own_act(norm: Any) -> Any:
    """The activation that a batch norm applies itself, None for one that applies none."""
    return norm._modules.get("act") if is_norm_act(norm) else None


def is_batch_norm(module: Any) -> bool:
    """Whether it computes what ``nn.BatchNorm2d`` does, and then its own activation if it has one."""
    return type(module) is nn.BatchNorm2d or is_norm_act(module)


def is_fusible_norm(module: Any) -> bool:
    """Whether a fused step knows this batch norm."""
    return is_batch_norm(module) or is_frozen_norm(module)


def agrees(norm: Any, act: Act) -> bool:
    """Whether a step that ends with act applies the norm's own activation: it is act, or there is none."""
    if type(norm) is nn.BatchNorm2d:
        return True
    own = own_act(norm)
    return own is None or own is act or (type(own) is nn.Identity and not has_hooks(own))


def kind_of(module: Any) -> Any:
    """Its class, that of a batch norm for what computes the same."""
    same = is_frozen_norm(module) or type(own_act(module)) is nn.Identity
    return nn.BatchNorm2d if same else type(module)


def trains(norm: Any) -> bool:
    """Whether a batch norm normalises by the batch and counts it."""
    return norm.training and not is_frozen_norm(norm)


def keeps_dtype(conv: Any, norm: Any, x: Tensor) -> bool:
    """Whether PyTorch's modules give x's dtype, as the op does: the products and sums of a frozen norm promote theirs."""
    if not is_frozen_norm(norm):
        return True
    cast = conv is not None and torch.is_autocast_enabled(x.device.type)
    return x.dtype == norm._buffers["weight"].dtype and not cast


def has_hooks(module: nn.Module) -> bool:
    """Whether something expects to see the module called."""
    state = module.__dict__
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
    return bool(hooks or state["_backward_pre_hooks"])


# Attribute of a class that optimize put on top of a module's own class: that own class.
ORIGINAL = "_fastres_original"


def original_class(module: nn.Module) -> Any:
    """The class a module has, or had before it was swapped."""
    return getattr(type(module), ORIGINAL, type(module))


def _why_not_module(module: nn.Module) -> str | None:
    """Why a module must be called rather than read."""
    kind = type(module)
    named = kind not in _FUSIBLE
    if named and not is_fusible_norm(module):
        return f"{kind.__name__} is not one of the plain modules that can be fused"
    if has_hooks(module):
        return f"{kind.__name__} has hooks, which must fire"
    if "forward" in module.__dict__:
        return f"{kind.__name__} has a forward of its own on the instance"
    own = kind.forward.__qualname__ == f"{kind.__name__}.forward" if named else kind.forward is _FUSIBLE[kind]
    if not own:
        return f"the forward of {kind.__name__} was replaced on the class"
    if named and is_norm_act(module) and (reason := _why_not_children(module)) is not None:
        return reason
    if not _keeps_tensors(module):
        return f"{kind.__name__} keeps parameters or buffers elsewhere, as a replica of DataParallel does"
    if kind is nn.Conv2d and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return f"Conv2d pads with {module.padding_mode!r}, {module.padding!r}: only zero padding given as numbers can be fused"
    if kind is nn.Conv2d and not all(map(_is_pair, (module.stride, module.padding, module.dilation))):
        return f"Conv2d has {module.stride!r}, {module.padding!r}, {module.dilation!r}: only pairs can be fused"
    if kind is nn.MaxPool2d and (module.dilation not in (1, (1, 1)) or module.ceil_mode or module.return_indices):
        return "MaxPool2d has dilation, ceil_mode or return_indices"
    return None


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _why_not_children(norm: nn.Module) -> str | None:
    """Why a batch norm must be called for what it applies itself."""
    children: dict[str, Any] = norm._modules
    if children.keys() != {"drop", "act"} or type(children["drop"]) is not nn.Identity or has_hooks(children["drop"]):
        return f"{type(norm).__name__} drops values, or applies more than an activation"
    if type(children["act"]) not in (nn.ReLU, nn.Identity):
        return f"{type(norm).__name__} applies {type(children['act']).__name__}: only ReLU can be fused"
    return None


def _keeps_tensors(module: nn.Module) -> bool:
    """Whether parameters and buffers are where a step reads them."""
    if type(module) is nn.Conv2d:
        return module._parameters.keys() >= _AFFINE
    if is_batch_norm(module):
        return module._parameters.keys() >= _AFFINE and module._buffers.keys() >= _STATISTICS | {"num_batches_tracked"}
    return type(module) in _FUSIBLE or module._buffers.keys() >= _AFFINE | _STATISTICS


def why_not(*modules: Act) -> str | None:
    """Why these modules cannot run as one op, or None: ``(conv, bn, act)``, ``(bn, act)``, ``(bn, act, pool)``."""
    for module in modules:
        if isinstance(module, nn.Module) and (reason := _why_not_module(module)) is not None:
            return reason
    if _any_global_hook():
        return "a global module hook is registered, which must fire"
    return None
