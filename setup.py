"""Decides what native code to build: FASTRES_BUILD = auto | none | cpu | cuda (which includes cpu).

auto builds what it can and installs pure Python where it cannot; what is asked for by name must build or the
install fails. One line says what was built and why; fastres/_build_info.json keeps it, because pip hides it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import recipes  # noqa: E402
from toolchain import Unmet  # noqa: E402

PARTS = {"auto": ("cuda", "cpu"), "none": (), "cpu": ("cpu",), "cuda": ("cuda", "cpu")}


def wished() -> str:
    """What FASTRES_BUILD asks for."""
    wish = os.environ.get("FASTRES_BUILD") or "auto"
    if wish not in PARTS:
        raise SystemExit(f"fastres: FASTRES_BUILD must be {', '.join(PARTS)}, got {wish!r}")
    return wish


def git_revision() -> str | None:
    """The commit built from, marked -dirty where the tree differs from it; None outside a clone."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def build_native(wish: str) -> tuple[dict, dict[str, Path]]:
    """Build what the wish asks for; return the record of it and the libraries by part."""
    info = {"wish": wish, "git": git_revision(), "python": platform.python_version(), "stable_abi": "2.11"}
    info.update(torch=None, compiler=None, cuda=None, cuda_archs=[], cpu_levels=[])
    info.update(built=[], why_not={}, kernels={})
    libraries = {}
    for part in ("cuda", "cpu"):  # in this order, because the CPU library holds the record
        try:
            if part not in PARTS[wish]:
                raise Unmet(f"FASTRES_BUILD={wish}")
            libraries[part] = recipes.BUILD[part](info, explicit=wish == part)
        except Unmet as reason:
            if wish != "auto" and part in PARTS[wish]:
                raise SystemExit(f"fastres: FASTRES_BUILD={wish} cannot be met: {reason}") from None
            info["why_not"][part], info["built"] = str(reason), list(libraries)
            info["kernels"].pop(part, None)
    return info, libraries


def summary(info: dict) -> str:
    """The one line that says what was built and why."""
    cuda = f"CUDA {info['cuda']} kernels for sm {' '.join(info['cuda_archs'])}"
    built = {"cpu": f"CPU kernels with {info['compiler']}", "cuda": cuda}
    parts = [built[part] for part in info["built"]] or ["pure Python"]
    for reason in dict.fromkeys(info["why_not"].values()):
        refused = " or ".join(part.upper() for part, why in info["why_not"].items() if why == reason)
        parts.append(f"no {refused} kernels: {reason}")
    return f"fastres: {'; '.join(parts)}"


class BuildNative(build_ext):
    """Builds the native libraries and puts them, with the record, where Python is going to import them."""

    def run(self) -> None:
        info, libraries = build_native(wished())
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "fastres"
        package.mkdir(parents=True, exist_ok=True)
        for part, name in recipes.PRODUCTS.items():
            if part in libraries:  # renamed into place: a running process may have the old one loaded
                os.replace(shutil.copy2(libraries[part], package / f".{name}"), package / name)
            else:
                (package / name).unlink(missing_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        print(summary(info), file=sys.stderr, flush=True)

    def get_outputs(self) -> list[str]:
        return []  # an editable install uses the source folder itself, a wheel takes all of build_lib


class Build(build):
    """Runs BuildNative always: FASTRES_BUILD=none too has a record to write, and leftovers to remove."""

    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else test) for name, test in build.sub_commands
    ]

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # no module of an earlier build may ship
        super().run()


if __name__ == "__main__":
    # The extension only makes the wheel a platform wheel; BuildNative decides what goes into it.
    modules = [] if wished() == "none" else [Extension("fastres._C", [])]
    setup(ext_modules=modules, cmdclass={"build": Build, "build_ext": BuildNative})
