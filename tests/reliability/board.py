"""The scoreboard: classes of cases, and what became of each case."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

_SHOWN = 20  # failures kept of a class


class Found(BaseException):
    """The first failure of a tally that looks for no more; no Exception, which a case would count as another one."""


@dataclass
class Tally:
    """Cases tried, and those that failed with what they said; ``one``: the first failure ends it, by raising ``Found``."""

    tried: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    one: bool = False

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One case: it fails where its body raises."""
        self.tried += 1
        try:
            yield
        except Exception as error:  # of whatever type: that is what is counted
            self.fail(f"{name}: {type(error).__name__}: {error}")

    def fail(self, text: str) -> None:
        self.failed += 1
        if len(self.failures) < _SHOWN:
            self.failures.append(" ".join(text.split())[:1000])
        if self.one:
            raise Found

    def note(self, text: str) -> None:
        """Something that this machine could not try: shown beside the class."""
        self.notes.append(text)

    def fuzz(self, strategy: Any, judge: Callable[[Any], None], count: int) -> None:
        """``count`` cases of a hypothesis strategy; of those that fail the smallest that hypothesis finds is told."""
        tried, phases = 0, (Phase.generate,) if self.one else (Phase.generate, Phase.shrink)

        @hypothesis.seed(0)
        @hypothesis.settings(
            max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=phases, report_multiple_bugs=False, print_blob=False,
        )  # fmt: skip
        @hypothesis.given(strategy)
        def each(case: Any) -> None:
            nonlocal tried
            try:
                judge(case)
            except hypothesis.errors.UnsatisfiedAssumption:
                raise
            except Exception as error:
                raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
            tried += 1

        try:
            each()
        except AssertionError as error:
            self.fail(str(error))
        self.tried += min(tried, count) + (self.failed > 0)


@dataclass(frozen=True)
class Class:
    """One row of the scoreboard: how many cases each profile asks for, at least."""

    code: str
    title: str
    full: int
    short: int
    tries: Callable[[Tally, int], None]


@dataclass
class Result:
    """What became of a class: ``wanted`` cases or more had to be tried, but for what the notes say was not run."""

    code: str
    title: str
    wanted: int
    tried: int
    failed: int
    seconds: float
    failures: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failed and (self.tried >= self.wanted or bool(self.notes))


CLASSES: dict[str, Class] = {}


def scored(code: str, title: str, full: int, short: int) -> Callable:
    """Enter a function ``tries(tally, count)`` as a class."""

    def enter(tries: Callable[[Tally, int], None]) -> Callable[[Tally, int], None]:
        CLASSES[code] = Class(code, title, full, short, tries)
        return tries

    return enter


def run(code: str, profile: str) -> Result:
    """Try one class."""
    found, tally, start = CLASSES[code], Tally(), time.perf_counter()
    wanted = found.full if profile == "full" else found.short
    try:
        found.tries(tally, wanted)
    except Exception as error:  # the class itself broke off
        tally.fail(f"broke off: {type(error).__name__}: {error}")
    seconds = round(time.perf_counter() - start, 1)
    return Result(code, found.title, wanted, tally.tried, tally.failed, seconds, tally.failures, tally.notes)
