"""Which modules of a model can run fused steps, and what prevents the others."""

import fnmatch
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fastres.errors import UnsupportedError, must, must_type
from fastres.nn import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, _plain
from fastres.nn._plain import original_class, why_not
from fastres.optimize.plan import Plan, Step, plan
from fastres.optimize.swap import state_of
from fastres.optimize.trace import CannotTrace, is_trusted, read

_OTHER_RANKS = (nn.BatchNorm1d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm3d)
_BLOCKS = (BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck)
_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
# Of ResNeSt, which in evaluation would take 1.3 times as long as without fastres, not 0.95 (Intel Xeon, 1 thread, 2026-11-29).
_SPLIT_ATTENTION = "timm.layers.split_attn", "SplitAttn"


@dataclass
class Site:
    """One module with layers of its own: ``status`` is fused, fusable, fastres, skipped or left."""

    name: str
    module: nn.Module
    status: str
    plans: dict[bool, Plan] = field(default_factory=dict)  # by training
    left: dict[str, str] = field(default_factory=dict)  # norm layers outside any step, and why

    @property
    def plan(self) -> Plan:
        """The plan of the module's mode."""
        return self.plans.get(self.module.training) or Plan()

    @property
    def steps(self) -> list[Step]:
        return self.plan.steps


def unwrap(model: Any, caller: str) -> nn.Module:
    """The network itself: inside DataParallel and DistributedDataParallel.

    Raises:
        ArgumentTypeError: not a module.
        UnsupportedError: a compiled, scripted, traced or sharded one.
    """
    if not isinstance(model, nn.Module):
        raise must_type(caller, "model", "a torch.nn.Module", model)
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    reason = _why_closed(model)
    if reason is None and any(_is_sharded(module) for module in model.modules()):
        reason = "fused steps cannot read sharded parameters; optimize the model before it is sharded, with channels_last=False"
    if reason is not None:
        raise UnsupportedError(f"fastres.{caller}: {type(model).__name__} is left alone: {reason}")
    return model


def _is_sharded(module: nn.Module) -> bool:
    return any(cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(module).__mro__)


def _why_closed(module: nn.Module) -> str | None:
    """Why nothing inside a module may be touched."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has fixed its code; optimize the model before scripting it"
    if isinstance(module, fx.GraphModule):
        return "torch.fx has fixed its graph; optimize the model it came from"
    if "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule):  # its import takes seconds
        return "it is compiled; optimize the model first, then torch.compile it"
    return None


def is_any_norm(module: nn.Module | None) -> bool:
    """Whether a module normalises images: what a fused step should cover."""
    if isinstance(module, _OTHER_RANKS):
        return False
    return isinstance(module, _NormBase | nn.GroupNorm) or "BatchNorm" in type(module).__name__


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern covers a module or one that it is in."""
    parts = name.split(".")
    prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)


