"""The log of a service of launchd does not grow for ever."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fleet_worker.host.log_bound import bound_output, turn_over

WRITES = """
import sys, time
from pathlib import Path
from fleet_worker.host.log_bound import bound_output
path = Path(sys.argv[1])
if bound_output(path, most=1000, look_every=0.002) is None:
    sys.exit(3)
older, deadline = path.with_name("up.log.1"), time.monotonic() + 20
while not older.exists() or path.stat().st_size > 500:  # so no move has begun
    if time.monotonic() > deadline:
        sys.exit("it grows")
    print("x" * 99, flush=True)
    time.sleep(0.001)
print("the end", flush=True)
"""


def run(path, to, mode):
    with open(to, mode) as output:
        command = [sys.executable, "-c", WRITES, str(path)]
        return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=60, check=False)


def test_what_is_appended_to_it_stays_within_bounds_while_processes_write(tmp_path):
    path = tmp_path / "up.log"
    path.write_text("from before\n", "utf-8")
    done = run(path, path, "ab")
    assert (done.returncode, done.stderr) == (0, b"")
    assert path.read_text("utf-8").endswith("the end\n")
    assert path.read_bytes().count(0) == 0
    assert path.stat().st_size <= 2000
    assert stat.S_IMODE(path.with_name("up.log.1").stat().st_mode) == 0o600


@pytest.mark.parametrize(("to", "mode"), [("another.log", "ab"), ("up.log", "wb")])
def test_files_of_others_are_left_alone(to, mode, tmp_path):
    path = tmp_path / "up.log"
    path.write_text("mine" * 1000, "utf-8")
    assert run(path, tmp_path / to, mode).returncode == 3


def test_a_log_that_is_not_there_or_no_file_is_none(tmp_path):
    assert bound_output(tmp_path / "up.log") is None
    assert bound_output(Path("/dev/null")) is None


def test_the_older_part_is_the_last_one(tmp_path):
    path = tmp_path / "up.log"
    for text in ("one", "two"):
        path.write_text(text, "utf-8")
        turn_over(path)
    assert (path.read_text("utf-8"), path.with_name("up.log.1").read_text("utf-8")) == ("", "two")
