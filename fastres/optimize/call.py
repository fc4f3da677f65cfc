"""``optimize``, ``restore`` and ``refresh``: what a user calls on a model."""

import copy
import gc
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.errors import UnsupportedError, must, must_type
from fastres.nn import _fused
from fastres.ops import _fold
from fastres.optimize.convert import Conversion, cast, to_channels_last
from fastres.optimize.sites import Site, check_skip, follows_layout, recomputing_blocks, sites, unwrap
from fastres.optimize.swap import State, forget, is_stage, state_of, swap, unswap
from fastres.optimize.verify import Reference
from fastres.optimize.whole import STATE, Whole, forget_all

_log = logging.getLogger("fastres")
Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    mode: str | None = None,
    strict: bool = False,
    inplace: bool = True,
    skip: str | Sequence[str] = (),
    channels_last: bool | str = "auto",
    dtype: torch.dtype | None = None,
    verify: Tensor | tuple[Any, ...] | None = None,
    memory: str | None = None,
) -> Model:
    """Make a model run fused steps wherever its layers allow, in training and in evaluation.

    Residual blocks, conv-bn(-relu) runs and stems of torchvision, of timm and of a user's own classes are swapped in place:
    each module gets a subclass of its own class, so parameters, buffers, hooks, keys, optimizers and ``isinstance`` stay.
    What is not recognised is left alone; ``explain`` says why, ``restore`` undoes it. A second call changes the options.

    Args:
        model: any ``nn.Module``; inside DataParallel and DistributedDataParallel the wrapped one is swapped. Better optimize
            before wrapping: DistributedDataParallel fixes the layout of gradients, so weights inside it keep theirs.
        mode: ``"training"`` or ``"inference"`` call ``model.train()`` or ``model.eval()``; None leaves the mode. The swapped
            modules serve both; evaluation folds batch norm only where autograd is off.
        strict: raise if any batch norm of the model would stay outside a fused step.
        inplace: False optimises a deep copy and leaves the model alone.
        skip: glob patterns of module names to leave alone, with everything inside them, such as ``"layer4.*"``.
        channels_last: whether swapped modules bring their input to channels_last and store 4-D weights so (same values), which
            saves training three copies of each. ``"auto"`` does so on the CPU in float32 and bfloat16 and on CUDA in half
            precision, for networks whose code follows the layout. LBFGS, pruning and FSDP2 (``fully_shard``): give False.
        dtype: a floating dtype for parameters and buffers, as ``model.to(dtype)``; inputs are the caller's to cast.
            The originals are kept for ``restore``, in this model but not in its copies.
        verify: an input (or a tuple of inputs) to run before and after on copies of the model; the swap is kept only if
            its error against float64 is within twice that of plain PyTorch at the same dtype, plus a floor.
        memory: ``"low"`` keeps less for backward in training: what batch norms of residual blocks (also ``fastres.nn``'s) pass
            to convolutions, and every other output of consecutive blocks, is recomputed from what is kept anyway, to the same
            bits; not under ``torch.compile``, nor for batch norm in evaluation, layers with hooks, and other norms.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        UnsupportedError: strict, and something is refused (all refusals are listed); memory="low", and no block can keep
            less; or the model is compiled, scripted, traced or sharded. The model is unchanged.
        VerificationError: the swap missed the budget; the model is restored.
    """
    unwrap(model, "optimize")
    _check_options(mode, channels_last, dtype, memory, strict=strict, inplace=inplace)
    model = model if inplace else copy.deepcopy(model)
    network = unwrap(model, "optimize")
    patterns = check_skip(network, skip)
    found = sites(network, patterns)
    blocks = _accept(network, found, patterns, strict, memory)
    modes = [(module, module.training) for module in model.modules()]
    if mode is not None:
        model.train(mode == "training")
    try:
        _mark(network, blocks)
        verdict = _apply(network, found, patterns, channels_last, dtype, verify, _is_distributed(model))
    except Exception:
        _restore(network, _is_distributed(model), modes)
        raise
    _log.info("%s", _summary(network, found, verdict))
    return model


