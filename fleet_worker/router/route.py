"""Where the attempts of one request go: to the shared lane, or to the direct lane of one node."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from fleet_worker.broker.topology import direct_lane, lane
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.reply import ChatResponse, LastFrame
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.affinity.affinity import Affinity, Placement
from fleet_worker.router.node_selection import NodeSelection
from fleet_worker.settings import RouterSettings


class Route:
    """Chosen before each attempt. If the node that was chosen does not take the request, it goes to the shared lane."""

    def __init__(
        self,
        request: FleetRequest,
        only: str | None,
        nodes: NodeSelection,
        affinity: Affinity | None = None,
        prefixes: PromptPrefixes | None = None,
    ) -> None:
        """`only` is the only node that the caller allows. Without `prefixes` nothing is known of the prompt."""
        self._id = request.request_id
        self.only = only
        self._nodes = nodes
        self.prefixes = prefixes
        """What the node is told about the prompt."""
        may_choose = not only and request.provider_instance == "any"
        self._affinity = affinity if may_choose and prefixes else None
        """None if the prompt does not count for this request."""
        self._placement: Placement | None = None
        """What affinity has chosen for the present attempt."""
        self._target: str | None = None
        """The node that the router has chosen for the present attempt."""
        self._has_token = False
        self._failed: frozenset[str] = frozenset()
        """Nodes on which earlier attempts failed."""
        self._left: set[str] = set()
        """Nodes that were chosen and did not take it."""
        self.choose(request)

    @property
    def is_chosen(self) -> bool:
        """Return whether the router has chosen the node of the present attempt."""
        return self._target is not None

    @property
    def node(self) -> str | None:
        """The node whose direct lane the present attempt goes to; None for the shared lane."""
        return self.only or self._target

    @property
    def expected_wait(self) -> float:
        """Seconds that it waits for a slot of the chosen node; 0 in the shared lane, about which others know more."""
        return self._placement.wait if self._placement and self._target else 0.0

    def lane(self, request: FleetRequest) -> str:
        """Return the lane of the present attempt."""
        return direct_lane(self.node) if self.node else lane(request.operation, request.model)

    def choose(self, request: FleetRequest, failed: Collection[str] = (), *, blamed: bool = False) -> None:
        """Choose anew, for the next attempt. `failed`: nodes on which earlier ones failed. `blamed`: an instance died
        with this request, so it should not meet what another one has cached of it."""
        if self.only:
            return
        self._failed = frozenset(failed)
        if self._affinity is None:
            self._target = self._nodes.node_for(request, {*failed, *self._left})
        else:
            self._placement = self._place(request, self._affinity, blamed)
            self._target = self._placement.node

    def _place(self, request: FleetRequest, affinity: Affinity, blamed: bool) -> Placement:
        """Ask affinity; but what a chosen node did not take goes to the shared lane, unless a node there is to be
        avoided."""
        avoided = {*self._failed, *self._nodes.unable(request)}
        if self._placement and self._left and not avoided:
            return dataclasses.replace(self._placement, node=None)
        return affinity.place(request, self.prefixes or PromptPrefixes(), avoided | self._left, blamed=blamed)

    def leave(self) -> bool:
        """The chosen node does not take it: `choose` another way from now on. Return False if none was chosen."""
        if self._target is not None:
            self._left.add(self._target)
        return self._target is not None

    def is_stranded(self, request: FleetRequest, waited: float, settings: RouterSettings) -> bool:
        """Return whether it has waited in vain, for `waited` seconds, for the node that the router chose."""
        node = self._target
        if node is None:
            return False
        if self._affinity is None or self._placement is None:
            return waited >= settings.accept_timeout and self._nodes.waits_in_vain(request, node)
        if self._failed:
            is_silent = self._affinity.is_silent(node, settings.lost_after) and self._has_another(request, node)
            return waited >= settings.accept_timeout and (is_silent or self._nodes.waits_in_vain(request, node))
        if not self._nodes.is_ready(request, node):
            return True
        if waited >= self._placement.patience and self._affinity.another_is_free(request, node):
            return True
        if waited < settings.accept_timeout:
            return False
        return self._affinity.is_silent(node, settings.lost_after) or self._affinity.has_free_slots(node)

    def _has_another(self, request: FleetRequest, node: str) -> bool:
        """Return whether there is a ready node besides this one, and those that failed or did not take it."""
        return bool(self._nodes.ready(request.model, request.operation) - {node, *self._failed, *self._left})

    # --- What affinity learns ---

    def sent(self) -> None:
        self._has_token = False
        if self._affinity and self._placement:
            self._affinity.sent(self._id, self._placement)

    def accepted(self, node: str) -> None:
        if self._affinity:
            self._affinity.accepted(self._id, node)

    def first_token(self) -> None:
        if self._affinity and not self._has_token:
            self._has_token = True
            self._affinity.first_token(self._id)

    def ended(self, frame: LastFrame) -> LastFrame:
        """Return the last frame; that of an answer tells what became of the cached prompt."""
        if self._affinity is None:
            return frame
        if not isinstance(frame, ChatResponse):
            self._affinity.ended(self._id, None, None)
            return frame
        return frame.model_copy(update={"cache": self._affinity.ended(self._id, frame.usage, frame.node)})
