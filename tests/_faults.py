"""Runs tests on faulty kernels: ``python _faults.py FILE``, a JSON list of [room, path, test, arguments], answers in one too.

Each runs in a process of its own, forked once all is imported that has no fault: operators of the same names cannot be
loaded twice.
"""

import ctypes
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import triton  # noqa: F401  imported once, for all

MODULES = {
    "cuda": (
        *("test_cuda", "test_sm90_conv", "test_sm90_wide", "test_sm90_chain"),
        *("test_conv_few", "test_conv_maxpool", "test_conv_statistics", "test_conv_backward_bn_act", "test_bn_cluster"),
    ),
    "triton": (
        *("test_triton_interpreter", "test_triton_pointwise", "test_triton_joined", "test_triton_tf32"),
        "test_triton_int8", "test_triton_int8_steps",
    ),
}
DEVICE = ("every thread of the block waits for another", "more arrivals at a barrier")  # what the emulated device found


def run(room, path, test, arguments):
    """One test on one fault; ``path`` is a library of CUDA kernels, or a folder with a package fastres."""
    if room == "cuda":
        torch.ops.load_library(path)
    else:
        sys.path.insert(0, path)
    torch.manual_seed(0)
    if room == "plain":
        whole_tests(path, test)
        return
    for key, value in arguments.items():
        if str(value).startswith("torch."):
            arguments[key] = getattr(torch, value.removeprefix("torch."))
    if room == "cuda":
        arguments["device"] = torch.device("cpu")
    if "monkeypatch" in arguments:
        arguments["monkeypatch"] = pytest.MonkeyPatch()
    if "few_programs" in arguments:  # as the fixture of that name
        importlib.import_module("fastres.kernels.triton.configs").PROGRAMS = 4
    modules = map(importlib.import_module, MODULES[room])
    next(getattr(module, test) for module in modules if hasattr(module, test))(**arguments)


def whole_tests(path, names):
    """Tests by their names, as pytest runs them, on the package in that folder."""
    tests = Path(__file__).parent
    options = ["-q", "-x", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tests}"]
    code = pytest.main([*options, *(f"{tests}/{name}" for name in names.split())])
    import fastres

    assert Path(fastres.__file__).is_relative_to(path), "another package was tried"
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}")
    assert code == 0


def outcome(task):
    """What a test says: "passed", the name of what it raised, "device", or the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "passed"
        try:
            run(*task)
        except (Exception, pytest.fail.Exception) as error:
            said = type(error).__name__
            if any(words in str(error) for words in DEVICE):
                said = "device"
            elif not isinstance(error, AssertionError):
                traceback.print_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    said = os.read(reading, 100).decode()
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return said or f"signal {os.WTERMSIG(status)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    tasks = json.loads(file.read_text())
    if tasks[0][0] == "cuda":  # whose faults are in no module
        # For libraries that are not linked with it: to look through it takes longer than all else in linking.
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
        for module in MODULES["cuda"]:
            importlib.import_module(module)
    file.write_text(json.dumps([outcome(task) for task in tasks]))
