"""The three tasks of a node: decode the request, call the MLX server, reply. The mirror image of `router.router`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any

from celery import Celery

from fleet_worker.broker.door import REPLY_SPARE_BYTES, Refused
from fleet_worker.broker.topology import task_name
from fleet_worker.errors import (
    ConnectionFailure,
    Expired,
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    ProviderError,
    where,
)
from fleet_worker.mlx.chat_stream import ChatAnswer
from fleet_worker.mlx.offering import Offering, offering_for
from fleet_worker.mlx.parameters import dropped_parameters
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.node import Node
from fleet_worker.node.prompt_cache.prompt_cache import ServedPrompt
from fleet_worker.node.reply_writer import ReplyWriter
from fleet_worker.node.router_presence import not_listening
from fleet_worker.protocol import clock
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.reply import ChatResponse, EmbedResponse, Timings
from fleet_worker.protocol.request import Address, FleetRequest

log = logging.getLogger(__name__)

DELIVERED_AGAIN = "an attempt was delivered a second time"
ROOM_FOR_THE_REST = 64 * 1024
"""Bytes of a reply besides its vectors, at most."""


def register_tasks(app: Celery, node: Node) -> None:
    """Give `app` its tasks.

    They return None, and raise only `FleetError`s, whose texts hold nothing of a request: Celery shows both to
    everybody. They never retry: the router decides about that.
    """

    for run in (chat, stream_chat, embed):
        options = {"name": task_name(run.__name__), "shared": False, "throws": (FleetError,), "ignore_result": True}
        app.task(**options)(_task(node, run))


def _task(node: Node, run: Callable[[Work, Any, PromptPrefixes], None]) -> Callable[..., None]:
    def task(envelope: Any, prefixes: Any = None) -> None:
        try:
            with _accepted(node, envelope, run.__name__) as work:
                if work:
                    run(work, work.request.params, _decoded(prefixes))
        finally:
            node.tell_ended()

    return task


def _decoded(prefixes: Any) -> PromptPrefixes:
    """Return what the router tells about the prompt: nothing if it is of an older version, or sends nonsense."""
    try:
        return PromptPrefixes.decode(prefixes)
    except InvalidRequest:
        return PromptPrefixes()


def chat(work: Work, params: ChatParams, prefixes: PromptPrefixes) -> None:
    with work.serving(prefixes) as prompt:
        answer = work.node.mlx.chat(params, work.offering, first_content=prompt.first_token, **work.limits)
        prompt.answered(answer)
    work.node.counters.generated(answer.usage.completion_tokens or 0)
    _respond(work, params, answer)


def stream_chat(work: Work, params: ChatParams, prefixes: PromptPrefixes) -> None:
    mlx = work.node.mlx
    with work.serving(prefixes) as prompt:
        options = {"resume": work.request.resume, "first_content": prompt.first_token, **work.limits}
        with mlx.stream_chat(params, work.offering, **options) as stream:
            for deltas in stream:
                work.node.counters.generated(len(deltas))
                work.reply.put(deltas, stream.tokens)
        answer = stream.answer()
        prompt.answered(answer)
    _respond(work, params, answer)


def _respond(work: Work, params: ChatParams, answer: ChatAnswer) -> None:
    work.node.counters.prompt(work.offering.model, answer.usage.prompt_tokens, answer.usage.cached_tokens)
    told = {field.name: getattr(answer, field.name) for field in fields(answer)}  # `asdict` copies deeply
    work.respond(ChatResponse, metadata=work.metadata(params), **told)


def embed(work: Work, params: EmbedParams, _: PromptPrefixes) -> None:
    _check_dimensions(params.dimensions, work.offering.settings.dimensions)
    vectors = work.node.mlx.embed(params.input, work.offering, **work.limits)
    _check_reply_size(sum(map(len, vectors.data)), work.node.settings.max_body_bytes + REPLY_SPARE_BYTES)
    _check_dimensions(params.dimensions, vectors.dimensions)
    work.respond(EmbedResponse, data=vectors.data, dimensions=vectors.dimensions, usage=vectors.usage)


def _check_dimensions(wanted: int | None, dimensions: int | None) -> None:
    """Refuse another number than the model's vectors have, if that is known."""
    if wanted and dimensions and wanted != dimensions:
        text = f"dimensions: this model's vectors have {dimensions} numbers, and are not shortened: leave it out"
        raise InvalidRequest(text, param="dimensions")


def _check_reply_size(size: int, most: int) -> None:
    """Raise `InvalidRequest` for vectors that the router would drop as too large a message."""
    if size > most - ROOM_FOR_THE_REST:
        text = f"the embeddings are {size:,} bytes, more than a reply may be: send fewer texts at a time"
        raise InvalidRequest(text)


