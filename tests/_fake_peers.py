"""Peers that do what real ones do on a bad day. Run as a program it says what a process was given, then stays silent."""

import json
import os
import signal
import sys
import time


def _first(call):
    return call, call()


def plain(task):
    return _first(lambda: task.model(task.x))


def slow(task):
    def call():
        time.sleep(0.03)
        return task.model(task.x)

    return _first(call)


def wrong(task):
    return _first(lambda: task.model(task.x) * 1.01)


def refuses(task):
    raise RuntimeError("no such device\nand more")


def crashes(task):
    print("lost in space", file=sys.stderr, flush=True)
    os._exit(3)


def dies_in_its_turn(task):
    left = [2]  # the first result, and the call that estimates

    def call():
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        if not left[0]:
            left.clear()
        print("noise on stdout")
        return task.model(task.x)

    return _first(call)


if __name__ == "__main__":
    names = ("OMP_NUM_THREADS", "OMP_PROC_BIND")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    print(json.dumps({**{name: os.environ[name] for name in names}, "cores": cores}), flush=True)
    time.sleep(600)
