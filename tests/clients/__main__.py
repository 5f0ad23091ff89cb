"""`python -m tests.clients`: run clients by others against a gateway, and print a line for each thing they do.

    python -m tests.clients                                     # a simulated fleet and its gateway are started
    python -m tests.clients --url http://127.0.0.1:4000 --model qwen3-4b --key sk-fleet-...

Exits with 1 if anything failed. Node.js and npm are needed. With --url, what needs more than an answer with text is
left out, unless --tools or --json say that the model can do it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import platformdirs

from tests.clients import (
    agents_sdk,
    ai_sdk,
    ai_sdk_anthropic,
    anthropic_node,
    claude_code,
    codex,
    lang_chain,
    lang_chain_others,
    ollama_node,
    openai_node,
    opencode,
)
from tests.clients.client import Client, Failed, Result, Target
from tests.clients.own_fleet import own_fleet
from tests.clients.packages import install

_OF_OPENAI = (openai_node, ai_sdk, agents_sdk, lang_chain, codex, opencode)
_OF_ANTHROPIC = (anthropic_node, ai_sdk_anthropic, claude_code)
CLIENTS = tuple(module.CLIENT for module in (*_OF_OPENAI, *_OF_ANTHROPIC, ollama_node, lang_chain_others))


def main() -> int:
    options = _options()
    chosen = [client for client in CLIENTS if not options.only or client.name in options.only]
    versions = install(options.cache, chosen, newest=options.newest)
    given = nullcontext((options.url, _models(options, chosen))) if options.url else own_fleet(chosen)
    failed = 0
    with given as (url, models):
        for client in chosen:
            version = ", ".join(f"{name} {versions[name]}" for name in client.packages)
            print(f"{client.name} ({version}) at {url}")
            failed += _run(client, Target(url, options.key, models, options.cache, _folder(), options.patience))
    print("all passed" if not failed else f"{failed} failed")
    return 1 if failed else 0


def _run(client: Client, target: Target) -> int:
    """Run all checks of a client; return how many failed."""
    failed, began = 0, time.monotonic()
    try:
        for result in _results(client, target):
            now = time.monotonic()
            print(f"  {'ok  ' if result.passed else 'FAIL'} {result.check} ({now - began:.1f} s): {result.said}")
            failed, began = failed + (not result.passed), now
    finally:
        shutil.rmtree(target.folder, ignore_errors=True)
    return failed


def _results(client: Client, target: Target):
    try:
        yield from client.run(target)
    except Failed as failure:
        yield Result("all", False, str(failure))


def _models(options: argparse.Namespace, clients: list[Client]) -> dict[str, str]:
    roles = [
        "text",
        *(["json"] if options.json else []),
        *([client.name for client in clients] if options.tools else []),
    ]
    return dict.fromkeys(roles, options.model)


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fleet-client-"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a running gateway, without a path; without one, one is started")
    parser.add_argument("--model", help="that answers there")
    parser.add_argument("--tools", action="store_true", help="that model calls tools when it should")
    parser.add_argument("--json", action="store_true", help="that model's server keeps to a response_format")
    parser.add_argument("--key", default="none", help="of that gateway")
    parser.add_argument("--only", action="append", choices=[client.name for client in CLIENTS])
    parser.add_argument("--newest", action="store_true", help="install the newest versions of all clients")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds that a program may take; default: 180")
    cache = platformdirs.user_cache_path("fleet-worker") / "clients"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where clients are installed; default: {cache}")
    options = parser.parse_args()
    if bool(options.url) != bool(options.model):
        parser.error("--url needs --model, and --model needs --url")
    options.cache = options.cache.absolute()
    return options


if __name__ == "__main__":
    sys.exit(main())
