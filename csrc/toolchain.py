"""The tools that build native code: torch's headers, a compiler, nvcc, ninja. A missing one raises Unmet."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

DEFAULT_CUDA_ARCHS = "80;90a;100"  # A100, H100/H200, B200; the last one also as PTX, for what comes after
PATIENCE_S = 30  # for a tool to say its version


class Unmet(Exception):
    """Something that cannot be built; the text is the reason and what to do."""


def ask(*command: str) -> str:
    """What a tool prints; Unmet when it cannot be run, fails or hangs."""
    said = f"`{' '.join(command)}`"
    pipes: dict = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        tool = subprocess.Popen(command, **pipes, text=True, errors="replace", start_new_session=True)
    except OSError as error:
        raise Unmet(f"{command[0]} cannot be run: {error.strerror}") from None
    try:
        out, _ = tool.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(tool.pid, signal.SIGKILL)  # the whole group: a wrapper's child would keep the pipe open
        tool.communicate()
        raise Unmet(f"{said} gave no answer in {PATIENCE_S} s") from None
    if tool.returncode:
        raise Unmet(f"{said} failed with exit code {tool.returncode}: {out.strip()[-200:] or 'no output'}")
    return out


def site_folders() -> list[Path]:
    """Folders that may hold the user's packages, best first.

    torch is no build requirement: pip would download gigabytes into its isolated environment, and perhaps
    another torch than the user's. There the user's torch cannot be imported, but sysconfig still names the
    environment that pip installs into; uv names it nowhere, but an activated one is on PATH. Headers of any
    torch from 2.11 on serve, thanks to the stable ABI.
    """
    spec = importlib.util.find_spec("torch")
    importable = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    homes = [os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if name in os.environ]
    on_path = [Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep)]
    homes += [str(home) for home in on_path if (home / "pyvenv.cfg").is_file()]
    lib = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    target = Path(sysconfig.get_path("purelib"))
    return [*importable, target, *(Path(home, lib) for home in [*homes, sys.base_prefix])]


def find_torch() -> dict:
    """Folder, version and CUDA version of the torch to build against, read without importing it."""
    for torch in (folder / "torch" for folder in site_folders()):
        if not (torch / "version.py").is_file() or not (torch / "include").is_dir():
            continue
        text = (torch / "version.py").read_text()
        lines = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *(.+)$", text, re.MULTILINE))
        version, cuda = (ast.literal_eval(lines.get(name, "None")) for name in ("__version__", "cuda"))
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 11):
            raise Unmet(f"torch {version} is too old: native code needs 2.11 or newer (pip install -U torch)")
        return {"root": torch, "version": version, "cuda": cuda}
    raise Unmet("no torch to build against was found (install torch, then pip install --no-build-isolation)")


def find_cxx() -> dict:
    """The C++ compiler: CXX, else c++, g++ or clang++."""
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    command = shlex.split(os.environ.get("CXX", "")) or found[:1]
    if sys.platform != "linux":
        raise Unmet(f"native code is built on Linux only, this is {sys.platform}")
    if not command:
        raise Unmet("no C++ compiler was found (install g++ or set CXX)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise Unmet("Python.h was not found (install Python's development headers)")
    return {"command": command, "name": ask(*command, "--version").partition("\n")[0]}


def find_nvcc() -> dict:
    """Path, version, folders of the first nvcc that works; a CUDA home, where set, is the only candidate."""
    homes = [os.environ[name] for name in ("FASTRES_CUDA_HOME", "CUDA_HOME") if os.environ.get(name)]
    wheels = [path for folder in site_folders() for path in folder.glob("nvidia/*/bin/nvcc")]
    found = [shutil.which("nvcc"), *Path("/usr/local/cuda/bin").glob("nvcc"), *wheels]
    reasons = []
    for nvcc in [f"{homes[0]}/bin/nvcc"] if homes else [str(path) for path in found if path]:
        try:
            return probe_nvcc(nvcc)
        except Unmet as reason:
            reasons.append(str(reason))
    raise Unmet("; ".join(reasons) or "no nvcc was found (install the CUDA toolkit or set CUDA_HOME)")


def probe_nvcc(nvcc: str) -> dict:
    """Version and folders of one nvcc, as it reports them: it may be a wrapper script living elsewhere."""
    answer = ask(nvcc, "--version")
    release = re.search(r"release (\d+\.\d+)", answer)
    if not release:
        raise Unmet(f"`{nvcc} --version` names no release, got {answer.strip()[:80]!r}")
    report = dict(re.findall(r"^#\$ (TOP|_TARGET_DIR_)=(.+)$", ask(nvcc, "--dryrun", "-c", "x.cu"), re.MULTILINE))
    top = Path(report.get("TOP", Path(nvcc).parents[1])).resolve()
    folders = [top / report.get("_TARGET_DIR_", ""), top]
    include = [folder / "include" for folder in folders if (folder / "include/cuda_runtime.h").is_file()]
    libs = [folder / lib for folder in folders for lib in ("lib64", "lib")]
    lib = [folder for folder in libs if (folder / "libcudart_static.a").is_file()]
    if not include or not lib:
        raise Unmet(f"{nvcc} works, but cuda_runtime.h or libcudart_static.a is missing below {top}")
    return {"path": nvcc, "version": release[1], "include": include[0], "lib": lib[0]}


def cuda_archs(nvcc: str) -> list[str]:
    """FASTRES_CUDA_ARCHS, else those that nvcc knows of TORCH_CUDA_ARCH_LIST or of the default, as in 90a."""
    named = os.environ.get("FASTRES_CUDA_ARCHS")
    wish = named or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    parts = [part.lower().removesuffix("+ptx") for part in re.split(r"[;, ]+", wish) if part]
    archs = [part.removeprefix("sm_").replace(".", "") for part in parts]
    known = set(re.findall(r"sm_(\d+)", ask(nvcc, "--list-gpu-code")))
    legal = [arch for arch in archs if re.fullmatch(r"\d+[af]?", arch) and arch.rstrip("af") in known]
    if not legal or (named and legal != archs):
        raise Unmet(f"CUDA architectures must be known to {nvcc}, such as {DEFAULT_CUDA_ARCHS}, got {wish}")
    return legal


def find_ninja() -> str:
    """The ninja program, beside the running interpreter or on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    program = shutil.which("ninja", path=path)
    if not program:
        raise Unmet("ninja was not found (pip install ninja)")
    return program


