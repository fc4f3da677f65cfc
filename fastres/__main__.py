"""``python -m fastres``: the command line."""

import sys

from fastres.cli import main

sys.exit(main())
