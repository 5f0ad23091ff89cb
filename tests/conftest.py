"""For every test: no FLEET_* variable of the machine is seen, and its folder says which tier it belongs to."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# The machines that run this are busy: a slow example is no failure.
settings.register_profile("fleet", deadline=None, max_examples=80)
settings.load_profile("fleet")

TIERS = ("unit", "flow", "integration", "faults")


def pytest_collection_modifyitems(items):
    for item in items:
        tier = next((part for part in Path(item.path).parts if part in TIERS), None)
        if tier:
            item.add_marker(tier)


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("FLEET_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def interruptible():
    """A test run in the background, or under nohup, has these ignored, and so would what it starts."""
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
