"""The process that performs tasks: a task in JSON on each line of stdin, its rows in JSON on a line of stdout.

A kernel that breaks the CUDA context ends this process, not the run. The order on the command line names the device.
"""

import json
import sys
import time
from typing import Any

import torch

from benchmarks.acceptance.tasks import Worker
from benchmarks.peers.worker import answers, reason


def main() -> None:
    channel, order = answers(), json.loads(sys.argv[1])
    worker = Worker(torch.device(order["device"]))
    print(json.dumps({"ready": True}), file=channel)
    for line in sys.stdin:
        print(json.dumps(perform(worker, json.loads(line))), file=channel)


def perform(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
    """The rows of a task, or why there are none, and whether this process is of no use to the next one; a task that it will not
    survive ends it."""
    end = time.monotonic() + message["seconds"]
    try:
        answer = {"rows": worker.perform(message["task"], lambda: end - time.monotonic())}
    except Exception as error:  # whatever a task raises is its result; the next one still runs
        if "CUDA error" in str(error):  # the context is lost, and with it all that follows
            raise
        answer = {"missing": reason(error)}
    return answer | {"lost": is_lost(worker.place)}


def is_lost(place: torch.device) -> bool:
    """Whether a kernel broke the CUDA context, which a judge may have taken for the result of what it judged."""
    try:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
