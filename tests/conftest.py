"""What holds for every test: which run it belongs to, in which order they run, and a clean environment.

`pytest` runs what touches every promise once, `pytest --rest` all that this leaves out, `pytest FILE` all of a file.
"""

import contextlib
import gc
import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from fleet_worker import Router, Settings
from tests.brokers import BROKERS

TIERS = ("faults", "integration", "flow", "unit")
"""The slowest first."""

# Hundreds of processes begin here. Each would compile the package again where an image says that nothing is kept.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No deadline for an example: the machines that run this are busy.
settings.register_profile("short", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=300)


def pytest_addoption(parser):
    parser.addoption("--rest", action="store_true", help="run what a run without this option leaves out")


def pytest_configure(config):
    named = any(".py" in argument for argument in config.args)
    config.stash[WHOLE] = named and not config.option.rest
    settings.load_profile("thorough" if named or config.option.rest else "short")


WHOLE = pytest.StashKey[bool]()
"""Whether files were named, and so everything in them runs."""


def pytest_sessionstart(session):
    """Each process of pytest-xdist collects all files. Compile a part of them before that, for the others, too."""
    if hasattr(session.config, "workerinput"):
        number, count = (session.config.workerinput[name] for name in ("workerid", "workercount"))
        root = Path(__file__).parent
        for file in sorted(root.rglob("test_*.py"))[int(number.removeprefix("gw")) :: count]:
            with contextlib.suppress(Exception, pytest.skip.Exception):  # told when it is collected
                importlib.import_module(".".join(file.with_suffix("").relative_to(root.parent).parts))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keep the garbage collector from what all tests are made of, now and later: it stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(tier(item))
        if on_rabbitmq(item.nodeid) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(150))  # RabbitMQ starts within the time of its first test
    if not config.stash[WHOLE]:
        belongs = is_of_the_rest if config.option.rest else is_short
        left_out = [item for item in items if not belongs(item)]
        items[:] = [item for item in items if belongs(item)]
        config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workerinput"):  # of pytest-xdist: what takes long begins first, so that all end together
        items.sort(key=lambda item: ("rabbitmq" not in item.name, TIERS.index(tier(item))))


def tier(item):
    return next(part for part in Path(item.path).parts if part in TIERS)


def is_short(item):
    if item.get_closest_marker("rest"):
        return False
    return not on_rabbitmq(item.nodeid) or item.get_closest_marker("both_brokers") is not None


def is_of_the_rest(item):
    """Hypothesis tests run again, with more examples."""
    return not is_short(item) or getattr(item.obj, "is_hypothesis_test", False)


def on_rabbitmq(nodeid):
    return "rabbitmq" in nodeid.partition("[")[2]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`: the tests of a file run in one process, and so do those of a folder that share what takes seconds to
    start: RabbitMQ, or the fleet behind a gateway."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if on_rabbitmq(nodeid):
                return f"rabbitmq {Path(file).parent if config.option.rest else ''}"
            return str(Path(file).parent) if "flow/gateway/" in file else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch):
    """No FLEET_* variable of the machine is seen, and no ~/fleet/worker.toml."""
    for name in os.environ:
        if name.upper().startswith("FLEET_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FLEET_CONFIG", "")


@pytest.fixture(autouse=True)
def interruptible():
    """A test run in the background, or under nohup, ignores these signals, and so would every process it starts."""
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", params=BROKERS)
def broker(request):
    """A real one. A test that uses it runs on Valkey and on RabbitMQ."""
    with BROKERS[request.param]() as broker:
        yield broker


@pytest.fixture
def router(broker):
    with Router(Settings(broker_url=broker.url)) as router:
        yield router
