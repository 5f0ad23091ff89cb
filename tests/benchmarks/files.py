"""Which files of the package one streamed chat enters, in the router and in its node together.

    python -m tests.benchmarks.files [--chats 5]

A profiler notes the file of every Python call, in all threads of both processes. Counted is what every one of several
short chats enters, after a first one that is not counted: neither imports nor what runs once a second is among it.
The simulated MLX server is not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parent.parent.parent / "fleet_worker"
ROOT = PACKAGE.parent
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
SETTLED = 0.2
"""Seconds until the node has finished its task, after the router has the last frame."""
NOT_COUNTED = ("simulator", "testing.py")
ADDRESS = "FILES_ADDRESS"
"""The variable that tells the node at which Unix socket it hands over what it entered."""
SITECUSTOMIZE = """
import os, sys
sys.path.insert(0, {root!r})
from {module} import answer, profile
answer(os.environ[{address!r}], profile())
"""


def profile() -> set[str]:
    """Profile this process from now on; return the set that the names of entered files are added to."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    return entered


def answer(address: str, entered: set[str]) -> None:
    """Hand over what was entered, and forget it, whenever somebody connects to this Unix socket."""

    def serve() -> None:
        with Listener(address, "AF_UNIX") as listener:
            while True:
                with listener.accept() as connection:
                    connection.send(taken(entered))

    threading.Thread(target=serve, daemon=True).start()


def taken(entered: set[str]) -> set[str]:
    files = set(entered)
    entered.clear()
    return files


def counted(files: set[str]) -> set[str]:
    inside = {Path(file).relative_to(PACKAGE) for file in files if Path(file).is_relative_to(PACKAGE)}
    return {str(file) for file in inside if file.parts[0] not in NOT_COUNTED}


def hold(chats: int) -> list[tuple[set[str], set[str]]]:
    """Hold a chat, and then as many as that; return the files that each of these entered in the router and the node."""
    own = profile()
    from fleet_worker import Router, Settings
    from fleet_worker.testing import SimulatedMLX, embedded_broker, running_node

    with tempfile.TemporaryDirectory() as folder, embedded_broker() as url, SimulatedMLX(models=["sim-chat"]) as mlx:
        address = f"{folder}/files"
        start = {"root": str(ROOT), "module": "tests.benchmarks.files", "address": ADDRESS}
        Path(folder, "sitecustomize.py").write_text(SITECUSTOMIZE.format(**start), "utf-8")
        env = {"PYTHONPATH": folder, ADDRESS: address}
        seen = []
        with (
            running_node(url, base_url=mlx.base_url, models={"sim-chat": {}}, env=env),
            Router(Settings(broker_url=url)) as router,
        ):
            for _ in range(chats + 1):
                with router.stream_chat("sim-chat", MESSAGES, max_tokens=20, timeout=20) as stream:
                    for _ in stream:
                        pass
                time.sleep(SETTLED)
                seen.append((counted(taken(own)), counted(hand_over(address))))
    sys.setprofile(None)
    threading.setprofile(None)
    return seen[1:]


def hand_over(address: str) -> set[str]:
    with Client(address, "AF_UNIX") as connection:
        files: set[str] = connection.recv()
        return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=5)
    seen = hold(parser.parse_args().chats)
    router, node = (set.intersection(*each) for each in zip(*seen, strict=True))
    for file in sorted(router | node, key=lambda file: (str(Path(file).parent), file)):
        print(f"{file:40} {'router' if file in router else '':6} {'node' if file in node else ''}")
    rooms = Counter(str(Path(file).parent) for file in router | node)
    print(", ".join(f"{room if room != '.' else 'root'} {number}" for room, number in sorted(rooms.items())))
    print(f"{len(router | node)} files: {len(router)} in the router, {len(node)} in the node")
    print(f"{len(set().union(*map(set().union, *seen)))} with what runs now and then")


if __name__ == "__main__":
    main()
