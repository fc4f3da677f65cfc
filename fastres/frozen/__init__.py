"""A network frozen for inference: recorded once, laid out in advance, run as one native call or one CUDA graph."""

from fastres.frozen import report
from fastres.frozen.base import Frozen
from fastres.frozen.calibrate import Calibration
from fastres.frozen.make import freeze, load_frozen

__all__ = ["Calibration", "Frozen", "freeze", "load_frozen", "report"]
