"""R24: mistakes planted in copies of the sources, each of which a test of the short profile must catch."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import _plain_faults
import test_planted_faults as faults

from reliability.board import Tally, scored


@scored("R24", "faults planted in Python, C++, Triton and CUDA sources, caught", full=42, short=3)
def planted(tally: Tally, count: int) -> None:
    python = _plain_faults.PYTHON
    rooms: dict[str, tuple[list, Callable]] = {
        "Python": (python[:count], faults.of_python),
        "C++": (_plain_faults.CPP, faults.of_cpp),
        "Triton": (faults.TRITON, faults.of_triton),
        "CUDA": (faults.CUDA, faults.of_cuda),
    }
    for language, (found, try_them) in rooms.items():
        with tempfile.TemporaryDirectory() as folder:
            said = try_them(Path(folder), found)
        for fault, word in zip(found, said, strict=True):
            with tally.case(f"{language}: {fault.mistake}"):
                assert word.startswith(("AssertionError", "device", "signal")), f"the tests said {word}"
        if count <= len(python):
            return  # the tests of the lane compile try some of the others
