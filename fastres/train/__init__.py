"""Training of image classifiers: data, schedules, the loop, checkpoints, several processes."""

from fastres.train.data import Data, cifar10, digits, folder
from fastres.train.engine import Settings, Trainer

__all__ = ["Data", "Settings", "Trainer", "cifar10", "digits", "folder"]
