"""Fused steps over the modules that own the parameters: the one way a block, or an optimised model, runs an op.

A step looks at its modules at every call. Where they are plain (exactly ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.ReLU``, or
batch norms that ``_plain`` knows by name; no hooks, no patched forward) it runs the fused op on their parameters; otherwise
it calls them one by one, as PyTorch would, so that a hook added, a layer replaced or a SyncBatchNorm conversion is never
skipped. ``why_not`` says why.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastres import functional
from fastres.errors import ArgumentError, ArgumentTypeError, must_type
from fastres.nn import _norm
from fastres.nn._plain import Act, agrees, is_batch_norm, is_fusible_norm, keeps_dtype, own_act, trains, why_not
from fastres.ops import _chain, _fold, _node
from fastres.ops._conv_choice import why_not_fast
from fastres.ops._known_stats import Known
from fastres.ops._op import is_interposed
from fastres.ops._recompute import Producer
from fastres.ops.conv_bn_add_conv_bn_act import may_join as device_may_join
from fastres.ops.conv_statistics import CONV_STATISTICS, may_find

Layer = tuple[nn.Conv2d, nn.BatchNorm2d, Act]
Link = tuple[Any, Act]  # a convolution, or a batch norm with its activation
_PLAIN = {Tensor, nn.Parameter, type(None)}
_transforms = torch._C._are_functorch_transforms_active
# Ops refuse what modules may accept: the modules are called then, which raise PyTorch's own error or compute it.
WRONG = (ArgumentError, ArgumentTypeError)
# Values of an input up to which a block's layers are one autograd node. It saves host time, but keeps all that it saved until
# its backward has ended, so that more memory must come fresh from the system: ResNet-50 with batch 8 in float32 would take a
# thirtieth longer (AMD EPYC, 2 threads, 2026-11-25).
MOST_IN_ONE_NODE = 2**20
WHOLE = {"cuda"}  # device types where it is one node whatever the size: PyTorch keeps freed memory there
# Attribute of a block that optimize(memory="low") has marked: backward recomputes what its layers pass on.
RECOMPUTES = "_fastres_recomputes"


def _is_relu(act: Act) -> bool:
    """Whether the activation is one that fuses, or absent: it may have been replaced by any module."""
    return not isinstance(act, nn.Module) or type(act) is nn.ReLU


def fuses(x: Tensor, conv: nn.Module | None, bn: nn.Module, act: Act, pool: nn.Module | None) -> bool:
    """Whether a call may be one op: each module has the plain type that its place asks for, and nothing must see it called."""
    return (
        is_fusible_norm(bn)
        and agrees(bn, act)
        and (conv is None or type(conv) is nn.Conv2d)
        and (pool is None or type(pool) is nn.MaxPool2d)
        and _is_relu(act)
        and not is_followed(x)
        and why_not(conv, bn, act, pool) is None
        and keeps_dtype(conv, bn, x)
    )


def is_followed(x: Tensor) -> bool:
    """Whether modules must be called because something follows the call that cannot see into an op: torch.fx and
    torch.jit.trace, which name what they record after the modules; torch.func; forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return False
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or _transforms() or forward_ad._current_level >= 0


