"""The graph of a forward rewritten into fused steps over the same children, and compiled to Python by torch.fx.

Found, wherever the values in between have no other use: conv-bn, conv-bn-relu, conv-bn-add, conv-bn-add-relu, bn-relu,
bn-add-relu, add-relu, conv-bn-relu-maxpool; and conv-bn-add-relu with a shortcut that ends with conv-bn: in training one step
with the shortcut's batch norm, in evaluation one that asks for a kernel of both convolutions.
A step reads its modules at every call and falls back to calling them one by one (``fastres.nn._fused``), so a plan only has to
be right about how values flow. ``nn.Identity`` is skipped.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastres.nn import _fused, _sequence
from fastres.nn._plain import is_norm_act, kind_of, own_act
from fastres.optimize.trace import CannotTrace, Mappings, trace

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_READ_ONLY = (nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
_FRESH = (nn.Conv2d, nn.BatchNorm2d)
_STEPS = (_fused.conv_bn_act, _fused.bn_act, _fused.add_act, _sequence.conv_bn_add_act)
Node = Any  # fx.Node: torch types its arguments so widely that nothing follows


@dataclass(frozen=True)
class Step:
    """One fused step: the op's name, the children it covers (an activation may be functional: ``"relu"``)."""

    op: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A residual block, by the names of its children: convolution, batch norm and activation ("" for a function) of each
    layer, and the shortcut, None for the identity."""

    layers: tuple[tuple[str, str, str], ...]
    downsample: str | None

    def parts(self, module: nn.Module) -> Any:
        """The children, as ``fastres.nn`` runs a block."""
        found = module._modules
        layers: list[Any] = [
            (found[conv], found[bn], child_at(module, act) if act else "relu") for conv, bn, act in self.layers
        ]
        return layers, None if self.downsample is None else found[self.downsample]

    def run(self, _: None, module: nn.Module, x: Any) -> Any:
        """The steps, checking the modules once for all of them."""
        layers, downsample = self.parts(module)
        return _sequence.block(module, layers, x, downsample)


@dataclass
class Plan:
    """What a module's forward became: ``run(None, module, x)``, or why there is nothing to run."""

    run: Callable[..., Any] | None = None
    steps: list[Step] = field(default_factory=list)
    reason: str | None = None
    graph: fx.GraphModule | None = None
    identities: tuple[nn.Module, ...] = ()
    readable: bool = True  # whether the forward could be traced at all
    rejoined: bool = False  # whether a view became a reshape, so that channels_last values pass
    block: Block | None = None
    mappings: Mappings = field(default_factory=list)


def plan(module: nn.Module, base: Any, training: bool) -> Plan:
    """Plan ``base.forward`` on this module in one mode; never raises, ``reason`` says what prevented a plan."""
    try:
        graph, mappings = trace(module, base, training)
    except CannotTrace as error:
        return Plan(reason=str(error), readable=False)
    rewriting = _Rewriting(module, graph, training)
    steps = rewriting.fuse()
    rejoined = _reshape(graph)
    if not steps and not rejoined:
        return Plan(reason="it holds no sequence of layers that can be fused")
    identities = rewriting.pass_identities()
    block = _block(graph, rewriting) if training else None
    _read_children_from_owner(graph)
    compiled = fx.GraphModule(nn.Module(), graph, "Plan")
    run = type(compiled).forward if block is None else block.run
    return Plan(run, steps, None, compiled, identities, rejoined=rejoined, block=block, mappings=mappings)


def _block(graph: fx.Graph, rewriting: "_Rewriting") -> Block | None:
    """The residual block that these steps form: consecutive layers, with x or its projection added in the last; else None."""
    _, x, *steps = [node for node in graph.nodes if node.op not in ("get_attr", "output")]
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    layers: list[tuple[str, str, str]] = []
    value, added, downsample = x, x, None
    for step in steps:
        if step.op == "call_module" and step.args == (x,) and added is x:
            if step is not steps[-2] and not rewriting.only_reads(step):
                return None  # a block calls it last
            added, downsample = step, step.target
            continue
        if step.target not in (_fused.conv_bn_act, _sequence.conv_bn_add_act):
            return None
        conv, bn, act, source, *rest = step.args
        if source is not value or act is None or (step is not result and rest != [None]):
            return None
        layers.append((conv.target, bn.target, act.target if _is_node(act) else ""))
        value = step
    if value is not result or value is x:
        return None
    if value.target is _sequence.conv_bn_add_act:
        projection, source = rest
        return Block(tuple(layers), projection.target) if source is x and added is x else None
    return Block(tuple(layers), downsample) if rest == [added] else None


def child_at(module: Any, path: str) -> Any:
    """The module at a path such as ``bn.act``; None where there is none."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A child called as itself."""
    return module(*args, **kwargs)


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


