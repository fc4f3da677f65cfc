"""How the two native libraries are compiled: sources, flags, links. New files are found by their names."""

import json
import os
import platform
import sys
import sysconfig
from pathlib import Path

import toolchain
from toolchain import Unmet, quoted

CSRC = Path(__file__).resolve().parent
WORK = CSRC.parent / "build" / f"native-{sys.implementation.cache_tag}"
PRODUCTS = {"cpu": f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "cuda": "_cuda.so"}

# Instruction sets of the torch-free CPU kernels, by x86-64 level. Objects are linked in this order: of an
# inline function that several levels instantiate the linker keeps the first copy, which must run everywhere.
LEVELS = {1: [], 3: ["-march=x86-64-v3"], 4: ["-march=x86-64-v4", "-mprefer-vector-width=512"]}

# No contraction: a backward that recomputes its forward must get the same bits; a kernel that wants an FMA
# says so. No errno, no traps: neither changes a result, and both let square roots and selects vectorise.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # stable ABI of LibTorch 2.11: runs on that and later ones
    f"-ffile-prefix-map={CSRC.parent}=.",
    f"-I{CSRC}",
]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Xptxas", "-v"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
    f"-I{CSRC}",
]


def sources(room: str, info: dict) -> tuple[list[Path], list[Path]]:
    """Kernels and bindings of csrc/<room>, sorted; the stems of the bindings are the ops compiled."""
    kernels = sorted([*(CSRC / room).glob("*_kernel.cpp"), *(CSRC / room).glob("*_kernel.cu")])
    bindings = sorted(set((CSRC / room).glob("*.cpp")) - set(kernels))
    if not bindings:
        raise Unmet(f"csrc/{room} holds no sources")
    info["kernels"][room] = [path.stem for path in bindings]
    return kernels, bindings


def cxx_rules(cxx: dict) -> dict[str, str]:
    """The ninja rules of the host compiler."""
    return {
        "cxx": f"{quoted([*cxx['command'], *CXX_FLAGS])} -MD -MF $out.d $flags -c $in -o $out",
        "link": f"{quoted(cxx['command'])} -shared $in -o $out $flags",
    }


def build_cpu(info: dict, explicit: bool) -> Path:
    """Compile fastres/_C: the bindings, each kernel once per level, and the pybind11 module, holding info."""
    import pybind11  # a build requirement, but not of FASTRES_BUILD=none

    torch, cxx = toolchain.find_torch(), toolchain.find_cxx()
    kernels, bindings = sources("cpu", info)
    levels = LEVELS if platform.machine() == "x86_64" else {1: []}
    info.update(torch=torch["version"], compiler=cxx["name"], cpu_levels=list(levels))
    info["built"].append("cpu")
    folder = WORK / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    toolchain.write_changed(folder / "build_info.inc", f'R"json({json.dumps(info)})json"\n')

    module = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"), f"-I{folder}"]
    edges = [("module.o", "cxx", [CSRC / "binding/module.cpp"], module)]
    headers = ["-isystem", torch["root"] / "include"]
    edges += [(f"{path.stem}.o", "cxx", [path], headers) for path in bindings]
    for level, flags in levels.items():
        flags = [f"-DFASTRES_CPU_LEVEL={level}", *flags]
        edges += [(f"{path.stem}.{level}.o", "cxx", [path], flags) for path in kernels]
    link = [f"-L{torch['root']}/lib", "-ltorch_cpu"]
    edges.append((PRODUCTS["cpu"], "link", [out for out, *_ in edges], link))
    toolchain.run_ninja(folder, cxx_rules(cxx), edges)
    return folder / PRODUCTS["cpu"]


def cuda_bindings(torch: dict, nvcc: dict, bindings: list[Path]) -> list[tuple]:
    """The build edges of csrc/cuda's bindings, which the tests link for the CPU too."""
    headers = ["-DUSE_CUDA", "-isystem", torch["root"] / "include", "-isystem", nvcc["include"]]
    return [(f"{path.stem}.o", "cxx", [path], headers) for path in bindings]


def build_cuda(info: dict, explicit: bool) -> Path:
    """Compile fastres/_cuda.so; without an explicit wish only for a CUDA torch of nvcc's major version."""
    torch, cxx = toolchain.find_torch(), toolchain.find_cxx()
    if not explicit and not torch["cuda"]:
        raise Unmet(f"torch {torch['version']} has no CUDA (FASTRES_BUILD=cuda compiles them all the same)")
    nvcc = toolchain.find_nvcc()
    if not explicit and torch["cuda"].split(".")[0] != nvcc["version"].split(".")[0]:
        mismatch = f"nvcc is {nvcc['version']} and torch {torch['version']} is for CUDA {torch['cuda']}"
        raise Unmet(f"{mismatch} (set FASTRES_CUDA_HOME, or FASTRES_BUILD=cuda to build all the same)")
    archs = toolchain.cuda_archs(nvcc["path"])
    kernels, bindings = sources("cuda", info)
    folder = WORK / "cuda"
    folder.mkdir(parents=True, exist_ok=True)

    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    host = ["-ccbin", cxx["command"][0]] if "CXX" in os.environ else []
    # What ptxas says of registers, spills and shared memory stays beside the object, for the tests.
    log = "> $out.ptxas.txt 2>&1 || (cat $out.ptxas.txt; exit 1)"
    command = f"{quoted([nvcc['path'], *NVCC_FLAGS, *host])} -MD -MF $out.d $flags -c $in -o $out {log}"
    # Kernels of one architecture are compiled for that alone; where it is not asked for, their code is empty.
    hopper = [code for code in codes if code.endswith("code=sm_90a")] or codes
    edges = [(f"{path.stem}.o", "nvcc", [path], hopper if path.stem.startswith("sm90_") else codes) for path in kernels]
    edges += cuda_bindings(torch, nvcc, bindings)
    # libtorch leads to libtorch_cuda, which has the current-stream function and which a CPU torch lacks.
    torch_libs = [f"-L{torch['root']}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    link = [*torch_libs, f"-L{nvcc['lib']}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    edges.append((PRODUCTS["cuda"], "link", [out for out, *_ in edges], link))
    toolchain.run_ninja(folder, {**cxx_rules(cxx), "nvcc": command}, edges)
    info.update(torch=torch["version"], compiler=cxx["name"], cuda=nvcc["version"], cuda_archs=archs)
    info["built"].append("cuda")
    return folder / PRODUCTS["cuda"]


BUILD = {"cpu": build_cpu, "cuda": build_cuda}
