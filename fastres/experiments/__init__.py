"""What the command line runs: measurements and the demo, over the public API."""
