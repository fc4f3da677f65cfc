"""``explain``: which kernel runs where in a model, or why a module was left alone; which backend one call gets."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.dispatch import Choice
from fastres.errors import ArgumentError, UnsupportedError, must, must_type
from fastres.frozen import Frozen
from fastres.frozen import report as frozen_report
from fastres.kernels import native
from fastres.nn import _fused
from fastres.nn._plain import is_fusible_norm, trains, why_not
from fastres.ops import REGISTRY, _conv_cpu
from fastres.ops._conv_choice import KERNELS
from fastres.ops._node import why_not_recorded
from fastres.ops._patterns import ConvNormPairs, PrecedingConv, ProjectedEnds
from fastres.ops.conv_bn_add_conv_bn_act import CONV_BN_ADD_CONV_BN_ACT
from fastres.ops.conv_statistics import CONV_STATISTICS
from fastres.optimize.plan import Plan, Step, child_at
from fastres.optimize.sites import Site, follows_layout, matches, sites, unwrap
from fastres.optimize.swap import state_of
from fastres.optimize.verify import copied, unseen_randomness
from fastres.optimize.whole import STATE, Whole

_UNSEEN = {"fusable": "fastres.optimize(model) would fuse it", "skipped": "skipped by optimize(skip=...)"}


@dataclasses.dataclass
class StepReport:
    """One fused step: its op, the modules it covers, and the choices it led to on the example input, if any."""

    op: str
    modules: tuple[str, ...]
    choices: list[Choice] = dataclasses.field(default_factory=list)
    apart: str | None = None  # why a convolution and its shortcut's are not one product
    # In training, of each convolution before a batch norm: which kernel finds the statistics beside it, or why none does.
    statistics: list[str] = dataclasses.field(default_factory=list)
    called: str | None = None  # why its modules are called one by one instead

    def to_dict(self) -> dict[str, Any]:
        about = {"op": self.op, "modules": list(self.modules), "runs": [choice.to_dict() for choice in self.choices]}
        about |= {"statistics": list(self.statistics)} if self.statistics else {}
        about |= {} if self.called is None else {"called": self.called}
        return about if self.apart is None else {**about, "apart": self.apart}

    def __str__(self) -> str:
        runs = ", ".join(f"{choice.op}: {choice.backend.name}" for choice in self.choices)
        notes = [] if self.called is None else [f"not one op: {self.called}"]
        notes += [] if self.apart is None else [f"not {CONV_BN_ADD_CONV_BN_ACT.name}: {self.apart}"]
        about = "".join(f" ({note})" for note in [*notes, *dict.fromkeys(self.statistics)])
        if not self.modules:  # an op by itself, which is what runs
            return runs + about
        return f"{self.op}({', '.join(self.modules)})" + (f" -> {runs}" if runs else "") + about


@dataclasses.dataclass
class ModuleReport:
    """One module with layers of its own. ``status``: fused, fusable (not optimised yet), fastres (a fused block by
    itself), skipped or left; ``left`` tells of each norm layer outside any step why."""

    name: str
    type: str
    status: str
    steps: list[StepReport]
    left: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        own = {"module": self.name, "type": self.type, "status": self.status, "left": dict(self.left)}
        return {**own, "steps": [step.to_dict() for step in self.steps]}

    def __str__(self) -> str:
        hint = f" ({_UNSEEN[self.status]})" if self.status in _UNSEEN else ""
        lines = [f"{self.name or '(the model)'} [{self.type}]: {self.status}{hint}"]
        lines += [f"    {step}" for step in self.steps]
        lines += [f"    {name} left alone: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


@dataclasses.dataclass
class Report:
    """What runs where in a model: ``str()`` for people, ``to_dict()`` for programs."""

    model: str
    training: bool
    modules: list[ModuleReport]
    notes: list[str]
    verified: dict[str, float] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Steps by op, fused now; modules by status; norm layers left alone."""
        ops = Counter(step.op for module in self.modules if module.status == "fused" for step in module.steps)
        statuses = Counter(module.status for module in self.modules)
        return {**statuses, **ops, "norms_left_alone": sum(len(module.left) for module in self.modules)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "mode": "training" if self.training else "evaluation",
            "counts": self.counts,
            "notes": list(self.notes),
            "verified": self.verified,
            "modules": [module.to_dict() for module in self.modules],
        }

    def __str__(self) -> str:
        named = {what.replace("_", " "): count for what, count in self.counts.items()}
        counts = ", ".join(f"{count} {'fastres modules' if what == 'fastres' else what}" for what, count in named.items())
        head = [f"{self.model}, {'training' if self.training else 'evaluation'}: {counts}"]
        head += [f"note: {note}" for note in self.notes]
        return "\n".join([*head, *map(str, self.modules)])


