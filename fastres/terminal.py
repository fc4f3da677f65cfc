"""What the command line shows people: progress on stderr, tables and plots from the optional packages."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any

from fastres.errors import UnsupportedError

PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # where the module's name is not the package's


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def need(what: str, *modules: str, extra: str = "demo") -> list[ModuleType]:
    """Import optional packages.

    Raises:
        UnsupportedError: some are not installed; names them and the command that installs them.
    """
    packages = dict.fromkeys(name.partition(".")[0] for name in modules)
    missing = [PACKAGES.get(name, name) for name in packages if not installed(name)]
    if missing:
        raise UnsupportedError(
            f"{what} needs {' and '.join(missing)}, not installed here (pip install fastres[{extra}])"
        )
    return [importlib.import_module(name) for name in modules]


def note(text: str) -> None:
    """Print a remark to stderr, beside the results on stdout."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Steps of long work on stderr: a progress bar on a terminal where rich is installed, else a line per step."""

    def __init__(self, title: str, total: int | None = None, *, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.quiet = title, total, 0, quiet
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stderr.isatty() and installed("rich"):
            progress, console = map(importlib.import_module, ("rich.progress", "rich.console"))
            columns = (
                progress.SpinnerColumn(),
                *progress.Progress.get_default_columns(),
                progress.TimeElapsedColumn(),
            )
            self._bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, text: str) -> None:
        """Begin the next step."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done - 1, description=f"{self.title}: {text}")
        elif not self.quiet:
            count = f"{self.done}/{self.total}" if self.total else str(self.done)
            print(f"{self.title} [{count}] {text}", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table on stdout; every column but the first is set flush right."""
    (tables, console, box) = need("a result table", "rich.table", "rich.console", "rich.box")
    drawn = tables.Table(title=title, caption=caption or None, box=box.SIMPLE_HEAVY, title_justify="left")
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        drawn.add_row(*row)
    wide = None if sys.stdout.isatty() else 140
    console.Console(width=wide, highlight=False).print(drawn)


def milliseconds(seconds: float | None) -> str:
    """A duration for a table, in milliseconds with three significant digits."""
    return "–" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