def conv_bn_act(conv: nn.Conv2d, bn: nn.BatchNorm2d, act: Act, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``act(bn(conv(x)) [+ residual])``; one op in evaluation, the convolution and ``bn_act`` otherwise."""
    y = in_one_node([(conv, bn, act)], x, residual)
    if y is not None:
        return y
    if not trains(bn) and fuses(x, conv, bn, act, None) and bn._buffers["running_mean"] is not None:
        convolution, (mean, var, weight, bias, _) = conv._parameters, _norm.statistics(bn)
        inputs = (x,) if residual is None else (x, residual)
        run: Callable[..., Tensor] = functional.conv_bn_act if residual is None else functional.conv_bn_add_act
        try:
            return run(
                *inputs, convolution["weight"], convolution["bias"], mean, var, weight, bias, False, 0.0, bn.eps,
                conv.stride, conv.padding, conv.dilation, conv.groups, name(act),
            )  # fmt: skip
        except WRONG:
            pass  # see WRONG
    z, known = convolve_before(bn, act, conv, x)
    return bn_act(bn, act, z, residual, known)


def may_join(x: Tensor) -> bool:
    """Whether a kernel may compute two convolutions as one product. A cheap filter before ``dispatch``."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and device_may_join(x.device)


def conv_bn_add_conv_bn_act(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    act: Act,
    x: Tensor,
    shortcut_conv: nn.Conv2d,
    shortcut_bn: nn.BatchNorm2d,
    shortcut: Tensor,
) -> Tensor | None:
    """``act(bn(conv(x)) + shortcut_bn(shortcut_conv(shortcut)))`` in evaluation, or None where a module must be called."""
    if not (fuses(x, conv, bn, act, None) and fuses(shortcut, shortcut_conv, shortcut_bn, None, None)):
        return None
    if (shortcut_conv.kernel_size, shortcut_conv.padding, shortcut_conv.groups) != ((1, 1), (0, 0), 1):
        return None
    main, own = conv._parameters, shortcut_conv._parameters
    mean, var, weight, bias, training = _norm.statistics(bn)
    own_mean, own_var, own_weight, own_bias, own_training = _norm.statistics(shortcut_bn)
    if training or own_training:
        return None
    arguments: Any = (
        x, shortcut, main["weight"], main["bias"], mean, var, own["weight"], own["bias"], own_mean, own_var,
        weight, bias, own_weight, own_bias, bn.eps, shortcut_bn.eps,
        conv.stride, conv.padding, conv.dilation, conv.groups, shortcut_conv.stride, name(act),
    )  # fmt: skip
    try:
        return functional.conv_bn_add_conv_bn_act(*arguments)
    except WRONG:
        return None  # see WRONG


def layers(chain: Sequence[Layer], x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``conv_bn_act`` of each layer in turn, the residual added by the last; in training one autograd node for all where
    ``in_one_node`` makes one."""
    if not chain:
        return x
    y = in_one_node(chain, x, residual)
    if y is not None:
        return y
    for layer in chain[:-1]:
        x = conv_bn_act(*layer, x)
    return conv_bn_act(*chain[-1], x, residual)


def in_one_node(
    chain: Sequence[Layer], x: Tensor, residual: Tensor | None, projection: Sequence[Any] = (), split_output: bool = False
) -> Any:
    """``layers`` as one autograd node, see ``ops._node``, where the input is small or on a GPU; None where they must run one by
    one.

    ``projection``: the convolution and the batch norm through which the residual goes. ``split_output``: the output comes as
    two tensors that share memory.
    """
    if not torch.is_grad_enabled():
        return None
    return _as_node(links(chain), x, residual, links([(*projection, None)]) if projection else [], split_output)


def links(chain: Sequence[Layer]) -> list[Link]:
    """The convolutions and batch norms of consecutive layers, batch norms with their activations."""
    return [link for conv, bn, act in chain for link in ((conv, None), (bn, act))]


def _as_node(
    chain: list[Link], x: Tensor, residual: Tensor | None, projection: list[Link], split_output: bool = False,
    made: Producer | None = None,
) -> Any:  # fmt: skip
    """Consecutive plain links as one node; None where a module must be called, or their tensors forbid it."""
    every = chain + projection
    if not joins(every, x) or (made is None and x.numel() > MOST_IN_ONE_NODE and x.device.type not in WHOLE):
        return None
    own = [module._parameters[name] for module, _ in every for name in ("weight", "bias")]
    tensors: list[Any] = [x, None if residual is x else residual, *own]
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if not {*map(type, tensors)} <= _PLAIN:
        return None
    if dtype is None and any(t is not None and t.dim() == 4 and t.dtype != x.dtype for t in own):
        return None
    steps: list[Any] = [
        _chain.Convolution((m.stride, m.padding, m.dilation, m.groups)) if type(m) is nn.Conv2d
        else _chain.Norm(m.eps, name(act)) for m, act in every
    ]  # fmt: skip
    shape = tuple(steps[: len(chain)]), residual is x, dtype, tuple(steps[len(chain) :]) or None, split_output, made
    norms: list[Any] = [module for module, _ in every if type(module) is not nn.Conv2d]

    def update(statistics: _chain.Statistics) -> None:
        if norms:
            _norm.update([(bn, *found) for bn, found in zip(norms, statistics, strict=True)])

    try:
        return _node.run(_chain.Chain(*shape), tensors, update)
    except WRONG:
        return None  # one by one they raise PyTorch's own error, or take what the ops do not; nothing has been updated yet


def joins(chain: Sequence[Link], x: Tensor) -> bool:
    """Whether links may run without checking their modules in between: all are plain and in training, and nothing but autograd
    follows the call."""
    for module, act in chain:
        if not _is_relu(act):
            return False
        if type(module) is not nn.Conv2d and not (is_batch_norm(module) and module.training and agrees(module, act)):
            return False
    if torch.compiler.is_compiling() or type(x) is not Tensor or is_followed(x) or is_interposed():
        return False
    if x.device.type not in ("cpu", "cuda") or x.layout is not torch.strided or x.is_nested:
        return False
    return why_not(*dict.fromkeys(each for link in chain for each in link)) is None


def convolve(conv: nn.Conv2d, x: Tensor, made: Producer | None = None) -> Tensor:
    """``conv(x)`` in training: by an op where fastres has a faster kernel, which shapes and layout alone decide. Where it is
    known how x was ``made``, backward recomputes x instead of keeping it."""
    if made is not None and made.version == x._version:
        y = _as_node([(conv, None)], x, None, [], made=made)
        if y is not None:
            return y
    if type(conv) is not nn.Conv2d or type(x) is not Tensor or torch.compiler.is_compiling() or is_followed(x):
        return conv(x)
    return conv(x) if why_not(conv) is not None else convolve_plain(conv, x)


def convolve_plain(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``convolve`` without calling the module, which would take twice the host time."""
    operands: Any = *cast(x), conv._parameters["weight"], conv._parameters["bias"]
    geometry: Any = conv.stride, conv.padding, conv.dilation, conv.groups
    if why_not_fast(operands[0], operands[1].shape, *geometry) is None:
        try:
            return functional.conv2d(*cast(*operands), *geometry)
        except WRONG:
            pass  # see WRONG
    return torch.conv2d(*operands, *geometry)


def convolve_before(bn: Any, act: Act, conv: Any, x: Tensor, pool: nn.Module | None = None) -> tuple[Tensor, Known]:
    """``convolve`` where ``act(bn(...))`` or ``pool(act(bn(...)))`` follows: in training also the statistics of the output,
    where one kernel computes both."""
    plain = not torch.compiler.is_compiling() and type(x) is Tensor and x.layout is torch.strided and not x.is_nested
    if plain and _chain.may_join_layers(x) and trains(bn) and fuses(x, conv, bn, act, pool):
        try:
            return find_statistics(conv, x)
        except WRONG:
            pass  # see WRONG
    return convolve(conv, x), None


def find_statistics(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Known]:
    """``convolve_plain``, and the statistics of its output where a kernel that computes both is chosen."""
    weight: Any = conv._parameters["weight"]
    geometry: Any = conv.stride, conv.padding, conv.dilation, conv.groups
    if conv._parameters["bias"] is None and may_find(x, weight, *geometry):
        arguments: Any = *cast(x, weight), *geometry
        if not CONV_STATISTICS.falls_back(*arguments):
            y, mean, var = CONV_STATISTICS(*arguments)
            return y, (mean, var)
    return convolve_plain(conv, x), None


def cast(*operands: Any) -> Sequence[Any]:
    """What goes into a convolution, as autocast casts it."""
    kind = operands[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):  # asking a meta tensor's raises
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in operands]


def bn_act(bn: nn.BatchNorm2d, act: Act, x: Tensor, residual: Tensor | None = None, known: Known = None) -> Tensor:
    """``act(bn(x) [+ residual])``, with the running buffers and the batch counter updated as torch does; ``known``: the
    statistics that the preceding convolution found."""
    if fuses(x, None, bn, act, None):
        *statistics, training = _norm.statistics(bn)
        arguments: Any = *statistics, False, 0.0, bn.eps, name(act)
        try:
            if training:
                return _norm.train([(bn, x)], name(act), residual, [known])[0]
            return functional.bn_act(x, *arguments) if residual is None else functional.bn_add_act(x, residual, *arguments)
        except WRONG:
            pass  # see WRONG; nothing has been updated yet
    return add_act(None if act is own_act(bn) else act, _call(bn, x), residual)


def _call(bn: nn.Module, x: Tensor) -> Tensor:
    """``bn(x)``; PyTorch's kernel does not advance the versions of running statistics, by which folds notice changes."""
    y = bn(x)
    if bn.training and not torch.compiler.is_compiling():
        _fold.forget_statistics(bn._buffers.get("running_mean"))
    return y


def bn_add_bn_act(
    bn: nn.BatchNorm2d, residual_bn: nn.BatchNorm2d, act: Act, x: Tensor, residual: Tensor,
    known: tuple[Known, Known] = (None, None),
) -> Tensor:  # fmt: skip
    """``act(bn(x) + residual_bn(residual))``; one op where both normalise by the same kind of statistics, some of which may be
    ``known``."""
    if bn is residual_bn:  # its buffers take both batches in PyTorch's order
        return add_act(act, _call(bn, x), _call(bn, residual))
    if fuses(x, None, bn, act, None) and fuses(residual, None, residual_bn, None, None):
        *own, training = _norm.statistics(bn)
        *others, residual_training = _norm.statistics(residual_bn)
        if training == residual_training and x.dtype == residual.dtype:
            try:
                if training:
                    return _norm.train([(bn, x), (residual_bn, residual)], name(act), residual, known)[0]
                arguments: Any = *own, *others, False, 0.0, bn.eps, 0.0, residual_bn.eps, name(act)
                return functional.bn_add_bn_act(x, residual, *arguments)
            except WRONG:
                pass  # see WRONG
    return bn_act(bn, act, x, bn_act(residual_bn, None, residual, None, known[1]), known[0])


def bn_act_maxpool(bn: nn.BatchNorm2d, act: Act, pool: nn.MaxPool2d, x: Tensor, known: Known = None) -> Tensor:
    """``pool(act(bn(x)))``; ``known`` as in ``bn_act``."""
    if fuses(x, None, bn, act, pool):
        *statistics, training = _norm.statistics(bn)
        window = tuple(map(functional.pair, (pool.kernel_size, pool.stride, pool.padding)))
        arguments: Any = *statistics, False, 0.0, bn.eps, name(act), *window
        try:
            if training:
                return _norm.train([(bn, x)], name(act), None, [known], window)[0]
            return functional.bn_act_maxpool(x, *arguments)
        except WRONG:
            pass  # see WRONG
    return pool(bn_act(bn, act, x, None, known))


def add_act(act: Act, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``act(x [+ residual])``, in x's dtype, as an addition in place gives."""
    y = x
    if residual is not None:
        if is_followed(x):
            y = x + residual
        elif not isinstance(residual, Tensor):
            raise must_type("add_act", "residual", "a torch.Tensor", residual)
        elif x.dtype == residual.dtype and x.shape == residual.shape and _is_relu(act) and why_not(act) is None:
            return functional.add_act(x, residual, name(act))
        else:
            y = (x + residual).to(x.dtype)
    if act is None:
        return y
    return F.relu(y) if isinstance(act, str) else act(y)


def name(act: Act) -> str:
    return "none" if act is None else "relu"
