"""What a process does whose log is on a full disk: it goes on, and loses lines."""

import subprocess
import sys
from pathlib import Path

import pytest

from fleet_worker.host.child_process import python

FULL = Path("/dev/full")
SPEAKS = """
import logging, sys
from fleet_worker.host.lossy_output import lose_what_cannot_be_written
lose_what_cannot_be_written()
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
logging.info("one")
print("two", file=sys.__stdout__)
print("three", file=sys.stderr, flush=True)
sys.exit(78)
"""


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full on macOS")
def test_a_full_disk_changes_no_exit_code():
    """Python would make it 120, so a node with a wrong configuration would be started again and again."""
    with FULL.open("w") as full:
        done = subprocess.run(python("-c", SPEAKS), stdout=full, stderr=subprocess.PIPE, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (78, "three\n")


def test_what_can_be_written_is():
    """Each line at once, in its order."""
    done = subprocess.run(python("-c", SPEAKS), capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == ("INFO:root:one\ntwo\n", "three\n")


def test_streams_that_were_replaced_stay():
    """As in a test that captures them."""
    program = "import io; sys.stdout = mine = io.StringIO(); lose_what_cannot_be_written(); assert sys.stdout is mine"
    imports = "import sys; from fleet_worker.host.lossy_output import lose_what_cannot_be_written; "
    assert subprocess.run([sys.executable, "-c", imports + program], timeout=20).returncode == 0
