"""Memory of this machine that one process makes and another opens: a memfd, which cannot shrink under either's feet.

It has no name in any file system: whoever knows process and file descriptor opens it at /proc/PID/fd/FD, and it is
gone with the last process that maps it. To read what has shrunk away would kill the reader, so it is sealed against
that, and nothing is opened that is not. Linux only. [ours]
"""

from __future__ import annotations

import mmap
import os
import resource
import stat
import sys
from pathlib import Path

if sys.platform == "linux":
    import fcntl

_NAME = "mergesfl"
NONCE_BYTES = 16  # random, at the beginning: who finds them there has the memory that was meant
Source = tuple[int, int]  # pid and file descriptor of who made it
Identity = tuple[int, int]  # device and inode


def make_memory(num_bytes: int) -> tuple[mmap.mmap, int]:
    """New memory that begins with a nonce, and its file descriptor, which is to be kept as long as it may be opened.

    Only what is used takes memory. Raises OSError: this system has none such, or gives none.
    """
    if sys.platform != "linux" or not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
        raise OSError("no sealed memory on this system")
    _check_system()
    handle = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(handle, os.urandom(NONCE_BYTES), 0)  # before it has the size and seals with which it may be opened
        os.ftruncate(handle, num_bytes)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = mmap.mmap(handle, num_bytes)
    except BaseException:
        os.close(handle)
        raise
    return memory, handle


def open_memory(source: Source, num_bytes: int, nonce: bytes) -> tuple[mmap.mmap, Identity]:
    """What another process has made, once all is found as it must be. Raises OSError and ValueError.

    The other one, who may be anybody where the server listens on TCP, may name any file of any process: none is looked
    at that is no memory of this name, none is opened that is not of this size and user, and none is mapped that could
    shrink, or does not begin with the nonce.
    """
    if sys.platform != "linux" or not hasattr(fcntl, "F_GET_SEALS"):
        raise OSError("no sealed memory on this system")
    if not os.readlink(_path(source)).startswith(f"/memfd:{_NAME}"):  # noqa: PTH115 (asks no file system)
        raise ValueError("no memory of mergesfl")
    _check_system()
    looked_at = os.open(_path(source), os.O_PATH | os.O_CLOEXEC)  # opens nothing yet
    try:
        found = os.fstat(looked_at)
        if not stat.S_ISREG(found.st_mode) or found.st_size != num_bytes or found.st_uid != os.geteuid():
            raise ValueError(f"no memory of this user and of {num_bytes} bytes")
        handle = os.open(f"/proc/self/fd/{looked_at}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(looked_at)
    try:
        if not fcntl.fcntl(handle, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("memory that may shrink")
        memory = mmap.mmap(handle, num_bytes)  # keeps a descriptor of its own
    finally:
        os.close(handle)
    if memory[:NONCE_BYTES] != nonce:
        raise ValueError("memory with another nonce")
    return memory, (found.st_dev, found.st_ino)


def identity_of(source: Source) -> Identity | None:
    """Of what a process has open there; None: nothing, or nothing that we may see."""
    try:
        found = os.stat(_path(source))  # noqa: PTH116 (no Path: asked of many workers every second)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _path(source: Source) -> str:
    pid, handle = source
    return f"/proc/{pid}/fd/{handle}"


def _check_system() -> None:
    """Raises OSError where memory that is mapped and not used yet would count, or could be missing when it is used."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        raise OSError("the address space is limited (ulimit -v)")
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        raise OSError("the system does not overcommit memory (vm.overcommit_memory = 2)")