def explain(target: nn.Module | str | Callable[..., Any], *args: Any) -> Report | Choice | frozen_report.PlanReport:
    """Tell which kernel runs where, and why.

    Args:
        target: a model; or an op's name (``"bn_act"``, with the op's arguments); or a function of
            ``fastres.functional`` (with its arguments).
        args: for a model, optionally an example input: a copy of the model runs on it, with autograd as it is now, and
            every step tells its backend. For a frozen network, optionally an input on which its steps are timed. For an
            op, the arguments of the call in question.

    Returns:
        For a model a ``Report``, for a frozen one a ``PlanReport``, for an op the dispatcher's ``Choice``; all have
        ``str()`` and ``to_dict()``.

    Raises:
        TypeError, ValueError: no such op, or arguments that the op refuses.
    """
    if isinstance(target, Frozen):
        return frozen_report.explain(target, *args)
    if isinstance(target, nn.Module):
        return _explain_model(unwrap(target, "explain"), args)
    if isinstance(target, str):
        if target not in REGISTRY:
            known = f"a module, a function of fastres.functional or one of {sorted(REGISTRY)}"
            raise must("explain", "target", known, repr(target))
        names = REGISTRY[target].parameters
        if len(args) != len(names):
            raise must("explain", "args", f"those of {target}: {', '.join(names)}", f"{len(args)} of them")
        return REGISTRY[target].explain(*args)
    if not callable(target):
        raise must_type("explain", "target", "a torch.nn.Module, an op's name or a function", target)
    return _explain_call(target, args)


class _Found(Exception):
    """Ends a call once its op is known, before it runs."""


@dataclasses.dataclass
class _Heard:
    """The choice for a call, why it does not do its shortcut's convolution too, and of the convolutions before its batch norms
    whether they find the statistics."""

    choice: Choice
    apart: str | None
    statistics: list[str]


_Seen = dict[tuple[str, Step | None], list[_Heard]]  # by module and step


class _Choices(TorchDispatchMode):
    """Sees every fastres op that runs, and tells ``on_choice`` of it."""

    def __init__(self, on_choice: Callable[[_Heard], None], training: bool = False) -> None:
        super().__init__()
        self.on_choice, self.ends, self.norms = on_choice, ProjectedEnds(), ConvNormPairs() if training else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = func.namespace == "fastres"
        if own:
            name = func._schema.name.removeprefix("fastres::")
            whole = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in args)
            end = self.ends.joined(name, whole)
            before = [] if self.norms is None else self.norms.before(name, whole)
            apart = None if end is None else _why_apart(end)
            statistics = [text for each in before if (text := _statistics(each))]
            self.on_choice(_Heard(REGISTRY[name].explain(*whole), apart, statistics))
        y = func(*args, **(kwargs or {}))
        if own:
            self.ends.made(name, whole, y)
        if self.norms is not None:
            self.norms.made(func, args, y)
        return y


def _why_apart(args: tuple[Any, ...]) -> str:
    """Why the end of a block ran as two convolutions."""
    try:
        choice = CONV_BN_ADD_CONV_BN_ACT.explain(*args)
    except (ArgumentError, UnsupportedError) as error:
        return str(error)
    if choice.backend.name != "torch":
        return "its caller runs its modules one by one"
    return "; ".join(f"{name}: {reason}" for name, reason in choice.refusals.items())