def restore(model: Model) -> Model:
    """Undo ``optimize`` exactly: the classes, and the parameters' memory format and dtype. Returns the model.

    Parameters that were cast get their original bits back, unless they were written since (trained, loaded): then
    the new values stay, in the original dtype. The training mode stays as it is, and so does the memory format of what is
    inside DistributedDataParallel, whether the model given is the wrapper or a module in it.
    """
    _restore(unwrap(model, "restore"), _is_distributed(model))
    return model


def refresh(model: nn.Module | None = None) -> None:
    """Drop the folded weights of a model, or of all models. Needed after writes that go unseen: those through ``tensor.data``,
    and those of another process to shared memory."""
    if model is None:
        _fold.forget()
        forget_all()
    else:
        forget(unwrap(model, "refresh"))


def _apply(
    network: nn.Module,
    found: list[Site],
    patterns: tuple[str, ...],
    channels_last: bool | str,
    dtype: torch.dtype | None,
    verify: Tensor | tuple[Any, ...] | None,
    distributed: bool,
) -> dict[str, float] | None:
    """Convert, swap, and compare if asked to; the errors found then."""
    reference = None if verify is None else Reference(network, verify, dtype)
    _swap(network, found, patterns, *_convert(network, found, channels_last, dtype, distributed))
    if reference is None:
        return None
    vars(network)[STATE].verified = verdict = reference.judge(network)
    return verdict


def _is_distributed(model: nn.Module) -> bool:
    """Whether DistributedDataParallel has the model or a part of it, which reads gradients as the weights were laid out when it
    was made: in another memory format it would silently mix them up.

    A module does not know what it is wrapped in, so the wrappers are looked for among all objects, by ``type`` because
    ``isinstance`` would run the code of any that answers for its ``__class__`` itself.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return True
    if not (dist.is_available() and dist.is_initialized()):  # which a wrapper needs
        return False
    wrappers = [it for it in gc.get_objects() if issubclass(type(it), DistributedDataParallel)]
    wrapped = [getattr(wrapper, "module", None) for wrapper in wrappers]  # None: it is still being made
    theirs = {id(parameter) for module in wrapped if module is not None for parameter in module.parameters()}
    return any(id(parameter) in theirs for parameter in model.parameters())


def _check_options(mode: object, channels_last: object, dtype: object, memory: object, **flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise must_type("optimize", name, "a bool", flag)
    if mode not in (None, "training", "inference"):
        raise must("optimize", "mode", "None, 'training' or 'inference'", repr(mode))
    if channels_last not in (True, False, "auto"):
        raise must("optimize", "channels_last", "True, False or 'auto'", repr(channels_last))
    if memory not in (None, "low"):
        raise must("optimize", "memory", "None or 'low'", repr(memory))
    wide = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    if dtype is not None and not wide:
        raise must("optimize", "dtype", "None or a floating torch.dtype of at least 16 bits", dtype)


def _refuse_any(found: list[Site]) -> None:
    refusals = {name: reason for site in found for name, reason in site.left.items()}
    if refusals:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in refusals.items())
        raise UnsupportedError(f"fastres.optimize: strict=True, but {len(refusals)} modules cannot be fused:\n{lines}")
    if not any(site.status in ("fusable", "fused", "fastres") for site in found):
        raise UnsupportedError("fastres.optimize: strict=True, but the model holds nothing that can be fused")


def _accept(
    network: nn.Module, found: list[Site], patterns: tuple[str, ...], strict: bool, memory: str | None
) -> list[nn.Module]:
    """The blocks that are to keep less; refuses what cannot be done as asked."""
    if strict:
        _refuse_any(found)
    if memory is None:
        return []
    blocks = recomputing_blocks(network, found, patterns)
    if not blocks:
        what = "residual blocks of two or more layers of nn.Conv2d and nn.BatchNorm2d"
        raise UnsupportedError(f"fastres.optimize: memory='low' needs {what} to optimise, but finds none (leave memory out)")
    return blocks


def _mark(network: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Make these blocks, and no others, keep less."""
    for module in network.modules():
        vars(module).pop(_fused.RECOMPUTES, None)
    for block in blocks:
        vars(block)[_fused.RECOMPUTES] = True


