"""A process that asks macOS for notice of its sleep: `python -m fleet_worker.host.availability.mac_sleep`.

It prints `PrepareForSleep true` and waits for a line on its input, at most DELAY seconds, before it lets the machine
sleep; after the sleep it prints `PrepareForSleep false`. It ends with its input. It is a process of its own so that
no mistake in foreign code reaches `up`; if it ends, macOS waits for it no longer.

Source: Apple's Technical Q&A QA1340, `IOPMLib.h`, `IOMessage.h`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable

from fleet_worker.exit_codes import UNAVAILABLE

FRAMEWORKS = "/System/Library/Frameworks"
CAN_SLEEP = 0xE0000270
WILL_SLEEP = 0xE0000280
HAS_POWERED_ON = 0xE0000300
DELAY = 20.0
"""Seconds; macOS waits 30 s at most."""

Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)


class Messages:
    """Answers the messages of macOS about its sleep."""

    def __init__(self, *, say: Callable[[str], None], allow: Callable[[int], None], wait: Callable[[], None]) -> None:
        self._say = say
        self._allow = allow
        self._wait = wait

    def receive(self, kind: int, argument: int) -> None:
        if kind == CAN_SLEEP:  # from idleness: `keep_awake` prevents that while requests run
            self._allow(argument)
        elif kind == WILL_SLEEP:
            self._say("PrepareForSleep true")
            self._wait()
            self._allow(argument)
        elif kind == HAS_POWERED_ON:
            self._say("PrepareForSleep false")


def run(
    iokit: ctypes.CDLL, core_foundation: ctypes.CDLL, messages: Callable[[Callable[[int], None]], Messages]
) -> None:
    """Register with IOKit and handle its messages; returns only if macOS refuses.

    `messages` gets the function that lets the machine sleep.
    """
    iokit.IORegisterForSystemPower.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        Callback,
        ctypes.POINTER(ctypes.c_uint32),
    ]
    iokit.IORegisterForSystemPower.restype = ctypes.c_uint32
    iokit.IONotificationPortGetRunLoopSource.argtypes = [ctypes.c_void_p]
    iokit.IONotificationPortGetRunLoopSource.restype = ctypes.c_void_p
    iokit.IOAllowPowerChange.argtypes = [ctypes.c_uint32, ctypes.c_long]
    core_foundation.CFRunLoopGetCurrent.restype = ctypes.c_void_p
    core_foundation.CFRunLoopAddSource.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    port, notifier = ctypes.c_void_p(), ctypes.c_uint32()
    answers = messages(lambda argument: iokit.IOAllowPowerChange(root, argument))
    callback = Callback(lambda _context, _service, kind, argument: answers.receive(kind, argument or 0))
    root = iokit.IORegisterForSystemPower(None, ctypes.byref(port), callback, ctypes.byref(notifier))
    if root:
        source = iokit.IONotificationPortGetRunLoopSource(port)
        mode = ctypes.c_void_p.in_dll(core_foundation, "kCFRunLoopDefaultMode")
        core_foundation.CFRunLoopAddSource(core_foundation.CFRunLoopGetCurrent(), source, mode)
        core_foundation.CFRunLoopRun()


def main() -> int:
    allowed = threading.Event()

    def read() -> None:
        while sys.stdin.readline():
            allowed.set()
        os._exit(0)

    def wait() -> None:
        allowed.clear()
        allowed.wait(DELAY)

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    try:
        iokit = ctypes.CDLL(f"{FRAMEWORKS}/IOKit.framework/IOKit")
        core_foundation = ctypes.CDLL(f"{FRAMEWORKS}/CoreFoundation.framework/CoreFoundation")
    except OSError:
        return UNAVAILABLE
    threading.Thread(target=read, daemon=True).start()
    run(iokit, core_foundation, lambda allow: Messages(say=say, allow=allow, wait=wait))
    return UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main())
