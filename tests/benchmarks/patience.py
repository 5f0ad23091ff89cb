"""`python -m tests.benchmarks.patience`: managed servers that are slow but well, for ten minutes, with usual settings.

One embeds only and is idle most of the time. One has two models, needs a minute to load the other one, and is asked for
them in turn. One reads long prompts and generates slowly for four times as many requests as it can run. None of them
may be restarted, and no request may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import tempfile
import time
from collections import Counter
from pathlib import Path

from fleet_worker import FleetError, Router, Settings
from fleet_worker.host.child_process import free_port, python
from fleet_worker.testing import embedded_broker, worker_toml
from tests.fleets import READY_WITHIN
from tests.ups import running_up

LONG = [{"role": "user", "content": "word " * 4_000}]
SHORT = [{"role": "user", "content": "Hello"}]
SERVERS = {
    "embeds": ("--flavour openai --model all-minilm-l6-v2", 4),
    "loads": ("--model warm --listed cold --model cold --load-delay 60", 4),
    "is full": ("--model busy --slots 2 --prefill-rate 200 --prompt-cache-size 0 --token-interval 0.5 --tokens 40", 8),
}
MODELS = {"embeds": ["all-minilm-l6-v2"], "loads": ["warm", "cold"], "is full": ["busy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    seconds = parser.parse_args().minutes * 60
    with embedded_broker() as url, tempfile.TemporaryDirectory(prefix="patience-") as folder:
        config = Path(folder, "worker.toml")
        lines = [f"{name} = {json.dumps(value)}" for name, value in _head(url, folder).items()]
        config.write_text("\n".join([*lines, *map(_instance, SERVERS)]))
        with running_up(python("-m", "fleet_worker", "up"), {"FLEET_CONFIG": str(config)}) as up:
            for name in SERVERS:
                up.wait_for(f"{_id(name)}@slow is ready", READY_WITHIN)
            asyncio.run(_use(url, time.monotonic() + seconds))


def _head(url: str, folder: str) -> dict[str, str]:
    return {"host": "slow", "state_dir": folder, "broker_url": url}


def _id(name: str) -> str:
    return name.replace(" ", "-")


def _instance(name: str) -> str:
    options, slots = SERVERS[name]
    serve = shlex.join([*python("-P", "-m", "fleet_worker.simulator"), *options.split()]) + " --port {port}"
    models = {model: {} for model in MODELS[name]}
    more = {"serve": serve, "base_url": f"http://127.0.0.1:{free_port()}", "models": models}
    return worker_toml(_id(name), {**more, "limits": {"concurrency": slots}, "clocks": {"first_content": 600}})


async def _use(url: str, ends: float) -> None:
    told: Counter[str] = Counter()
    async with Router(Settings(broker_url=url)) as router:

        async def embed() -> None:
            await router.aembed("all-minilm-l6-v2", ["a text"], timeout=300)
            await asyncio.sleep(20)

        async def swap() -> None:
            for model in MODELS["loads"]:
                await router.achat(model, SHORT, max_tokens=8, timeout=300)

        async def wait() -> None:
            await router.achat("busy", LONG, max_tokens=40, timeout=600)

        async def again(name: str, use: object) -> None:
            while time.monotonic() < ends:
                try:
                    await use()  # type: ignore[operator]
                    told[f"{name}: answered"] += 1
                except FleetError as error:
                    told[f"{name}: {error.code}"] += 1

        uses = [("embeds", embed), ("loads", swap), *[("is full", wait)] * 8]
        await asyncio.gather(*(again(name, use) for name, use in uses))
        for instance in sorted(router.registry.instances(), key=lambda each: each.name):
            done = {what: number for what, number in told.items() if _id(what.partition(":")[0]) == instance.name}
            print(f"{instance.name}: restarts {instance.server_restarts}, deaths {instance.server_deaths}, {done}")


if __name__ == "__main__":
    main()