def _wants_channels_last(network: nn.Module, found: list[Site], option: bool | str, dtype: torch.dtype | None) -> bool:
    if option != "auto":
        return bool(option)
    weight = next((p for p in network.parameters() if p.dim() == 4), None)
    if weight is None or not any(site.status in ("fusable", "fused", "fastres") for site in found):
        return False
    suits = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}
    return (dtype or weight.dtype) in suits.get(weight.device.type, ()) and follows_layout(network) is None


def _convert(
    network: nn.Module, found: list[Site], option: bool | str, dtype: torch.dtype | None, distributed: bool
) -> tuple[bool, list[Conversion]]:
    """Whether inputs go to channels_last, and what was done to parameters, in this call or an earlier one."""
    channels_last = _wants_channels_last(network, found, option, dtype)
    before = state_of(network)
    conversions = [] if before is None else list(before.conversions)
    if channels_last and not distributed:  # before the cast, which is undone only where it finds what it left
        conversions += to_channels_last(network)
    if dtype is not None:
        conversions += cast(network, dtype)
    return channels_last, conversions


def _swap(
    network: nn.Module,
    found: list[Site],
    patterns: tuple[str, ...],
    channels_last: bool,
    conversions: list[Conversion],
) -> None:
    """Swap the sites, and the network itself, which carries what concerns the whole."""
    for site in found:
        if site.status == "skipped":
            unswap(site.module)
        elif site.status in ("fusable", "fused"):
            _install(site.module, State(channels_last))
    for name, module in network.named_modules():
        part = _is_part(name, found)
        if module is not network and (part or is_stage(module)):
            _install(module, State(channels_last, Whole() if part else None))
    own = State(channels_last, None if any(site.status == "skipped" for site in found) else Whole())
    own.conversions, own.skip = conversions, patterns
    _install(network, own)


def _is_part(name: str, found: list[Site]) -> bool:
    """Whether a module holds several that run fused steps, and none to leave alone: it might have a plan of its own."""
    inside = [site.status for site in found if site.name.startswith(f"{name}.")]
    return "skipped" not in inside and sum(status in ("fusable", "fused", "fastres") for status in inside) > 1


def _install(module: nn.Module, state: State) -> None:
    before = state_of(module)
    if before is not None and not state.conversions:
        state.conversions = before.conversions  # of a part that was optimised by itself
    swap(module, state)
    state.prepare(module)


def _restore(network: nn.Module, distributed: bool, modes: Sequence[tuple[nn.Module, bool]] = ()) -> None:
    _mark(network, ())
    for module, training in modes:
        module.training = training
    for module in list(network.modules()):
        state = state_of(module)
        if state is not None:
            unswap(module)
            for conversion in reversed(state.conversions):
                if not (distributed and conversion.original is None):
                    conversion.undo()


def _summary(network: nn.Module, found: list[Site], verdict: dict[str, float] | None) -> str:
    steps = Counter(step.op for site in found if site.status in ("fusable", "fused") for step in site.steps)
    left = sum(len(site.left) for site in found)
    fused = ", ".join(f"{count} {op}" for op, count in sorted(steps.items())) or "nothing"
    text = f"fastres.optimize: {type(network).__name__}: fused {fused}; {left} norm layers left alone"
    if verdict is not None:
        text += f"; error {verdict['error']:.2g} against float64, PyTorch's own {verdict['torch_error']:.2g}"
    return text if not left else f"{text} (fastres.explain(model) says why)"
