"""fastres: residual networks, faster: fused kernels for conv + BN + ReLU and residual add + ReLU, as drop-in blocks.

Importing builds nothing, warns of nothing and touches no GPU; native libraries load at the first call that asks.
"""

from fastres import functional, models, nn
from fastres.dispatch import use
from fastres.errors import ArgumentError, ArgumentTypeError, UnsupportedError, VerificationError
from fastres.frozen import Calibration, freeze, load_frozen
from fastres.graph import graph
from fastres.memory import reuse_memory
from fastres.optimize import explain, optimize, refresh, restore

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Calibration",
    "UnsupportedError",
    "VerificationError",
    "explain",
    "freeze",
    "functional",
    "graph",
    "load_frozen",
    "models",
    "nn",
    "optimize",
    "refresh",
    "restore",
    "reuse_memory",
    "use",
]
