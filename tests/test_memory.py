"""``fastres.reuse_memory``: in a process of its own, since it cannot be undone."""

import platform
import resource
import subprocess
import sys

import pytest

import fastres

pytestmark = pytest.mark.none

COUNT = """
import resource, sys, torch, fastres
if sys.argv[1] == "reuse":
    fastres.reuse_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    x = torch.ones(64 << 20, dtype=torch.uint8)
    del x
before = faults()
for _ in range(10):
    x = torch.ones(64 << 20, dtype=torch.uint8)
    del x
print(faults() - before)
"""


def count(mode):
    done = subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_tensors_are_used_again():
    pages = 10 * (64 << 20) // resource.getpagesize()
    assert count("leave") > 0.5 * pages
    assert count("reuse") < 0.5 * pages


def test_another_c_library_is_told(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(fastres.UnsupportedError, match="needs glibc"):
        fastres.reuse_memory()
