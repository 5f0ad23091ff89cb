"""All errors, as one tree.

FleetError
├── ConfigurationError          this process is set up wrongly; nothing was sent
├── BrokerUnavailable           the broker cannot be reached
├── InvalidRequest              the request cannot work on any node
│   ├── ContextLengthExceeded
│   ├── UnsupportedCapability
│   └── UnsupportedParameter
├── ModelNotServed              this instance does not serve that model
├── ModelUnavailable            no instance of the fleet offers that model
├── PolicyError                 not allowed here
├── Unauthorized                the MLX server refused the worker's key
├── Cancelled                   the caller cancelled the request
├── Expired                     the deadline passed before the work began
│   └── QueueTimeout            no node took the request within its queue_timeout, or none is ready
├── FleetSaturated              too many requests wait for that model already
├── NodeLost                    the node that ran the request sends no more heartbeats
├── PoisonSuspected             two MLX servers died or froze while they ran the request
├── StreamInterrupted           a stream ended where it cannot be continued
├── ReplyLost                   a part of the reply never arrived
├── ReplyOverflow               the caller reads slower than its buffer allows
└── ProviderError               the MLX server failed
    ├── InstanceUnavailable
    ├── Overloaded
    ├── RequestTimeout
    ├── ConnectionFailure
    └── MalformedOutput
        └── InvalidOutput       the model's answer is not the JSON that was asked for

An error is sent as data (`code`, `message`, `retryable`, `metadata`) and rebuilt by the receiver as the same class:
the code is the name of the class in snake_case.
All texts are written here: none contains anything that a caller or an MLX server wrote.
"""

from __future__ import annotations

import re
import traceback
from typing import Any, ClassVar

__all__ = [
    "BrokerUnavailable",
    "Cancelled",
    "ConfigurationError",
    "ConnectionFailure",
    "ContextLengthExceeded",
    "Expired",
    "FleetError",
    "FleetSaturated",
    "InstanceUnavailable",
    "InvalidOutput",
    "InvalidRequest",
    "MalformedOutput",
    "ModelNotServed",
    "ModelUnavailable",
    "NodeLost",
    "Overloaded",
    "PoisonSuspected",
    "PolicyError",
    "ProviderError",
    "QueueTimeout",
    "ReplyLost",
    "ReplyOverflow",
    "RequestTimeout",
    "StreamInterrupted",
    "Unauthorized",
    "UnsupportedCapability",
    "UnsupportedParameter",
]


class FleetError(Exception):
    """The root. `code` names the class in messages; `retryable` is True if another node may succeed."""

    code: ClassVar[str] = "fleet_error"
    retryable: bool = False
    _by_code: ClassVar[dict[str, type[FleetError]]] = {}

    def __init_subclass__(cls, code: str = "") -> None:
        """The code of `NodeLost` is `node_lost`, unless another one is given."""
        cls.code = code or re.sub(r"\B(?=[A-Z])", "_", cls.__name__).lower()
        cls._by_code.setdefault(cls.code, cls)

    def __init__(self, message: str = "", *, retryable: bool | None = None, **metadata: Any) -> None:
        super().__init__(message or (type(self).__doc__ or "").split("\n", 1)[0])
        if retryable is not None:
            self.retryable = retryable
        self.metadata: dict[str, Any] = metadata

    @property
    def message(self) -> str:
        return str(self.args[0])

    @property
    def param(self) -> str | None:
        """The field of the request that is refused, as in `messages.0.content`; None if it is not one field."""
        param = self.metadata.get("param")
        return param if isinstance(param, str) else None

    @classmethod
    def rebuild(cls, code: str, message: str, *, retryable: bool, metadata: dict[str, Any]) -> FleetError:
        """Return the error that `code` names. An unknown code becomes a `FleetError` with it in `metadata["code"]`."""
        error = FleetError.__new__(cls._by_code.get(code, FleetError))
        FleetError.__init__(error, message, retryable=retryable)
        error.metadata = dict(metadata) if type(error) is not FleetError else {**metadata, "code": code}
        return error


class ConfigurationError(FleetError):
    """The configuration is wrong.

    `metadata["faults"]`, if present, lists wrong settings: the place of each, as ("router", "timeout"), and a text.
    """


class BrokerUnavailable(FleetError):
    """The broker cannot be reached."""


class InvalidRequest(FleetError):
    """The request cannot work on any node."""


class ContextLengthExceeded(InvalidRequest):
    """The conversation does not fit into the model's context window."""


class UnsupportedCapability(InvalidRequest):
    """The model or the instance cannot do what was asked."""


class UnsupportedParameter(InvalidRequest):
    """The MLX server cannot do what a parameter asks for; `metadata["param"]` is its name."""


class ModelNotServed(FleetError):
    """The instance does not serve that model."""


class ModelUnavailable(FleetError):
    """No instance of the fleet offers that model. `metadata["nearest"]` lists similar names that exist."""


class PolicyError(FleetError):
    """The request is not allowed here."""


class Unauthorized(FleetError):
    """The MLX server refused the worker's api_key."""


class Cancelled(FleetError):
    """The request was cancelled."""


class Expired(FleetError):
    """The deadline passed before the work began.

    `metadata["away_for"]` is for how many seconds no node has been ready that could do it: 0 if one is, None if that is
    unknown.
    """


class QueueTimeout(Expired):
    """No node took the request, or went on with its answer, in time: within its queue_timeout, or within the time that
    router.absent_timeout or its max_wait allows while no node is ready.

    `metadata["by_owner"]` is True if the owners of all machines that could do it need them.
    """


class FleetSaturated(FleetError):
    """Too many requests wait for that model already, or this one would wait for longer than its max_wait;
    `metadata["retry_after"]` is seconds."""

    retryable = True


class NodeLost(FleetError):
    """The node that ran the request sends no more heartbeats."""

    retryable = True


class PoisonSuspected(FleetError):
    """Two MLX servers died or froze while they ran this request, so it is not sent to a third."""


class StreamInterrupted(FleetError):
    """The stream ended where it cannot be continued; the deltas delivered before are correct."""


class ReplyLost(FleetError):
    """A part of the reply never arrived."""


class ReplyOverflow(FleetError):
    """The caller reads its stream more slowly than it is generated, and the buffer is full."""


class ProviderError(FleetError):
    """The MLX server failed."""


class InstanceUnavailable(ProviderError):
    """The MLX server is down, or up and unable to generate."""

    retryable = True


class Overloaded(ProviderError):
    """The MLX server is busy; `metadata["retry_after"]`, if present, is seconds."""

    retryable = True


class RequestTimeout(ProviderError, code="timeout"):
    """The time limit passed while the request was running."""


class ConnectionFailure(ProviderError):
    """The connection to the MLX server failed or broke."""

    retryable = True


class MalformedOutput(ProviderError):
    """The MLX server sent an answer that does not follow the protocol."""


class InvalidOutput(MalformedOutput):
    """The model's answer is not the JSON that `response_format` asks for."""


def where(error: Exception) -> str:
    """Return file, line and function of an error, without its text: that may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename.rpartition('/')[2]}:{last.lineno} in {last.name}"
