import subprocess
import sys

import pytest

import fleet_worker

WATCHED = """
import sys, threading
seen = []
sys.addaudithook(lambda event, args: event.startswith("socket.") and seen.append(event))
import fleet_worker, fleet_worker.celery, fleet_worker.cli, fleet_worker.router.router
assert not seen, seen
assert threading.active_count() == 1, threading.enumerate()
"""


def test_the_names_of_the_package_can_be_imported():
    names = {}
    exec("from fleet_worker import *", names)
    assert set(fleet_worker.__all__) <= names.keys()


def test_the_readme_s_names_are_there():
    assert {"Router", "Settings", "ChatResponse", "EmbedResponse", "Delta", "FleetError"} <= set(fleet_worker.__all__)


def test_dir_shows_the_public_names():
    assert set(fleet_worker.__all__) <= set(dir(fleet_worker))


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


SLOW = "{'celery', 'kombu', 'redis', 'httpx', 'psutil', 'pydantic', 'rich', 'tomlkit'}"
LOADED = f"print({SLOW} & set(sys.modules), file=sys.stderr)"
HELP = f"""
import sys
from fleet_worker.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
finally:
    {LOADED}
"""


def test_the_errors_load_nothing_large():
    done = run(f"import sys, fleet_worker.errors; {LOADED}")
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_help_loads_nothing_large():
    done = run(HELP)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert "Usage: " in done.stdout


OF_COMMANDS = {"prompt_toolkit", "celery.bin.celery", "fleet_worker.cli", "fleet_worker.ops", "fleet_worker.setup"}
OF_OTHERS = OF_COMMANDS | {"tomlkit", "prometheus_client", "fleet_worker.simulator"}
OF_GATEWAY = {"uvicorn", "fleet_worker.gateway"}
OF_NODES = {"httpx", "rich", "fleet_worker.node.node"}
UNUSED = {
    "a node": ("node.__main__, fleet_worker.node.inference_node", OF_OTHERS | OF_GATEWAY | {"fleet_worker.router"}),
    "a registry node": ("node.__main__", OF_OTHERS | OF_GATEWAY | OF_NODES | {"fleet_worker.router"}),
    "a router": ("router.router", OF_OTHERS | OF_GATEWAY | OF_NODES | {"fleet_worker.node"}),
    "a gateway": ("gateway.serve", OF_OTHERS | OF_NODES | {"fleet_worker.node"}),
    "up": ("setup.foreground", {"celery", "kombu", "redis", "prompt_toolkit", "uvicorn", "fleet_worker.router"}),
}
"""By process that runs all the time: what it imports of us, and what it must not import, since it would keep that."""


@pytest.mark.parametrize("process", UNUSED)
def test_a_process_that_runs_all_the_time_imports_nothing_large_that_it_never_uses(process):
    modules, unused = UNUSED[process]
    done = run(f"import sys, fleet_worker.{modules}; print(sorted({unused} & set(sys.modules)))")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