def check_skip(model: nn.Module, skip: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns of ``skip``, each of which must name something."""
    patterns = (skip,) if isinstance(skip, str) else tuple(skip) if isinstance(skip, Sequence) else (skip,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise must_type("optimize", "skip", "a pattern of module names or a sequence of them", pattern)
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            what = "patterns of module names, such as 'layer4.*'"
            raise must("optimize", "skip", what, f"{pattern!r}, which matches none")
    return patterns


def sites(model: nn.Module, skip: Sequence[str] = ()) -> list[Site]:
    """Every module with layers of its own, in the order of ``named_modules``."""
    return list(_sites(model, skip))


def _sites(model: nn.Module, skip: Sequence[str]) -> Iterator[Site]:
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name == top or name.startswith(f"{top}.") for top in closed):
            continue
        reason = _why_closed(module)
        if reason is not None:
            closed.append(name)
            yield Site(name, module, "left", left={name: reason})
        elif any(type(child) in _LAYERS or is_any_norm(child) for child in module.children()):
            if original_class(module).__module__.startswith("fastres."):
                closed += [f"{name}.{key}".lstrip(".") for key, child in module._modules.items() if _is_run(child)]
                left = {_join(name, n): r for n, r in _outside(module, Plan(steps=_own_steps(module))).items()}
                yield Site(name, module, "fastres", left=left)
            elif matches(name, skip):
                yield Site(name, module, "skipped")
            else:
                yield from _examined(name, module)


def _is_run(child: nn.Module | None) -> bool:
    """A shortcut or a stem that the fastres block around it runs as fused steps."""
    return type(child) is nn.Sequential and any(type(layer) in _LAYERS for layer in child)


def _own_steps(module: nn.Module) -> list[Step]:
    """What a fastres module covers: its plain batch norms."""
    norms = [name for name, child in module._modules.items() if _plain.kind_of(child) is nn.BatchNorm2d]
    return [Step("bn_act", (name,)) for name in norms]


def _examined(name: str, module: nn.Module) -> Iterator[Site]:
    base = original_class(module)
    if "forward" in module.__dict__:
        both = {mode: Plan(reason="it has a forward of its own on the instance") for mode in (True, False)}
    else:
        both = {mode: plan(module, base, mode) for mode in (True, False)}
    fusable = any(p.steps for p in both.values())
    status = "left" if not fusable else "fusable" if state_of(module) is None else "fused"
    site = Site(name, module, status, both)
    site.left = {_join(name, key): reason for key, reason in _outside(module, site.plan).items()}
    if site.left or fusable:
        yield site


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _outside(module: nn.Module, made: Plan) -> dict[str, str]:
    """The norm layers of a module that no step covers, and why."""
    covered = {name for step in made.steps for name in step.modules}
    left = {}
    for name, child in module._modules.items():
        if child is not None and is_any_norm(child) and name not in covered:
            reason = why_not(child) or (None if made.steps else made.reason)
            left[name] = reason or "no convolution before it or activation after it can join it"
    return left


def recomputing_blocks(model: nn.Module, found: list[Site], skip: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks that can recompute in backward what their layers pass to each other: swapped ones and those of fastres."""
    blocks = {site.module: site.plans[True].block for site in found if site.status in ("fusable", "fused")}
    swapped = [
        module
        for module, block in blocks.items()
        if block is not None and len(block.layers) > 1 and not any(map(_plain.is_frozen_norm, module.children()))
    ]
    own = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BLOCKS) and original_class(module).forward.__module__.startswith("fastres.")
        and not matches(name, skip) and any(type(child) is nn.BatchNorm2d for child in module.children())
    ]  # fmt: skip
    return swapped + own


def follows_layout(model: nn.Module) -> str | None:
    """Why a network might not work in channels_last, or be slower: it has unknown code that cannot be read, or that views
    memory; a convolution in which PyTorch's library for CPUs writes beyond its memory; or sums over parts of the channels."""
    for name, module in model.named_modules():
        if _overflows(module):
            return f"{name or 'the model'}: oneDNN's gradient of a strided 1x1 weight of few channels writes beyond its memory"
        if _plain.is_named(module, _SPLIT_ATTENTION) and module.conv.weight.device.type == "cpu":
            return f"{name} ({_SPLIT_ATTENTION[1]}): PyTorch adds up parts of the channels slowly in channels_last"
        base = original_class(module)
        if not is_trusted(base.forward) or "forward" in module.__dict__:
            reason = _why_not_layout(plan(module, base, module.training), module, base, not name)
            if reason is not None:
                return f"{name or 'the model'} ({base.__name__}): {reason}"
    return None


def _why_not_layout(made: Plan, module: nn.Module, base: Any, is_root: bool) -> str | None:
    views = made.rejoined and not (is_root or made.steps)  # else its plan has reshapes instead
    if not made.readable:
        try:
            nodes = read(module, base, module.training).nodes
        except CannotTrace as error:
            return str(error)
        views = any(node.op == "call_method" and node.target == "view" for node in nodes)
    return "it views memory as if contiguous" if views else None


def _overflows(module: nn.Module) -> bool:
    """Whether oneDNN's gradient of this weight, in channels_last, is its kernel for strided 1x1 ones, which writes whole
    vectors of channels into room for fewer: https://github.com/uxlfoundation/oneDNN/issues/6035 (torch 2.13)."""
    if not isinstance(module, nn.Conv2d) or module.weight.device.type != "cpu":
        return False
    return module.kernel_size == (1, 1) and module.stride != (1, 1) and module.in_channels // module.groups < 16
