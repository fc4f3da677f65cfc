"""The edge of ``python -m benchmarks.*`` to whoever calls it."""

import sys
from collections.abc import Callable

from benchmarks.harness import ParityError
from benchmarks.peers.process import Died
from fastres.errors import ArgumentError, UnsupportedError


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
