"""What several tests of setup need."""

import pytest

from fleet_worker.host.child_process import child, free_port
from fleet_worker.host.embedded_broker import READY, broker_command
from fleet_worker.settings import Settings


@pytest.fixture(scope="module")
def password():
    """Of the broker of `fleet`."""
    return "hush-hush"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, password):
    """The settings of the host that runs the broker."""
    up = {"broker": True, "address": "127.0.0.1"}
    url = f"redis://:{password}@127.0.0.1:{free_port()}/0"
    settings = Settings(broker_url=url, up=up, state_dir=tmp_path_factory.mktemp("state"), max_body_bytes=4096)
    with child("broker", [*broker_command(settings), "--loglevel", "notice"]) as process:
        process.wait_for(READY, 20)
        yield settings
