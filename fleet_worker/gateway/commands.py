"""The commands of the gateway: `fleet-worker gateway`. Nothing dear is imported before one of them runs."""

from __future__ import annotations

import logging
import sys

import click

from fleet_worker.errors import ConfigurationError


@click.command(short_help="Serve OpenAI and Anthropic clients over HTTP.")
def gateway() -> None:
    """Serve OpenAI and Anthropic clients over HTTP, in front of the whole fleet.

    The address and all else are settings, in the section [gateway] of the file that FLEET_CONFIG names; by default
    http://127.0.0.1:4000. SIGTERM and Ctrl-C let running requests end. SIGHUP reads the file of keys again.
    """
    from fleet_worker.settings import Settings

    try:
        from fleet_worker.gateway.serve import serve
    except ModuleNotFoundError as error:
        text = f"the gateway needs {error.name}: pip install 'fleet-worker[gateway]'"
        raise ConfigurationError(text) from None
    form = "[%(asctime)s: %(levelname)s/gateway] %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=form)
    serve(Settings())
