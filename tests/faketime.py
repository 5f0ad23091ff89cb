"""Processes whose clock is wrong, by libfaketime (apt-get install faketime)."""

from pathlib import Path

from tests.brokers import missing

SITE = Path(__file__).with_name("faketime_site")


def wrong_clock(by):
    """The environment of a process whose clock is `by` ahead, as in "+90s" or "-1h", and runs on as it should.

    With a path it reads that from the file, again and again.
    """
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        missing("libfaketime is not installed (apt-get install faketime)")
    told = {"FAKETIME_TIMESTAMP_FILE": str(by), "FAKETIME_NO_CACHE": "1"} if isinstance(by, Path) else {"FAKETIME": by}
    only_wall_clock = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": str(SITE)}
    return {"LD_PRELOAD": str(libraries[0]), **only_wall_clock, **told}
