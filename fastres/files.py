"""Files that are written whole or not at all."""

import os
import threading
from pathlib import Path


def replace(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file in one step: whatever happens, and whoever reads beside, it holds its old content or all of the new.

    Args:
        mode: the file's rights, of which the process's mask takes some away, as from any new file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
