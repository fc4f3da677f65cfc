"""A module's own forward as a graph in which every child is a leaf; refused, with a reason, where the graph might be wrong.

The forward runs once on a stand-in for ``self`` and a proxy for the input, so nothing global is patched and the module
is not touched. The stand-in gives access only to what cannot change unseen: children (only to be called), plain constants
of the instance, parameters, methods. A forward from a library that is not known to trace may also name, in its code, only
those and the pure functions listed here: one that counts, prints or draws a number would lose its effect.
Where only that matters (``read``), a forward may also look into its children and call their methods.
"""

import dis
import inspect
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastres.errors import is_out_of_memory
from fastres.nn._plain import original_class

_TRUSTED = (
    "torchvision.models.resnet",
    "torchvision.models.vgg",
    "torchvision.models._utils",
    "torchvision.models.segmentation",
    "torchvision.models.detection.backbone_utils",
    "torchvision.ops.feature_pyramid_network",
    "torchvision.ops.misc",
    "timm.models.",
    "timm.layers.",
    "torch.nn.",
    "fastres.",
)
Mappings = list[tuple[dict[Any, Any], dict[Any, Any]]]  # dicts that a forward read, each with a copy of what it then held
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_BUILTIN_WORDS = "len range int float bool str isinstance tuple list dict zip enumerate reversed min max sum abs super"
_BUILTINS = frozenset(_BUILTIN_WORDS.split())
_PURE_WORDS = """
    nn functional relu relu_ add add_ mul mul_ sub div cat concat flatten reshape view size shape dim ndim
    mean sum max amax contiguous permute transpose unsqueeze squeeze chunk split stack expand expand_as
    sigmoid tanh softmax log_softmax gelu silu elu leaky_relu hardtanh relu6 pad dropout dropout2d
    interpolate avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d append
    insert extend items keys values get
"""
_PURE = frozenset(_PURE_WORDS.split())
_IMPURE_WORDS = "no_grad enable_grad inference_mode set_grad_enabled autocast random rand randn manual_seed"
_IMPURE = frozenset(_IMPURE_WORDS.split())
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul")


class CannotTrace(Exception):
    """Why a forward has no trustworthy graph."""


class _Value(fx.Proxy):
    """A proxy that records ``x += y`` as what it is: fx alone would record ``x + y`` and lose the write."""


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(_Value, f"__i{_name}__", _in_place(f"i{_name}"))


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Records calls; remembers the first refusal, so that a bare ``except`` in a forward cannot swallow it."""

    refusal: str | None = None
    owner: fx.Proxy

    def __init__(self, graph: fx.Graph, inside: bool) -> None:
        super().__init__(graph)
        self.inside = inside  # whether the forward may look into its children
        self.mappings: Mappings = []

    def read(self, mapping: dict[Any, Any]) -> Mapping[Any, Any]:
        """A dict that the forward may look into, but not write to."""
        self.mappings.append((mapping, dict(mapping)))
        return types.MappingProxyType(mapping)

    def refuse(self, reason: str) -> CannotTrace:
        self.refusal = self.refusal or reason
        return CannotTrace(reason)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.refuse("its forward branches on a value of the input")

    def iter(self, obj: fx.Proxy) -> Any:
        raise self.refuse("its forward iterates over a tensor")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Child | _Self | torch.Tensor | nn.Module):
            raise self.refuse(f"its forward hands a {type(a).__name__} to a function")
        return super().create_arg(a)


class _Child:
    """A child module as its parent's forward may see it: to be called, or compared with None."""

    def __init__(self, name: str, module: nn.Module, tracer: _Tracer) -> None:
        self.__dict__.update(_name=name, _module=module, _tracer=tracer)

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_module", self._name, args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance() asks for it
        return type(self._module)

    def __bool__(self) -> bool:
        return bool(self._module)

    def __getattr__(self, name: str) -> Any:
        module, tracer = self._module, self._tracer
        if not tracer.inside:
            raise tracer.refuse(f"its forward reads {self._name}.{name}")
        return getattr(_Self(module, original_class(module), module.training, tracer.owner, tracer), name)

    def __iter__(self) -> Any:
        return iter(self._children("iterates over"))

    def __getitem__(self, index: Any) -> Any:
        return self._children("indexes")[index]

    def __len__(self) -> int:
        return len(self._children("counts"))

    def _children(self, does: str) -> Any:
        """Those of a container, in a list or in a dict."""
        module, tracer = self._module, self._tracer
        if not tracer.inside or not isinstance(module, _CONTAINERS):
            raise tracer.refuse(f"its forward {does} {self._name}, which may change unseen")
        found = {key: None if child is None else _Child(key, child, tracer) for key, child in module._modules.items()}
        return found if isinstance(module, nn.ModuleDict) else list(found.values())


