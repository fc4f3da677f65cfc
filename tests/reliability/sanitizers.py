"""R13: the native CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

What they cannot see: AddressSanitizer, a write past a value of a frozen network that lands in the next one's place in its
block of memory; ThreadSanitizer, PyTorch's own code and OpenMP, in whose place it watches threads that share every loop,
however short. Leaks are not looked for: Python keeps what it has until it ends.
"""

import re
import subprocess
from pathlib import Path

from reliability import instrumented
from reliability.board import Tally, scored
from reliability.instrumented import ADDRESS, THREAD, Kind

REPORT = re.compile(r"ERROR: AddressSanitizer.*|\S+: runtime error: .*|WARNING: ThreadSanitizer.*")
# Subject, share of the cases, and the instruction set that the library does not see, so that lesser kernels run too.
SLICES: dict[str, tuple[tuple[str, float, str], ...]] = {
    ADDRESS.name: (
        ("ops", 0.40, ""), ("ops", 0.12, "avx512f"), ("ops", 0.08, "avx2"),
        ("convolutions", 0.08, ""), ("convolutions", 0.04, "avx512f"),
        ("plans", 0.04, ""), ("plans", 0.02, "avx512f"),
    ),
    THREAD.name: (("ops", 0.16, ""), ("convolutions", 0.04, ""), ("plans", 0.02, "")),
}  # fmt: skip
SHORT = {ADDRESS.name: (("ops", 0.6, ""), ("ops", 0.4, "avx2"))}
SHORT_OPS = ("add_act",)  # a library of which is compiled in half a minute, once
KINDS = {kind.name: kind for kind in (ADDRESS, THREAD)}


def report(done: subprocess.CompletedProcess) -> str | None:
    """What ended the process, in a few lines; None where it ended well."""
    if done.returncode == 0:
        return None
    found = REPORT.search(done.stderr)
    frames = re.findall(r"#\d+ .*?((?:csrc|tests)/\S+:\d+)", done.stderr)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "nothing was tried")
    said = found[0] if found else " ".join(done.stderr.splitlines()[-1:])
    return f"{last}: exit code {done.returncode}: {said} at {', '.join(frames[:4])}"


def sees(tally: Tally, kind: Kind, library: Path) -> None:
    """Each fault that the sanitizer is there for is reported: else its silence would say nothing."""
    for fault in kind.faults:
        with tally.case(f"{kind.name} sanitizer, planted fault {fault}"):
            said = report(instrumented.run(kind, library, "planted", fault))
            assert said and REPORT.search(said), f"it was not reported: {said}"


def watch(tally: Tally, kind: Kind, library: Path, subject: str, count: int, hidden: str) -> None:
    """So many cases in one process; a report ends it, and the cases after it are not tried."""
    done = instrumented.run(kind, library, subject, "0", str(count), hidden=hidden)
    said = report(done)
    tally.tried += len(done.stdout.splitlines()) - (said is None)  # the last line of all counts them
    if said is not None:
        tally.fail(f"{kind.name} sanitizer{f', without {hidden}' if hidden else ''}: {said}")


@scored("R13", "AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer: fuzzed native kernels", full=1500, short=40)
def sanitizers(tally: Tally, count: int) -> None:
    whole = count >= 1000
    for name, slices in (SLICES if whole else SHORT).items():
        kind = KINDS[name]
        if reason := instrumented.why_not(kind):
            tally.note(f"{kind.name} sanitizer: {reason}")
            continue
        library = instrumented.library(kind, () if whole else SHORT_OPS)
        sees(tally, kind, library)
        for subject, share, hidden in slices:
            watch(tally, kind, library, subject, max(1, round(count * share)), hidden)