def _statistics(before: PrecedingConv) -> str | None:
    """Whether a convolution in training finds what the batch norm behind it asks of its output: by which kernel, or why not;
    None where all kernels are for another kind of device."""
    name = CONV_STATISTICS.name
    if before.bias is not None:
        return f"not {name}: the convolution has a bias"
    try:
        choice = CONV_STATISTICS.explain(*before.args)
    except (ArgumentError, UnsupportedError) as error:
        return f"not {name}: {error}"
    if before.found:
        return f"convolution and statistics in one kernel, {name}: {choice.backend.name}, {choice.source}"
    if choice.backend.name == "torch":
        elsewhere = f"the tensors are on {before.args[0].device.type}"
        reasons = [f"{backend}: {why}" for backend, why in choice.refusals.items() if not why.endswith(elsewhere)]
        return f"not {name}: {'; '.join(reasons)}" if reasons else None
    return f"not {name}: its caller runs its modules one by one, or recomputes in backward what they pass on"


def _explain_call(function: Callable[..., Any], args: tuple[Any, ...]) -> Choice:
    found: list[Choice] = []

    def first(heard: _Heard) -> None:
        found.append(heard.choice)
        raise _Found

    try:
        with _Choices(first):
            function(*args)
    except _Found:
        return found[0]
    raise must("explain", "target", "a function that runs a fastres op", getattr(function, "__name__", function))


def _explain_model(model: nn.Module, inputs: tuple[Any, ...]) -> Report:
    state = state_of(model)
    found = sites(model)
    seen, parts = _observe(model, inputs) if inputs else ({}, {})
    reports = [_module_report(site, seen) for site in found]
    for report in reports:
        if report.status == "fusable" and state is not None and matches(report.name, state.skip):
            report.status = "skipped"
    verified, notes = None if state is None else state.verified, _notes(model, found)
    if state is not None and inputs and not model.training:
        notes.append(_whole_note(model, state.whole, inputs[0], parts))
    return Report(type(model).__name__, model.training, reports, notes, verified)


def _whole_note(model: nn.Module, whole: Whole | None, x: Any, parts: dict[str, Tensor]) -> str:
    """The plan of a network, or why its modules run one by one, and which of them have plans."""
    reason = "some of them are skipped" if whole is None else whole.why_not(model, x)
    if reason is None:
        return "as long as nothing changes, the whole network runs as one native plan (fastres.freeze shows its steps)"
    planned: list[str] = []
    for name, given in parts.items():
        module, inside = model.get_submodule(name), any(name.startswith(f"{outer}.") for outer in planned)
        if not inside and vars(module)[STATE].whole.why_not(module, given) is None:
            planned.append(name)
    own = f"; these run as native plans of their own: {', '.join(planned)}" if planned else ""
    return f"the modules run one by one: {reason}{own}"


def _module_report(site: Site, seen: _Seen) -> ModuleReport:
    steps = []
    for step in site.steps:
        heard = seen.get((site.name, step), [])
        apart = next((each.apart for each in heard if each.apart is not None), None)
        statistics = [text for each in heard for text in each.statistics]
        called = why_not(*_layers(site.module, step))
        steps.append(StepReport(step.op, step.modules, [each.choice for each in heard], apart, statistics, called))
    own = seen.get((site.name, None), [])  # a block of fastres.nn: one entry an op
    steps += [StepReport(each.choice.op, (), [each.choice], each.apart, each.statistics) for each in own]
    return ModuleReport(site.name, type(site.module).__name__, site.status, steps, dict(site.left))


def _layers(module: nn.Module, step: Step) -> list[nn.Module | None]:
    """The modules that a step reads instead of calling them, those of a shortcut too."""
    children = [child_at(module, name) for name in step.modules]
    return [each for child in children for each in (child if isinstance(child, nn.Sequential) else [child])]