@dataclass(frozen=True, slots=True)
class Work:
    """One accepted attempt. `started` and `deadline` are `time.monotonic()` seconds."""

    node: Node
    request: FleetRequest
    offering: Offering
    reply: ReplyWriter
    cancel_token: CancelToken
    started: float
    deadline: float

    @property
    def queue_wait(self) -> float:
        """Seconds. The time of a router that was new when this was accepted has come meanwhile."""
        age = self.node.router_clocks.age(self.request)
        return 0.0 if age is None else max(0.0, age - (time.monotonic() - self.started))

    @property
    def limits(self) -> dict[str, Any]:
        return {"deadline": self.deadline, "cancel_token": self.cancel_token}

    def serving(self, prefixes: PromptPrefixes) -> AbstractContextManager[ServedPrompt]:
        """Let the node know what its server has to read, and when it has, for as long as the block lasts."""
        model, backend = self.offering.model, self.offering.backend
        return self.node.prompt_cache.serving(self.request.request_id, model, prefixes, backend=backend)

    def metadata(self, params: ChatParams) -> dict[str, Any]:
        """Return what is to be said about the request: which parameters had no influence."""
        temperature = self.offering.settings.temperature if params.temperature is None else params.temperature
        dropped = dropped_parameters(params, self.node.server_kind, temperature)
        return {"dropped_parameters": dropped} if dropped else {}

    def respond(
        self,
        frame: type[ChatResponse] | type[EmbedResponse],
        *,
        ttft: float | None = None,
        tokens_per_second: float | None = None,
        **fields: Any,
    ) -> None:
        """End the reply with a frame of these fields and timings, and count the request."""
        queue_wait = self.queue_wait
        self.node.counters.request(
            self.request.operation,
            queue_wait_seconds=queue_wait,
            ttft_seconds=ttft,
            tokens_per_second=tokens_per_second,
        )
        duration = time.monotonic() - self.started
        timings = Timings(queue_wait=queue_wait, duration=duration, ttft=ttft, tokens_per_second=tokens_per_second)
        self.reply.end(frame, instance=self.node.instance, model=self.offering.model, timings=timings, **fields)


@contextmanager
def _accepted(node: Node, envelope: Any, operation: str) -> Iterator[Work | None]:
    """Accept the attempt, or refuse it with an error. An exception inside the block ends the reply with one error.

    Yields None for an attempt that was delivered to this node before.
    """
    request_id, attempt, reply_to = Address.of(envelope)
    if not node.running.is_new(request_id, attempt):
        node.door.drop(Refused(DELIVERED_AGAIN))
        yield None
        return
    with node.publisher.reply(request_id, attempt, reply_to) as reply:
        try:
            with node.running.attempt(request_id, attempt, reply_to) as cancel_token, reply.cancelled_by(cancel_token):
                work = _accept(node, envelope, operation, reply, cancel_token)
                with node.counting_failures(work.offering.model, request_id, cancel_token):
                    yield work
        except Exception as error:
            failure = error if isinstance(error, FleetError) else _unexpected(error)
            is_lost = isinstance(failure, ConnectionFailure) and not failure.metadata.get("handed_over")
            if is_lost and node.mlx.has_died():
                failure.metadata["instance_died"] = True
            node.counters.error(failure.code)
            reply.fail(failure)
            raise failure from None


def _unexpected(error: Exception) -> FleetError:
    log.error("a task failed: %s at %s", type(error).__name__, where(error))
    return ProviderError(f"the worker failed ({type(error).__name__}): see its log")


def _accept(node: Node, envelope: Any, operation: str, reply: ReplyWriter, cancel_token: CancelToken) -> Work:
    """Check the request, and tell the router that this node has accepted it.

    Raises:
        FleetError: the request is invalid or expired, or this node, or no node, should serve it.
    """
    request = FleetRequest.decode(envelope, max_bytes=node.settings.max_body_bytes)
    if request.operation != operation:
        raise InvalidRequest(f"a request for {request.operation} came as a task for {operation}")
    if request.provider_instance not in ("any", node.instance):
        raise InstanceUnavailable(f"the request is for another instance than {node.instance}, which received it")
    offering = offering_for(request, node.models.by_name)
    started, age = time.monotonic(), node.router_clocks.age(request)
    if age is not None and age >= request.timeout_seconds:
        raise _expired(age)
    # The message may have been taken just before the lanes were left. A drained node still serves it: its server works.
    if node.state.status == "unavailable":
        raise InstanceUnavailable(f"the instance is not available: {node.state.reason}")
    if not node.presence.listens(request.reply_to):
        raise not_listening()
    reply.deadline = started + request.timeout_seconds - (age or 0.0)
    _tell_accepted(node, request, age, reply, cancel_token)
    return Work(node, request, offering, reply, cancel_token, started, reply.deadline)


def _tell_accepted(
    node: Node, request: FleetRequest, age: float | None, reply: ReplyWriter, cancel_token: CancelToken
) -> None:
    """Tell the router that this node has accepted the attempt. If it may not want it any more, wait for its answer.

    Our clock is only a reason to ask: alone it says nothing about a request of a router whose clock is not known.

    Raises:
        FleetError: the router does not want it, or it has expired, as far as anybody can tell.
    """
    accepted: dict[str, Any] = {"instance": node.instance, "queue_wait": age or 0.0}
    seeming_age = _seeming_age(node, request)
    if seeming_age < request.timeout_seconds and not node.confirmations.may_be_cancelled(seeming_age):
        reply.accept(**accepted, asks=node.router_clocks.is_to_ask(request.reply_to) or None)
        return
    with node.confirmations.asked(request.request_id, request.attempt, cancel_token) as is_confirmed:
        reply.accept(**accepted, asks=True, at_once=True)
        # Another notice of its router, for any node, may have told its time meanwhile.
        if not is_confirmed() and (seeming_age := _seeming_age(node, request)) >= request.timeout_seconds:
            raise _expired(seeming_age)


def _seeming_age(node: Node, request: FleetRequest) -> float:
    """Return the seconds since its caller submitted it; by our clock if that of its router is not known."""
    age = node.router_clocks.age(request)
    return clock.now() - request.submitted_at if age is None else age


def _expired(age: float) -> Expired:
    return Expired(f"the request waited {age:.1f} s in its lane, longer than its timeout")