class _Self:
    """What a forward gets for ``self``."""

    def __init__(self, module: nn.Module, base: type, training: bool, owner: fx.Proxy, tracer: _Tracer) -> None:
        object.__setattr__(self, "_fastres_parts", (module, base, owner, tracer))
        object.__setattr__(self, "_fastres_training", training)

    def __getattribute__(self, name: str) -> Any:
        module, base, owner, tracer = object.__getattribute__(self, "_fastres_parts")
        if name == "__class__":  # super() and isinstance() ask for it
            return base
        if name == "training":
            return object.__getattribute__(self, "_fastres_training")
        state = module.__dict__
        if name == "_modules" and isinstance(module, nn.ModuleDict):
            children = tracer.read(state["_modules"]).items()
            found = {key: None if child is None else _Child(key, child, tracer) for key, child in children}
            return types.MappingProxyType(found)
        if name in state["_modules"]:
            child = state["_modules"][name]
            return None if child is None else _Child(name, child, tracer)
        for kind in ("_parameters", "_buffers"):
            if name in state[kind]:
                value = state[kind][name]
                return None if value is None else tracer.create_proxy("call_function", getattr, (owner, name), {})
        if name in state:
            return _constant(name, state[name], tracer)
        return _class_attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise object.__getattribute__(self, "_fastres_parts")[3].refuse(f"its forward sets {name}")

    def __iter__(self) -> Any:
        module, _, _, tracer = object.__getattribute__(self, "_fastres_parts")
        if not isinstance(module, nn.Sequential):
            raise tracer.refuse("its forward iterates over itself")
        return iter([_Child(name, child, tracer) for name, child in module._modules.items()])


def _constant(name: str, value: Any, tracer: _Tracer) -> Any:
    if "checkpoint" in name and value:
        raise tracer.refuse("it checkpoints its activations")
    plain = isinstance(value, _CONSTANTS)
    plain = plain or (type(value) in (tuple, torch.Size) and all(isinstance(item, _CONSTANTS) for item in value))
    if plain or value is F.relu or value is torch.relu:
        return value
    if is_plain_mapping(value):
        return tracer.read(value)
    raise tracer.refuse(f"its forward reads {name}, a {type(value).__name__} that may change unseen")


def is_plain_mapping(value: Any) -> bool:
    """Whether a dict holds constants alone."""
    return type(value) is dict and all(isinstance(item, _CONSTANTS) for item in (*value, *value.values()))


def _class_attribute(stand_in: _Self, name: str) -> Any:
    module, base, _, tracer = object.__getattribute__(stand_in, "_fastres_parts")
    value = inspect.getattr_static(base, name, None)
    if isinstance(value, types.FunctionType) and getattr(nn.Module, name, None) is not value:
        _check_code(module, base, value, tracer)
        return types.MethodType(value, stand_in)
    if isinstance(value, _CONSTANTS) and value is not None:
        return value
    if isinstance(value, property) and value.fget is not None and is_trusted(value.fget):
        return value.fget(stand_in)
    raise tracer.refuse(f"its forward uses self.{name}")


def is_trusted(function: Callable[..., Any]) -> bool:
    """Whether a function is from a library whose modules are known to trace."""
    return f"{function.__module__}.".startswith(_TRUSTED)


