"""How hard fastres was tried to break: classes of cases, each counted, on one table (``make reliability``).

A class is a function that tries so many cases on a ``Tally``. The short profile of each runs in ``make test``, where
a planted fault also shows that the class can fail; the full one fills RELIABILITY.json, from which the tables are made.
"""

from reliability import (
    binary,
    children,
    derivatives,
    exact,
    far,
    files,
    frozen,
    installation,
    interruptions,
    networks,
    parity,
    planted,
    refusals,
    sanitizers,
    soak,
    stateful,
    static,
    zones,
)
from reliability.board import CLASSES, Class, Result, run

__all__ = [
    "CLASSES",
    "Class",
    "Result",
    "binary",
    "children",
    "derivatives",
    "exact",
    "far",
    "files",
    "frozen",
    "installation",
    "interruptions",
    "networks",
    "parity",
    "planted",
    "refusals",
    "run",
    "sanitizers",
    "soak",
    "stateful",
    "static",
    "zones",
]