class _Rewriting:
    """One graph being rewritten."""

    def __init__(self, module: nn.Module, graph: fx.Graph, training: bool) -> None:
        self.module, self.graph, self.training = module, graph, training
        self.acts = self.show_acts()
        self.position = {node: index for index, node in enumerate(graph.nodes)}

    def show_acts(self) -> dict[Node, Node]:
        """Let a ReLU that a batch norm applies itself stand behind it as a call of its own: those calls, by the norm's."""
        acts = {}
        for node in list(self.graph.nodes):
            norm = child_at(self.module, node.target) if self.calls(node) else None
            if is_norm_act(norm) and type(own_act(norm)) is nn.ReLU:
                with self.graph.inserting_after(node):
                    act = self.graph.create_node("call_module", f"{node.target}.act")
                node.replace_all_uses_with(act)
                act.args = (node,)
                acts[node] = act
        return acts

    def calls(self, node: Any) -> bool:
        """Whether a node calls a child with one value."""
        return _is_node(node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs

    def kind(self, node: Any) -> type | None:
        """Exact type of the child a node calls with one value, or None."""
        if not self.calls(node):
            return None
        return nn.BatchNorm2d if node in self.acts else kind_of(child_at(self.module, node.target))

    def is_relu(self, node: Node) -> bool:
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS and not set(node.kwargs) - {"inplace"} and len(node.args) == 1
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and len(node.args) == 1
        return self.kind(node) is nn.ReLU

    def is_add(self, node: Node) -> bool:
        if node.op == "call_method" and node.target not in ("add", "add_", "__add__", "__iadd__"):
            return False
        if node.op not in ("call_method", "call_function") or node.kwargs or len(node.args) != 2:
            return False
        if node.op == "call_function" and node.target not in _ADD_FUNCTIONS:
            return False
        return all(_is_node(arg) for arg in node.args) and node.args[0] is not node.args[1]

    def writes(self, node: Node) -> bool:
        """Whether an addition writes into its first operand."""
        return node.target in (operator.iadd, "add_", "__iadd__")

    def next(self, node: Node) -> Node | None:
        """The one user of a value, past identities; None where it has several or is returned."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            if self.kind(node) is not nn.Identity:
                return None if node.op == "output" else node
        return None

    def source(self, node: Any) -> Any:
        """Where a value comes from, past identities that nothing else reads."""
        while self.kind(node) is nn.Identity and len(node.users) == 1:
            node = node.args[0]
        return node

    def is_private(self, node: Node) -> bool:
        """Whether only this value's one user can see it: writing into it, or later reading it, changes nothing else."""
        if len(node.users) != 1 or node.op in ("placeholder", "get_attr"):
            return False
        if self.kind(node) in _FRESH or node.target in _STEPS:
            return True
        return all(self.is_private(source) for source in node.all_input_nodes)

    def only_reads(self, node: Node) -> bool:
        """Whether a step leaves its inputs as they are."""
        if node.target in _STEPS:
            return True
        if node.op != "call_module":
            return False
        todo = [child_at(self.module, node.target)]
        while todo:
            child = todo.pop()
            if isinstance(child, nn.Sequential):
                todo += child.children()
            elif not (kind_of(child) in _READ_ONLY or (type(child) is nn.ReLU and not child.inplace)):
                return False
        return True

    def fuse(self) -> list[Step]:
        steps = []
        for node in list(self.graph.nodes):
            if self.kind(node) is nn.BatchNorm2d:
                step = self.fuse_from_bn(node)
            elif self.is_add(node):
                step = self.fuse_add(node)
            else:
                continue
            steps += [step] if step is not None else []
        for node, act in self.acts.items():
            if act in self.position and node in self.position:  # no step covers them: the norm's call is enough
                act.replace_all_uses_with(node)
                self.graph.erase_node(act)
        return steps

    def fuse_from_bn(self, bn: Node) -> Step | None:
        before, chain, residual, act, pool = self.source(bn.args[0]), [bn], None, None, None
        conv = before if self.kind(before) is nn.Conv2d and len(before.users) == 1 else None
        after = self.next(bn)
        if after is not None and self.is_add(after):
            residual = self.other_operand(after, bn)
            if residual is not None:
                chain.append(after)
                after = self.next(after)
        if after is not None and self.is_relu(after):
            act = after
            chain.append(after)
            after = self.next(after)
            if residual is None and after is not None and self.kind(after) is nn.MaxPool2d:
                pool = after
                chain.append(after)
        if conv is not None and not self.may_move(conv, chain):
            conv = None
        if conv is None and (act is None or not self.may_move(bn, chain)):
            return None
        return self.replace(conv, bn, act, pool, residual, chain)

    def other_operand(self, add: Node, bn: Node) -> Node | None:
        """The value added to bn's; None where the addition would write into a value that others see."""
        first, second = add.args
        if self.source(first) is bn:
            return second
        return None if self.writes(add) and not self.is_private(first) else first

    def may_move(self, first: Node, chain: list[Node]) -> bool:
        """Whether a step may run where its chain ends: nothing in between may write into what it reads first."""
        if all(self.is_private(source) for source in first.all_input_nodes):
            return True
        start, end = self.position[first], self.position[chain[-1]]
        between = [node for node, index in self.position.items() if start < index < end]
        between = [node for node in between if node not in chain and self.kind(node) is not nn.Identity]
        return all(self.only_reads(node) for node in between)

    def projection(self, residual: Any, chain: list[Node]) -> Node | None:
        """The call of a shortcut whose end may join the addition: nothing else reads its value."""
        call = self.source(residual)
        if self.kind(call) is None or len(call.users) != 1:
            return None
        if _sequence.projection(child_at(self.module, call.target)) is None or not self.only_reads(call):
            return None
        return call if self.may_move(call, chain) else None

    def replace(self, conv: Any, bn: Node, act: Any, pool: Any, residual: Any, chain: list[Node]) -> Step:
        """Put one step where the chain ends."""
        x = (conv or bn).args[0]
        activation = None if act is None else act if act.op == "call_module" else "relu"
        function: Any
        args: tuple[Any, ...]
        if pool is not None and conv is not None:
            op, function, args = "conv_bn_act_maxpool", _sequence.conv_bn_act_maxpool, (conv, bn, activation, pool, x)
        elif pool is not None:
            op, function, args = "bn_act_maxpool", _fused.bn_act_maxpool, (bn, activation, pool, x)
        elif conv is not None and (call := self.projection(residual, chain)) is not None:
            op = "conv_bn_add_bn_act" if self.training else "conv_bn_add_act"
            function = _sequence.conv_bn_add_act
            args = (conv, bn, activation, x, call, call.args[0])
            covered, gone = [conv, bn, activation, call], [conv, call, *chain]
            return self.put(op, function, args, [node for node in covered if node is not None], gone)
        elif conv is not None:
            op = "conv_bn_act" if residual is None else "conv_bn_add_act"
            function, args = _fused.conv_bn_act, (conv, bn, activation, x, residual)
        else:
            op = "bn_act" if residual is None else "bn_add_act"
            function, args = _fused.bn_act, (bn, activation, x, residual)
        covered = [node for node in (conv, bn, activation, pool) if node is not None]
        return self.put(op, function, args, covered, [*([conv] if conv else []), *chain])

    def fuse_add(self, add: Node) -> Step | None:
        act = self.next(add)
        if act is None or not self.is_relu(act) or (self.writes(add) and not self.is_private(add.args[0])):
            return None
        if not self.may_move(add, [add, act]):
            return None
        activation = act if act.op == "call_module" else "relu"
        return self.put("add_act", _fused.add_act, (activation, *add.args), [activation], [add, act])

    def put(
        self, op: str, function: Callable[..., Any], args: tuple[Any, ...], covered: list[Any], gone: list[Node]
    ) -> Step:
        """Replace the nodes ``gone`` by one call; a covered module stands in args by the node that called it."""
        end = gone[-1]
        with self.graph.inserting_before(end):
            children = {node: self.child(node.target) for node in covered if _is_node(node)}
            node = self.graph.call_function(function, tuple(children.get(arg, arg) for arg in args))
        step = Step(op, tuple(node.target if _is_node(node) else node for node in covered))
        node.meta["step"] = step
        self.position[node] = self.position[end]
        end.replace_all_uses_with(node)
        for old in reversed(gone):
            while old.users:  # identities in between
                identity = next(iter(old.users))
                identity.replace_all_uses_with(old)
                self.graph.erase_node(identity)
            self.graph.erase_node(old)
            self.position.pop(old)
        return step

    def child(self, name: str) -> Node:
        """A child as a value; ``_read_children_from_owner`` says later where it is read from."""
        return self.graph.create_node("get_attr", name)

    def pass_identities(self) -> tuple[nn.Module, ...]:
        """Drop the remaining identities; returns all there were, to be looked at for hooks."""
        for node in list(self.graph.nodes):
            if self.kind(node) is nn.Identity:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        children = self.module._modules.values()
        return tuple(child for child in children if type(child) is nn.Identity)


def _reshape(graph: fx.Graph) -> bool:
    """``x.view(...)`` becomes ``x.reshape(...)``: the same values, also where x is channels_last."""
    found = [node for node in graph.nodes if node.op == "call_method" and node.target == "view"]
    for node in found:
        node.target = "reshape"
    return bool(found)


def _read_children_from_owner(graph: fx.Graph) -> None:
    """Read children from ``owner._modules`` at every call: always current, without nn.Module's slow attribute lookup."""
    owner, first = list(graph.nodes)[:2]
    with graph.inserting_after(first):
        children = graph.call_function(getattr, (owner, "_modules"))
    for node in list(graph.nodes):
        if node.op in ("call_module", "get_attr"):
            with graph.inserting_before(node):
                first, *inner = node.target.split(".")
                child = graph.call_function(operator.getitem, (children, first))
                for name in inner:
                    child = graph.call_function(operator.getitem, (graph.call_function(getattr, (child, "_modules")), name))
                new = child if node.op == "get_attr" else graph.call_function(call, (child, *node.args), node.kwargs)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
