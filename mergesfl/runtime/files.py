"""Files that a crash at any point leaves whole: the old content or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a crash at any point leaves the old content or the new one. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Gives a complete, fsynced file its final name, and waits until the folder is on the disk. Raises OSError."""
    os.replace(temporary, path)  # noqa: PTH105  (Path.replace of Python 3.10 keeps its own reference)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
