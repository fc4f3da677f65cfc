"""Learning rates as functions without state: nothing to save, nothing to restore.

He et al. 2016 divide the rate by ten at half and at three quarters of the training (section 4.2: 32k and 48k of 64k steps), or
whenever the error stops falling (section 3.4), and start a network of 110 layers at a tenth of it (section 4.2).
"""

import math
from collections.abc import Sequence

MILESTONES = (0.5, 0.75)
PATIENCE = 5  # epochs without a lower test error that make a plateau
DEEP = 110  # layers from which on the paper warms up


def factor(schedule: str, done: float, warmup: float, errors: Sequence[float]) -> float:
    """The factor on the base learning rate.

    Args:
        schedule: ``"step"``, ``"plateau"`` or ``"cosine"``.
        done: share of the training that is done, from 0 to 1.
        warmup: share of the training that runs at a tenth of the rate.
        errors: test error of every epoch so far, for ``"plateau"``.
    """
    if done < warmup:
        return 0.1
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    reached = plateaus(errors) if schedule == "plateau" else sum(done >= share for share in MILESTONES)
    return 0.1**reached


def plateaus(errors: Sequence[float]) -> int:
    """How often the error went ``PATIENCE`` epochs without falling below its lowest; each one starts the count anew."""
    found, lowest, waited = 0, math.inf, 0
    for error in errors:
        lowest, waited = (error, 0) if error < lowest else (lowest, waited + 1)
        if waited == PATIENCE:
            found, waited = found + 1, 0
    return found
