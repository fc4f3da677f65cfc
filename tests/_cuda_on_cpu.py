"""Builds and loads the CUDA ops for the CPU: their kernels as C++ run by fibers, their bindings as they are.

See cuda_on_cpu/device.h. It needs the CUDA headers but neither nvcc's compiler nor a GPU, and finds mistakes in
indices, partitions and barriers; it says nothing of what only a GPU does (memory order, speed).
"""

import functools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ROOM = Path(__file__).resolve().parent / "cuda_on_cpu"
# What kernels alone are compiled with: a misaligned vector access, which a CPU forgives, ends the process as on a GPU.
AS_DEVICE = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]


@functools.cache
def tools():
    """csrc/toolchain.py and csrc/recipes.py, which setup.py builds with."""
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import recipes
        import toolchain
    finally:
        sys.path.remove(str(ROOT / "csrc"))
    return toolchain, recipes


@functools.cache
def rules() -> dict[str, str]:
    """The ninja rules that compile CUDA sources for the CPU; skips where the tools are missing."""
    toolchain, recipes = tools()
    try:
        nvcc, cxx, found = toolchain.find_nvcc(), toolchain.find_cxx(), toolchain.find_torch()
    except toolchain.Unmet as reason:
        pytest.skip(str(reason))
    # What only Hopper's instructions do is done by the headers in instead/, which are found first.
    flags = [f"-I{ROOM / 'instead'}", *recipes.CXX_FLAGS, "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-DUSE_CUDA"]
    flags += ["-isystem", str(found["root"] / "include"), "-isystem", str(nvcc["include"])]
    compiler, options = toolchain.quoted(cxx["command"]), toolchain.quoted(flags)
    return {
        "cxx": f"{compiler} {options} -MD -MF $out.d $flags -c $in -o $out",
        "link": f"{compiler} -shared -Wl,-Bsymbolic $in -o $out $flags",
    }


def kernel_edges(folder: Path, kernels: list[tuple[str, Path, list]], flags: list) -> list[tuple]:
    """Build edges of (object, source, flags) kernels with flags that all share: device.h is compiled ahead of them, once."""
    ahead, flags = folder / "device.h", [*AS_DEVICE, *flags]
    tools()[0].write_changed(ahead, f'#include "{ROOM / "device.h"}"\n')
    edges: list[tuple] = [("device.h.gch", "cxx", [ahead], ["-x", "c++-header", *flags])]
    own = ["-include", ahead, "-x", "c++", *flags]
    return edges + [(out, "cxx", [path, "|", "device.h.gch"], [*own, *more]) for out, path, more in kernels]


@functools.cache
def bindings() -> list[Path]:
    """The bindings' objects: those of the library for GPUs, compiled as it compiles them, in its folder."""
    toolchain, recipes = tools()
    rules()  # skips where it cannot
    folder = recipes.WORK / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    _, sources = recipes.sources("cuda", {"kernels": {}})
    edges = recipes.cuda_bindings(toolchain.find_torch(), toolchain.find_nvcc(), sources)
    toolchain.run_ninja(folder, recipes.cxx_rules(toolchain.find_cxx()), edges)
    return [folder / out for out, *_ in edges]


@functools.cache
def load() -> list[Path]:
    """Compile (once) and load; afterwards ``torch.ops.fastres_C.cuda_*`` take CPU tensors. Skips where it cannot. Returns the
    objects.
    """
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA: the kernels run on the GPU")
    toolchain, recipes = tools()
    commands = rules()
    kernels, _ = recipes.sources("cuda", {"kernels": {}})
    folder = recipes.WORK / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    device, *compiled = kernel_edges(folder, [(f"{path.stem}.o", path, []) for path in kernels], [])
    edges = [device, ("runtime.o", "cxx", [ROOM / "runtime.cpp"], []), *compiled]
    objects = [*bindings(), *(folder / out for out, *_ in edges[1:])]
    library = [f"-L{toolchain.find_torch()['root']}/lib", "-ltorch_cpu", "-ldl", "-lubsan"]
    edges.append(("cuda_on_cpu.so", "link", [path.name if path.parent == folder else path for path in objects], library))
    toolchain.run_ninja(folder, commands, edges)
    torch.ops.load_library(folder / "cuda_on_cpu.so")
    return objects
