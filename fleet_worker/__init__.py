"""Any number of Mac minis running MLX servers, one inference service."""

from fleet_worker import errors
from fleet_worker.errors import *  # noqa: F403
from fleet_worker.protocol.reply import ChatResponse, Delta, EmbedResponse, Timings, Usage
from fleet_worker.router.call import ChatStream
from fleet_worker.router.router import Router
from fleet_worker.settings import Instance, Model, Settings

__version__ = "0.1.0"

__all__ = [
    *errors.__all__,
    "ChatResponse",
    "ChatStream",
    "Delta",
    "EmbedResponse",
    "Instance",
    "Model",
    "Router",
    "Settings",
    "Timings",
    "Usage",
]
