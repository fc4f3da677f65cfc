"""A network frozen for inference: recorded once, laid out in advance, run by one native call."""

from fastres.frozen import report
from fastres.frozen.module import Frozen, freeze

__all__ = ["Frozen", "freeze", "report"]
