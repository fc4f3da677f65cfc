"""R14: the fuzz of R1, R2, F1 and F2 where every block of memory has red zones and every tensor begins as NaN."""

from reliability import children
from reliability.board import CLASSES, Tally, scored

SHARES = {"R1": 0.5, "R2": 0.3, "F1": 0.15, "F2": 0.05}  # of the cases


@scored("R14", "fuzz with red zones at both ends of every block of memory, tensors poisoned", full=4000, short=60)
def zones(tally: Tally, count: int) -> None:
    children.apart(tally, "zones.fuzz", {code: -int(-count * share // 1) for code, share in SHARES.items()}, watched=True)


def fuzz(tally: Tally, counts: dict[str, int]) -> None:
    for code, count in counts.items():
        CLASSES[code].tries(tally, count)
        if tally.one and children.touched():
            return
