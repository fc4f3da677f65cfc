"""``python -m benchmarks.acceptance``: what this release promises, checked on this machine and recorded."""
