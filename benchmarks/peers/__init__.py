"""Whole networks against the other ways to run them on a CPU, each in its own process; ``python -m benchmarks.peers``.

``ways`` names them and makes each ready; ``worker`` is the process of one of them and ``process`` its handle; ``cell``
puts all ways to one network, batch and dtype in turns; ``peaks`` measures what the machine could do at most;
``table`` shows it.
"""
