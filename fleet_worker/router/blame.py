"""Whether a request itself is the cause of its failures: two nodes failed with it in the same way."""

from __future__ import annotations

from fleet_worker.errors import (
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    Overloaded,
    PoisonSuspected,
    ProviderError,
    RequestTimeout,
)

ALIKE_ON = 2
"""The number of nodes that must fail alike."""


class Blame:
    """The failures of one request so far, none of which delivered anything."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, str], dict[str, bool]] = {}
        """The nodes that failed, by code of the error and HTTP status. The value is True if each time other work was
        in the only slot of the server: that work may be the cause, so two such nodes prove nothing."""

    def verdict(self, node: str | None, error: FleetError) -> FleetError | None:
        """Take one more failure; return the error that ends the request if it is to blame, or None."""
        if node is None or not _may_be_caused(error):
            return None
        nodes = self._nodes.setdefault((error.code, str(error.metadata.get("status"))), {})
        nodes[node] = nodes.get(node, True) and error.metadata.get("disturbed") is True
        if len(nodes) < ALIKE_ON or all(nodes.values()):
            return None
        if error.metadata.get("instance_frozen"):
            return PoisonSuspected(f"{ALIKE_ON} MLX servers froze with this request: it is not tried on another one")
        text = (
            f"{error.message}, on {ALIKE_ON} nodes alike: the cause is most likely the request, so it is not tried on "
            "another one; change its messages or its parameters"
        )
        if isinstance(error, RequestTimeout):
            return RequestTimeout(text, **error.metadata)
        return InvalidRequest(text, **{**error.metadata, "reason": error.code})


def _may_be_caused(error: FleetError) -> bool:
    """Return whether a request can make a healthy server fail so. What it can do by killing servers is counted as
    deaths; a server that is away or busy says nothing about a request, unless it froze with it."""
    if error.metadata.get("instance_frozen"):
        return True
    if isinstance(error, InstanceUnavailable | Overloaded):
        return False
    if error.metadata.get("instance_died"):
        return False
    return isinstance(error, ProviderError) and error.retryable
