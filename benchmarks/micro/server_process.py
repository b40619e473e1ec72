"""A scripted server in a process of its own: both sides of its start and its end.

The server's module prints where it listens, and ends when its stdin is closed: with the process that started it,
however that ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from mergesfl.runtime.process import keep_freed_memory


@contextlib.contextmanager
def listening(module: str, *arguments: object) -> Iterator[str]:
    """Runs `python -m MODULE ARGUMENTS`; where it listens."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()  # the server ends with it


def serve_until_closed(serve: Callable[..., None], *arguments: object) -> None:
    """The server's `main`: serves until stdin is closed."""
    keep_freed_memory()
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # the thread still holds its socket: an orderly end would wait for it
