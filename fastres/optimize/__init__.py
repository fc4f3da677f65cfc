"""An existing model made faster in place: ``optimize``, ``explain``, ``restore``, ``refresh``."""

from fastres.optimize.call import optimize, refresh, restore
from fastres.optimize.report import Report, explain

__all__ = ["Report", "explain", "optimize", "refresh", "restore"]