def _notes(model: nn.Module, found: list[Site]) -> list[str]:
    notes = []
    if model.training:
        own = "`conv: cpu`, `conv: cuda` or `conv_statistics`"
        notes.append(f"in training, convolutions run in PyTorch except where a step shows {own}")
        lacks = native.why_not(KERNELS["weight"][1]) or _conv_cpu.why_not_amx()
        if lacks is None and next(model.parameters()).device.type == "cpu":
            notes.append("in bfloat16 their weight gradients are computed by AMX, those of few pixels by vectors")
        notes += _one_node([module for module in model.modules() if is_fusible_norm(module)])
        notes += [f"kernel calls are not recorded but come from Python every time: {reason}" for reason in why_not_recorded()]
        recomputing = sum(_fused.RECOMPUTES in module.__dict__ for module in model.modules())
        if recomputing:
            notes.append(f"memory='low': {recomputing} blocks run op by op and recompute batch norms' outputs in backward")
    elif torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        notes.append("autograd is on: convolutions run as in training; batch norm folds under torch.inference_mode()")
    state = state_of(model)
    if state is not None and any(site.status in ("fused", "fastres") for site in found):
        if state.channels_last:
            notes.append("inputs are brought to channels_last")
        else:
            reason = follows_layout(model)
            notes.append("inputs keep their memory format" + (f": {reason}" if reason else ""))
    return notes


def _one_node(norms: list[nn.Module]) -> list[str]:
    """In training, whether blocks are one node of autograd: those whose batch norms all train."""
    if not any(map(trains, norms)):
        return []
    most = f"on a CPU those of inputs of up to {_fused.MOST_IN_ONE_NODE} values"
    but = "" if all(map(trains, norms)) else "; blocks with a frozen norm, or one in evaluation, run op by op"
    return [f"the layers of a block are one autograd node ({most}), whose kernel calls are recorded once{but}"]


class _Asked:
    """Stands in for a submodule's plan and records its input."""

    def __init__(self, name: str, inputs: dict[str, Tensor]) -> None:
        self.name, self.inputs = name, inputs

    def run(self, _: nn.Module, x: Tensor, __: bool) -> None:
        self.inputs.setdefault(self.name, x.detach().clone())


def _observe(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[_Seen, dict[str, Tensor]]:
    """The choices of each module's steps when a copy of the model runs on inputs, and the inputs of parts with plans."""
    seen: _Seen = {}
    parts: dict[str, Tensor] = {}
    where: list[tuple[str, Step | None]] = []
    subject = copied(model, "explain", "give no input")
    for name, module in subject.named_modules():
        state = state_of(module)
        if name and state is not None and state.whole is not None:
            state.whole = _Asked(name, parts)  # type: ignore[assignment]
        if type(module).__module__.startswith("fastres."):
            module.register_forward_pre_hook(lambda *_, name=name: where.append((name, None)))
            module.register_forward_hook(lambda *_: where.pop() and None, always_call=True)
        elif state is not None:
            state.training = _observed(state.training, name, where)
            state.evaluation = _observed(state.evaluation, name, where)

    def heard(call: _Heard) -> None:
        if where:
            seen.setdefault(where[-1], []).append(call)

    with unseen_randomness(), _Choices(heard, model.training):
        subject(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    return seen, parts


def _observed(plan: Plan, name: str, where: list[Any]) -> Plan:
    """A plan that says, while it runs, which step it is at."""
    graph = plan.graph
    if graph is None:
        return plan

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with _at(where, (name, n.meta["step"])) if "step" in n.meta else _nowhere():
                return super().run_node(n)

    return dataclasses.replace(plan, run=lambda _, owner, x: Observer(graph).run(owner, x))


@contextmanager
def _at(where: list[Any], place: tuple[Any, ...]) -> Iterator[None]:
    where.append(place)
    try:
        yield
    finally:
        where.pop()


@contextmanager
def _nowhere() -> Iterator[None]:
    yield
