"""Which backend runs an op: forced choice > FASTRES_BACKEND > tuned entry > order on the op's page."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastres import env, tune
from fastres.errors import UnsupportedError

# Kernels on a GPU other than PyTorch's own: chosen by default only where they are validated on the device's architecture.
GPU_KERNELS = ("cuda", "cuda_wide", "cuda_cluster", "triton", "cudnn")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        why_not: ``why_not(*args)`` says in a sentence why it cannot run a call, or returns None.
        load: ``load()`` returns the function that runs it (imported or looked up only then); ``load(config)`` one bound
            to that configuration.
        configs: ``configs(*args)``, the configurations tuning may choose from for a call; None where there is only one.
        only_tuned: it can be slower than the others, so it is chosen only where tuning found it fastest, or where forced.
    """

    name: str
    why_not: Callable[..., str | None]
    load: Callable[..., Callable[..., Any]]
    configs: Callable[..., Sequence[tuple[Any, ...]]] | None = None
    only_tuned: bool = False


@dataclass(frozen=True)
class Choice:
    """The backend chosen for one call, what decided it, why each other one was passed over, and the tuned configuration."""

    op: str
    backend: Backend
    source: str
    refusals: dict[str, str] = field(default_factory=dict)
    config: tuple[Any, ...] | None = None

    def load(self) -> Callable[..., Any]:
        """The function that runs the call."""
        return self.backend.load() if self.config is None else self.backend.load(self.config)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend.name} ({self.source})"]
        lines += [f"  {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {"op": self.op, "backend": self.backend.name, "source": self.source, "refusals": dict(self.refusals)}


_forced: dict[str, str] = {}
_caches: list[dict[Any, Any]] = []
generation = 0  # of choices: counts how often they were forgotten
_known: dict[str, set[str]] = {}


def register(op: str, backends: Sequence[Backend], *caches: dict[Any, Any]) -> None:
    """Tell the dispatcher about an op, its backends, and its caches of choices, which are emptied when the rules change."""
    _known[op] = {backend.name for backend in backends}
    _caches.extend(caches)


def forgets(cache: dict[Any, Any]) -> dict[Any, Any]:
    """Have a cache of what choices led to emptied together with them; returns it."""
    _caches.append(cache)
    return cache


def forget() -> None:
    """Empty every cache of choices; the next call of each op chooses anew, from the environment and the files."""
    global generation
    generation += 1
    tune.forget()
    _is_forced_by_environment.cache_clear()
    for cache in _caches:
        cache.clear()


def family(op: str) -> str:
    """The op whose training and gradients an op serves."""
    return op.partition("_backward")[0].removesuffix("_train")


def _check_wishes(source: str, wishes: dict[str, Any]) -> dict[str, Any]:
    """Refuse names of unknown ops or backends, which would silently change nothing."""
    for op, name in wishes.items():
        names = set().union(*_known.values()) if op == "*" else _known.get(op)
        if names is None:
            raise ValueError(f"{source}: op must be one of {sorted(_known)}, got {op!r}")
        if name is not None and name not in names:
            of = "backend" if op == "*" else f"backend of {op}"
            raise ValueError(f"{source}: {of} must be one of {sorted(names)}, got {name!r}")
    return wishes


class use:
    """Force backends: ``fastres.use(bn_act="torch")``, or ``fastres.use("torch")`` for every op that has that backend.

    Takes effect at once; as a context manager it puts the former choice back. A name covers the op, its ``_train`` and
    its ``_backward`` ops that have the backend. A forced backend that cannot run a call raises ``fastres.UnsupportedError``
    with its reason. ``fastres.use(bn_act=None)`` lifts a forced choice. The setting holds for all threads of the process.

    Raises:
        ValueError: no such op, or the op has no such backend.
    """

    def __init__(self, backend: str | None = None, /, **ops: str | None) -> None:
        wishes = dict(ops) if backend is None else {"*": backend, **ops}
        _check_wishes("fastres.use", wishes)
        self._before = dict(_forced)
        for op, name in wishes.items():
            if name is None:
                _forced.pop(op, None)
            else:
                _forced[op] = name
        forget()

    def __enter__(self) -> "use":
        return self

    def __exit__(self, *exception: object) -> None:
        _forced.clear()
        _forced.update(self._before)
        forget()


def is_forced() -> bool:
    """Whether a backend is forced for any op, by ``use`` or the environment."""
    return bool(_forced) or _is_forced_by_environment()


@functools.cache
def _is_forced_by_environment() -> bool:
    """Until ``forget``."""
    return bool(env.forced_backend())


def wished(op: str, backends: Sequence[Backend]) -> tuple[str, str] | None:
    """The backend forced for op and what forced it; a wish for all ops, or for a family, skips ops without that backend."""
    names = [backend.name for backend in backends]
    environment = _check_wishes("FASTRES_BACKEND", env.forced_backend())
    for table, source in ((_forced, "forced by fastres.use"), (environment, "forced by FASTRES_BACKEND")):
        for entry in (op, family(op), "*"):
            if entry in table and (entry == op or table[entry] in names):
                return table[entry], source
    return None


def why_not_proven(op: str, backend: Backend, device: torch.device) -> str | None:
    """Why a kernel for GPUs is not chosen on a device, unless it is forced; None for all other backends."""
    reason = tune.why_not_validated(op, backend.name, device) if backend.name in GPU_KERNELS else None
    if reason is not None:
        tune.warn_if_none_is_validated(device)
    return reason


def choose(op: str, backends: Sequence[Backend], args: tuple[Any, ...]) -> Choice:
    """Choose the backend for one call.

    Raises:
        UnsupportedError: a forced backend does not exist or refuses these arguments; the text carries its reason.
    """
    by_name = {backend.name: backend for backend in backends}
    wish = wished(op, backends)
    if wish is not None:
        name, source = wish
        if name not in by_name:
            raise UnsupportedError(f"fastres.{op}: backend must be one of {list(by_name)}, got {name!r} ({source})")
        reason = by_name[name].why_not(*args)
        if reason is not None:
            raise UnsupportedError(f"fastres.{op}: backend {name!r} ({source}) cannot run this call: {reason}")
        others = {other: "another backend is forced" for other in by_name if other != name}
        return Choice(op, by_name[name], source, others)
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    refusals = {backend.name: backend.why_not(*args) or why_not_proven(op, backend, device) for backend in backends}
    tuned, config = tune.choice(op, args, device)
    if tuned is not None and tuned in by_name and refusals[tuned] is None:
        chosen, source, legal = tuned, "tuned", by_name[tuned].configs
    else:
        for backend in backends:
            if backend.only_tuned and refusals[backend.name] is None:
                refusals[backend.name] = "it is chosen only where it was measured to be the fastest (run `fastres tune`)"
        chosen, source, legal = next(name for name in by_name if refusals[name] is None), "order of preference", None
    reasons = {name: reason or f"{chosen} comes first" for name, reason in refusals.items() if name != chosen}
    if config is not None and (legal is None or config not in [tuple(candidate) for candidate in legal(*args)]):
        config = None
    return Choice(op, by_name[chosen], source, reasons, config)
