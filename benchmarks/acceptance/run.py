"""Tasks within a time limit, performed one after the other in a process of their own, which is restarted if it dies."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.acceptance.tasks import Task, label, missing
from benchmarks.peers.process import Died, Process
from fastres.experiments.compare import Row

START_S = 60.0  # for the process to import torch and find its device
LEAST_S = 3.0  # no task begins with less time left
OUT_OF_TIME = "out of time"


class Budget:
    """The seconds that are left, of the whole or of a share of it that ends earlier."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def share(self, part: float) -> "Budget":
        """A part of what is left now; whatever it leaves unused goes to the others."""
        return Budget(self.left() * part, self._clock)


def perform_all(
    tasks: Iterable[Task], budget: Budget, place: torch.device, module: str = "benchmarks.acceptance.worker", at_once: int = 1
) -> list[Row]:
    """The rows of all tasks, in their order; tasks for which there was no time, and tasks that killed their process, have
    rows that say so.

    Args:
        at_once: processes that perform them; more than one only where nothing is timed.
    """
    waiting, lock = iter(list(enumerate(tasks))), threading.Lock()
    found: dict[int, list[Row]] = {}

    def work() -> None:
        process: Process | None = None
        peaks: list[Task] = []  # a process that is started anew has to measure them again
        try:
            while True:
                with lock:
                    number, task = next(waiting, (0, None))
                if task is None:
                    return
                process, found[number] = perform_one(task, process, peaks, budget, place, module)
                peaks += [task] if task["do"] == "peaks" else []
        finally:
            if process is not None:
                process.close()

    with ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(work) for _ in range(at_once)]:
            done.result()
    return [row for number in sorted(found) for row in found[number]]


def perform_one(
    task: Task, process: Process | None, peaks: list[Task], budget: Budget, place: torch.device, module: str
) -> tuple[Process | None, list[Row]]:
    """The process for the next task, and the rows of this one."""
    if budget.left() < LEAST_S:
        return process, missing(task, OUT_OF_TIME)
    say(f"{budget.left():4.0f} s left: {label(task)}")
    try:
        process = process or start(module, place, peaks)
        answer = ask(process, task, min(budget.left(), task.get("patience", math.inf)))  # some kernel may never end
        found = answer["rows"] if "rows" in answer else missing(task, answer.get("missing", "no rows"))
        if answer.get("lost"):
            process.close()
            return None, found
        return process, found
    except Died as reason:
        if process is not None:
            process.close()
        return None, missing(task, OUT_OF_TIME if budget.left() < LEAST_S else str(reason))


def start(module: str, place: torch.device, again: list[Task]) -> Process:
    process = Process(module, {"device": str(place)}, threads=torch.get_num_threads(), pinned=False)
    try:
        process.answer(START_S)
        for task in again:
            ask(process, task, START_S)
    except Died:
        process.close()
        raise
    return process


def ask(process: Process, task: Task, seconds: float) -> dict[str, Any]:
    return process.ask(max(seconds, LEAST_S), json.dumps({"task": task, "seconds": seconds}))


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