def _check_code(module: nn.Module, base: type, function: types.FunctionType, tracer: _Tracer) -> None:
    """Refuse a function whose code names what the trace could not keep."""
    if set(function.__code__.co_freevars) - {"__class__"} or hasattr(function, "__wrapped__"):
        raise tracer.refuse(f"{function.__qualname__} is decorated or closes over variables")
    attributes, names = _names(function.__code__)
    if is_trusted(function):
        impure = attributes & _IMPURE
        if impure:
            raise tracer.refuse(f"its forward uses {min(impure)}")
        return
    own = module.__dict__.keys() | module._modules.keys() | module._parameters.keys() | module._buffers.keys()
    if tracer.inside:  # children's names, and what their classes define
        kinds = {kind for child in module.modules() for kind in type(child).__mro__ if issubclass(kind, nn.Module)}
        own |= {key for child in module.modules() for key in child._modules}
        own |= {key for kind in kinds - {nn.Module} for key in vars(kind)}
    # The stand-in judges what is read from self.
    unknown = {name for name in attributes - _PURE - own if not hasattr(base, name)}
    unknown |= {name for name in names if not _is_pure(name, function.__globals__, base)}
    if unknown:
        raise tracer.refuse(f"its forward uses {', '.join(sorted(unknown))}, whose effects a graph may not keep")


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The attributes a function's code touches, and the global names it reads or writes."""
    attributes, names = set(), set()
    for instruction in dis.get_instructions(code):
        kind = instruction.opname
        if "GLOBAL" in kind or "IMPORT" in kind:
            names.add(instruction.argval)
        elif "ATTR" in kind or "METHOD" in kind:
            attributes.add(instruction.argval)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner = _names(const)
            attributes, names = attributes | inner[0], names | inner[1]
    return attributes, names


def _is_pure(name: str, scope: dict[str, Any], base: type) -> bool:
    if name not in scope:
        return name in _BUILTINS
    value = scope[name]
    if isinstance(value, type) and value is not OrderedDict:
        return issubclass(base, value)  # super(Block, self)
    return any(value is known for known in (torch, F, nn, operator, OrderedDict)) or (
        name in _PURE and any(value is getattr(library, name, None) for library in (torch, F))
    )


def _input_name(forward: Callable[..., Any]) -> str:
    """The one argument a plan takes; further ones must have defaults, with which the forward is traced."""
    _, *parameters = inspect.signature(forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if not parameters or required != parameters[:1] or parameters[0].kind is parameters[0].VAR_POSITIONAL:
        raise CannotTrace("its forward does not take exactly one input")
    return parameters[0].name


def read(module: nn.Module, base: Any, training: bool) -> fx.Graph:
    """The calls of ``base.forward`` on this module, of its children and of theirs.

    Raises:
        CannotTrace: as below; the forward might have effects.
    """
    return _traced(module, base, training, True)[0]


def trace(module: nn.Module, base: Any, training: bool) -> tuple[fx.Graph, Mappings]:
    """The graph of ``base.forward`` on this module, in training or in evaluation, and the dicts that it was read with.

    The first placeholder is the module itself, the second its input; children appear as ``call_module`` nodes.

    Raises:
        CannotTrace: with the reason in one sentence.
    """
    return _traced(module, base, training, False)


def _traced(module: nn.Module, base: Any, training: bool, inside: bool) -> tuple[fx.Graph, Mappings]:
    forward = base.forward
    if not isinstance(forward, types.FunctionType):
        raise CannotTrace("its forward is not a Python function")
    graph = fx.Graph()
    tracer = _Tracer(graph, inside)
    _check_code(module, base, forward, tracer)
    owner = tracer.owner = tracer.create_proxy("placeholder", "owner", (), {})
    x = tracer.create_proxy("placeholder", _input_name(forward), (), {})
    stand_in = _Self(module, base, training, owner, tracer)
    try:
        result = forward(stand_in, x)
        if type(result) is OrderedDict:  # of which fx would make a dict
            result = tracer.create_proxy("call_function", OrderedDict, (list(result.items()),), {})
        result = tracer.create_arg(result)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = str(error).split("\n")[0]
        reason = tracer.refusal or f"its forward cannot be traced: {type(error).__name__}: {text}"
        raise CannotTrace(reason) from error
    if tracer.refusal is not None:
        raise CannotTrace(tracer.refusal)
    graph.output(result)
    return graph, tracer.mappings
