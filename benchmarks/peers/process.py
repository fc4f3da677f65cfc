"""The handle of a process that measures: started once, and told over a pipe when to go on."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import benchmarks

PATIENCE_S = 1200.0  # for one answer: compiling a deep network takes minutes


class Died(Exception):
    """The process ended, or was ended, without the answer; the text says how."""


class Process:
    """``python -m module order``, with its own number of threads, pinned or not."""

    def __init__(self, module: str, order: dict[str, Any], *, threads: int, pinned: bool) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_PROC_BIND": str(pinned).lower(),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(benchmarks.ROOT), *sys.path])),
        }
        command = [sys.executable, "-m", module, json.dumps(order)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        with _all_cores():
            self._child = subprocess.Popen(command, env=variables, cwd=benchmarks.ROOT, text=True, **pipes)

    def answer(self, patience: float = PATIENCE_S) -> dict[str, Any]:
        """The next line it writes.

        Raises:
            Died: it ended, or stayed silent for longer than that and was ended.
        """
        assert self._child.stdout is not None
        if not select.select([self._child.stdout], [], [], patience)[0]:
            self.close()
            raise Died(f"no answer in {patience:.0f} s")
        line = self._child.stdout.readline()
        if not line:
            raise Died(self._last_words())
        return json.loads(line)

    def ask(self, patience: float = PATIENCE_S, line: str = "") -> dict[str, Any]:
        """Send it one line, which makes it go on, and wait for its answer."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(f"{line}\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise Died(self._last_words()) from None
        return self.answer(patience)

    def close(self) -> None:
        """End it, whatever it does."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_words(self) -> str:
        code = self._child.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process ended ({how}){': ' if said else ''}{said[-200:]}"


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let a child use every core that this process had: a pinned process would pass on only its own."""
    if not benchmarks.CORES:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, benchmarks.CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
