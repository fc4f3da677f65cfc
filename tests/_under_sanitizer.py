"""``python -m _under_sanitizer LIBRARY WORDS``: this file as fastres._C, before anything asks for it, then what
reliability.watched does with the words.
"""

import importlib.util
import sys

import torch  # noqa: F401  # whose libraries the file is linked with


def load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("fastres._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["fastres._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastres._C"])


if __name__ == "__main__":
    load(sys.argv[1])
    from reliability import watched

    watched.main(*sys.argv[1:])
