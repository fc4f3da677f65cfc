"""A network frozen for inference: recorded once, laid out in advance, run by one native call."""

from fastres.frozen import report
from fastres.frozen.calibrate import Calibration
from fastres.frozen.module import Frozen, freeze, load_frozen

__all__ = ["Calibration", "Frozen", "freeze", "load_frozen", "report"]