def quoted(arguments: list) -> str:
    """Arguments as part of a ninja command: quoted for the shell, then for ninja."""
    return shlex.join(map(str, arguments)).replace("$", "$$")


def run_ninja(folder: Path, rules: dict[str, str], edges: list[tuple]) -> None:
    """Write folder/build.ninja and run it; edges are (output, rule, inputs, flags)."""
    import fcntl  # not everywhere that pure Python installs

    def escaped(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = []
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"] if "$out.d" in command else []
    for out, rule, inputs, flags in edges:
        lines += [f"build {escaped(out)}: {rule} {' '.join(map(escaped, inputs))}"]
        lines += [f"  flags = {quoted(flags)}"]
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    ninja = [find_ninja(), "-C", str(folder), "-j", jobs]
    pipes: dict = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one folder would break each other
        write_changed(folder / "build.ninja", "\n".join(lines) + "\n")
        with subprocess.Popen(ninja, **pipes, text=True, errors="replace") as run:
            output = [print(line, end="", file=sys.stderr, flush=True) or line for line in run.stdout or ()]
    if run.returncode:
        first = next((line for line in output if re.search(r"error|not found|Killed", line)), output[-1])
        raise Unmet(f"compiling failed: {first.strip()[:300]} (pip install -v shows everything)")


def write_changed(path: Path, text: str) -> None:
    """Write a file only where its text changes, so that nothing is compiled again for nothing."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
