"""What the programs ``python -m benchmarks.*`` share: their parser, and the edge to whoever calls them."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from benchmarks.harness import ParityError
from benchmarks.peers.process import Died
from fastres.errors import ArgumentError, UnsupportedError


class Parser(argparse.ArgumentParser):
    """The parser of one program, named as it is called; errors in one line."""

    def __init__(self, program: str, text: str) -> None:
        super().__init__(prog=f"python -m benchmarks.{program}", description=text)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (try {self.prog} --help)\n")


def run(main: Callable[[], int]) -> int:
    """The exit code of a program: its own; after one line of error, 1 for a wrong result or none, 2 for what its user can mend,
    130 for an interruption.
    """
    try:
        return main()
    except KeyboardInterrupt:
        return said("interrupted", 130)
    except (ParityError, Died) as error:
        return said(str(error), 1)
    except (ArgumentError, UnsupportedError, OSError) as error:
        return said(str(error), 2)


def said(text: str, code: int) -> int:
    print(f"benchmarks: {text.strip().partition(chr(10))[0]}", file=sys.stderr)
    return code


def images(text: str) -> int:
    """A batch."""
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 4096, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """A time limit."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1440:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 1440, got {text!r}")
    return value
