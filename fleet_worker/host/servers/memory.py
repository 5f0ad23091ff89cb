"""The memory of processes, as the system counts it before it runs out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import psutil


def memory_of(processes: Iterable[psutil.Process]) -> int | None:
    """Return the bytes that they hold together; None if that cannot be read of any of them.

    On macOS the footprint, as Activity Monitor shows it: the resident size knows little of the memory of the GPU. On
    Linux what is resident or swapped, with pages that processes share counted once.
    """
    found = [size for process in processes if (size := _memory(process)) is not None]
    return sum(found) if found else None


def _memory(process: psutil.Process) -> int | None:
    try:
        if sys.platform == "darwin":
            return _footprint(process.pid)
        more = process.memory_full_info()
        return int(more.pss + more.swap)
    except (psutil.Error, OSError, AttributeError):
        return _resident(process)


def _resident(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended, or is another user's
        return None


class _Usage(ctypes.Structure):
    """`struct rusage_info_v0` of <sys/resource.h>."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        *((name, ctypes.c_uint64) for name in ("user", "system", "idle_wakeups", "wakeups", "pageins", "wired")),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("started", ctypes.c_uint64),
        ("exited", ctypes.c_uint64),
    )


def _footprint(pid: int) -> int:
    """Return the footprint of a process of this user on macOS; raises `OSError`."""
    usage = _Usage()
    libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    if libproc.proc_pid_rusage(pid, 0, ctypes.byref(usage)):
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return int(usage.phys_footprint)
