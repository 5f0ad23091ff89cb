"""The instance that the options of `init` name: a server that runs, or the command line of one."""

from __future__ import annotations

import shlex
from dataclasses import replace

from fleet_worker.errors import ConfigurationError
from fleet_worker.setup.command_words import option_of
from fleet_worker.setup.found_instances import of_server, public_name, serving
from fleet_worker.setup.local_servers import server_at
from fleet_worker.setup.worker_file import WorkerInstance


def of_url(url: str, model: str | None) -> WorkerInstance:
    """Return the instance of a server that runs at a URL, with the model of that name or those that it lists.

    Raises:
        ConfigurationError: there is no MLX server, or it does not say what it serves, and `model` is not given.
    """
    server = server_at(url)
    if found := server and of_server(server, model):
        return found
    if model:
        return WorkerInstance(base_url=url, models={public_name(model): {"backend": model}})
    if not server:
        raise ConfigurationError(f"no MLX server answers at {url}: start it, or name its model too: --model NAME")
    lists = "wants a key" if server.wants_key else "does not say which model it was started with"
    raise ConfigurationError(f"the server at {url} {lists}: add --model NAME")


def of_command(line: str, model: str | None) -> WorkerInstance:
    """Return the instance of a server that `fleet-worker up` starts by this command line.

    Its model is the one of that name, or else the value of `--model` in the command line.

    Raises:
        ConfigurationError: the command line cannot be split into words, or names no model, and `model` is not given.
    """
    try:
        words = shlex.split(line)
    except ValueError:
        raise ConfigurationError("--serve has a quote that is not closed, or ends with a backslash") from None
    named = model or option_of("--model", words)
    if not named:
        raise ConfigurationError("--serve names no model: add --model NAME")
    if any("mlx_lm" in word for word in words):
        return replace(serving(named), serve=line)
    return WorkerInstance(serve=line, models={public_name(named): {"backend": named}})
