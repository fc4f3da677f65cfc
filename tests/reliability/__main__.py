"""``python -m reliability``, with tests/ on the path (``make reliability``): tries every class, prints the table, and
writes RELIABILITY.json. Each class runs in a process of its own, two at a time, which may crash or hang without
ending the others.

``--profile short`` is what ``make test`` runs; ``CODE ...`` runs some classes and keeps the rows of the others, each of which
says the commit that it was tried on.
"""

# ruff: noqa: E501

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "RELIABILITY.json"
HOURS = 3600
AT_ONCE = 2  # classes, each with one thread but where it sets another number
COLUMNS = ("code", "title", "tried", "failed", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("codes", nargs="*", metavar="CODE", help="classes, such as R1; all without")
    parser.add_argument("--profile", choices=("full", "short"), default="full")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import reliability

    unknown = sorted(set(arguments.codes) - set(reliability.CLASSES))
    if unknown:
        parser.error(f"CODE must be of {', '.join(reliability.CLASSES)}, got {', '.join(unknown)}")
    codes = arguments.codes or list(reliability.CLASSES)
    if arguments.in_process:
        print(json.dumps(dataclasses.asdict(reliability.run(codes[0], arguments.profile))))
        return 0
    rows = []
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        for row in pool.map(lambda code: apart(code, arguments.profile), codes):
            print(f"{row['code']} {row['title']}: {row['tried']:,} tried, {row['failed']} failed", file=sys.stderr, flush=True)
            for failure in row["failures"]:
                print(f"    {failure}", file=sys.stderr)
            for note in row["notes"]:
                print(f"    not run: {note}", file=sys.stderr)
            rows.append(row)
    print(table(rows))
    if arguments.profile == "full":
        write(rows)
    return 0 if all(reliability.Result(**row).ok for row in rows) else 1


def apart(code: str, profile: str) -> dict:
    """The row of a class, tried in another process."""
    from reliability import CLASSES, Result, children

    command = [sys.executable, "-m", "reliability", code, "--profile", profile, "--in-process"]
    environment = {"OMP_NUM_THREADS": "1", **children.environment(watched=False)}
    found = CLASSES[code]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=HOURS)
        ended = f"ended with code {done.returncode}"
    except subprocess.TimeoutExpired:
        done, ended = None, f"hung for {HOURS} s"
    if done is not None and done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    wanted = found.full if profile == "full" else found.short
    return dataclasses.asdict(Result(code, found.title, wanted, 1, 1, 0.0, [ended]))


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| {' | '.join(('class', 'what was tried', 'tried', 'failed', 'seconds'))} |",
        "| :-- | :-- | --: | --: | --: |",
    ]
    lines += [
        f"| {' | '.join(f'{row[name]:,}' if name == 'tried' else str(row[name]) for name in COLUMNS)} |"
        for row in (r | {"title": "; not run: ".join([r["title"], *r.get("notes", ())])} for r in rows)
    ]
    return "\n".join(lines)


def write(rows: list[dict]) -> None:
    """RELIABILITY.json with these rows, of this commit, and those that other classes have from before."""
    import torch

    from fastres import files, info
    from reliability import CLASSES

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    about = {"device": info.cpu_model(), "torch": torch.__version__, "python": platform.python_version()}
    now = {
        "commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*.json", ":!README.md", ":!benchmarks/results")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }  # fmt: skip
    found = {row["code"]: row | now for row in rows}
    if FILE.exists():
        before = json.loads(FILE.read_text(encoding="utf-8"))
        if all(before[key] == value for key, value in about.items()):
            found = {row["code"]: row for row in before["rows"] if row["code"] in CLASSES} | found
    ordered = sorted(found.values(), key=lambda row: (row["code"][0], int(row["code"][1:])))
    known = {code: found.title for code, found in CLASSES.items()}  # of which those without a row were not run
    files.replace(FILE, (json.dumps({**about, "classes": known, "rows": ordered}, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
