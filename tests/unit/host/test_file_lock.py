import fcntl
import os
import stat
import threading

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.child_process import child, python
from fleet_worker.host.file_lock import Held, hold, holder

WITHIN = 10.0
HOLDING = """
import signal, sys
from pathlib import Path
from fleet_worker.host.file_lock import hold
lock = hold(Path(sys.argv[1]))
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "up-mini.lock"


@pytest.fixture
def holding(path):
    with child("the holder", python("-c", HOLDING, str(path))) as process:
        process.wait_for("held", WITHIN)
        yield process


def test_a_name_is_held_once_and_its_holder_is_known(path, holding):
    with pytest.raises(Held, match=str(holding.pid)) as caught:
        hold(path)
    assert caught.value.pid == holder(path) == holding.pid


def test_a_name_is_free_when_its_holder_has_been_killed(path, holding):
    holding.stop()
    assert holder(path) is None
    with hold(path):
        assert path.read_text() == str(os.getpid())
    assert holder(path) is None


def test_nobody_holds_what_has_never_been_held(path):
    assert holder(path) is None
    assert not path.exists()


def test_a_holder_that_has_not_said_who_it_is_holds_the_name_all_the_same(path, holding):
    path.write_text("")
    with pytest.raises(Held, match="unknown"):
        hold(path)


def test_the_folder_is_for_its_owner_only(path):
    with hold(path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_child_does_not_hold_on_to_what_its_parent_held(path):
    lock = hold(path)
    with child("a child", python("-S", "-c", "import signal; print('up', flush=True); signal.pause()")) as process:
        process.wait_for("up", WITHIN)
        lock.close()
        assert holder(path) is None


def test_a_folder_that_cannot_be_is_a_matter_of_configuration(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="state_dir"):
        hold(tmp_path / "file" / "up.lock")


def test_one_that_only_asks_who_holds_a_name_does_not_keep_it(path):
    path.parent.mkdir()
    with path.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        ends = threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN))
        ends.start()
        hold(path).close()
        ends.join()


def test_a_folder_that_cannot_be_read_is_told(path):
    path.parent.write_text("a file")
    with pytest.raises(ConfigurationError, match=r"state_dir: .* cannot be read: Not a directory"):
        holder(path)


def test_a_holder_whose_number_is_damaged_is_unknown(path, holding):
    path.write_bytes(b"\xff" * 10_000)
    assert holder(path) is None
    with pytest.raises(Held, match="unknown"):
        hold(path)
