"""Benchmarks of ops, blocks and models against PyTorch; run ``pytest benchmarks --benchmark-only``.

Threads are pinned here, before torch is imported: unpinned, medians on small machines have two modes.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # before a pinned torch keeps to one
PINNED = "torch" not in sys.modules
if PINNED:
    os.environ.setdefault("OMP_PROC_BIND", "true")
PINNED = PINNED and os.environ["OMP_PROC_BIND"].lower() == "true"
