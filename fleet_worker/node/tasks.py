"""The three tasks of a node: decode, call the MLX server, reply. The mirror image of `router.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import celery.worker.strategy as celery_strategy
from celery import Celery
from celery.exceptions import InvalidTaskError

from fleet_worker.broker.topology import REPLY_PREFIX, task_name
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
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.node import Node
from fleet_worker.node.reply_publisher import ReplyWriter
from fleet_worker.node.router_presence import not_listening
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.reply import ChatResponse, EmbedResponse, Timings
from fleet_worker.protocol.request import FleetRequest

log = logging.getLogger(__name__)


def register_tasks(app: Celery, node: Node) -> None:
    """Give `app` its tasks.

    They return None and raise only our own errors, whose texts hold nothing of a request: Celery shows both to
    everybody. They never retry; that is for the router to decide.
    """

    def task(function: Any) -> Any:
        options = {"throws": (FleetError,), "ignore_result": True, "Strategy": f"{__name__}:careful_strategy"}
        return app.task(name=task_name(function.__name__), shared=False, **options)(function)

    @task
    def chat(envelope: dict[str, Any]) -> None:
        with _working(node, envelope, "chat") as work:
            if work and isinstance(work.params, ChatParams):
                answer = node.mlx.chat(
                    work.params, work.offering, deadline=work.deadline, cancel_token=work.cancel_token
                )
                node.tally.generated(answer.usage.completion_tokens or 0)
                work.respond(answer)

    @task
    def stream_chat(envelope: dict[str, Any]) -> None:
        with _working(node, envelope, "stream_chat") as work:
            if work and isinstance(work.params, ChatParams):
                with node.mlx.stream_chat(
                    work.params,
                    work.offering,
                    deadline=work.deadline,
                    cancel_token=work.cancel_token,
                    resume=work.request.resume,
                ) as stream:
                    for deltas in stream:
                        node.tally.generated(len(deltas))
                        work.answer.put(deltas, stream.tokens)
                work.respond(stream.answer())

    @task
    def embed(envelope: dict[str, Any]) -> None:
        with _working(node, envelope, "embed") as work:
            if work and isinstance(work.params, EmbedParams):
                vectors = node.mlx.embed(
                    work.params.input, work.offering, deadline=work.deadline, cancel_token=work.cancel_token
                )
                work.answer.end(
                    EmbedResponse,
                    **work.ending(),
                    data=vectors.data,
                    dimensions=vectors.dimensions,
                    usage=vectors.usage,
                    timings=work.timings(),
                )


def careful_strategy(task: Any, app: Any, consumer: Any) -> Any:
    """Celery's own way to take a message, but one that is no task is dropped; Celery lets it end the worker."""
    take = celery_strategy.default(task, app, consumer)

    def take_if_sound(message: Any, *rest: Any, **options: Any) -> Any:
        match message.payload:
            case [list(), dict(), _] if "id" in message.headers:
                return take(message, *rest, **options)
        raise InvalidTaskError("a task is [args, kwargs, embed] with an id")

    return take_if_sound


@dataclass(frozen=True, slots=True)
class _Work:
    """One accepted attempt: `started` and `deadline` are monotonic seconds."""

    node: Node
    request: FleetRequest
    offering: Offering
    answer: ReplyWriter
    cancel_token: CancelToken
    queue_wait: float
    started: float
    deadline: float

    @property
    def params(self) -> ChatParams | EmbedParams:
        return self.request.params

    def respond(self, answer: ChatAnswer) -> None:
        self.answer.end(
            ChatResponse,
            **self.ending(),
            content=answer.content,
            reasoning=answer.reasoning,
            tool_calls=answer.tool_calls,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            timings=self.timings(ttft=answer.ttft, tokens_per_second=answer.tokens_per_second),
        )

    def ending(self) -> dict[str, Any]:
        return {"instance": self.node.instance, "model": self.offering.model}

    def timings(self, **measured: float | None) -> Timings:
        named = {"ttft_seconds": measured.get("ttft"), "tokens_per_second": measured.get("tokens_per_second")}
        self.node.tally.request(self.request.operation, queue_wait_seconds=self.queue_wait, **named)
        return Timings(queue_wait=self.queue_wait, duration=time.monotonic() - self.started, **measured)


@contextmanager
def _working(node: Node, envelope: Any, operation: str) -> Iterator[_Work | None]:
    """Accept the attempt, or answer why not; whatever goes wrong inside ends the reply with one error.

    Yields None for an attempt that this node has already (a message delivered twice).
    """
    with node.sender.answering(*_address(envelope)) as answer:
        if answer is None:
            log.warning("an attempt was delivered a second time, and is not run again")
            yield None
            return
        try:
            with (
                node.running.attempt(answer.id, answer.attempt, answer.reply_to) as cancel_token,
                answer.stopped_by(cancel_token),
            ):
                work = _accept(node, envelope, operation, answer, cancel_token)
                with node.working(work.offering.model, cancel_token):
                    yield work
        except FleetError as error:
            if isinstance(error, ConnectionFailure) and node.mlx.has_died():
                error.metadata["instance_died"] = True
            node.tally.error(error.code)
            answer.fail(error)
            raise error from None
        except Exception as error:
            log.error("a task failed: %s at %s", type(error).__name__, where(error))
            failure = ProviderError(f"the worker failed ({type(error).__name__}): see its log")
            node.tally.error(failure.code)
            answer.fail(failure)
            raise failure from None


def _address(envelope: Any) -> tuple[str, int, str]:
    """Where an answer goes, even if the rest of the envelope is unusable."""
    if isinstance(envelope, dict):
        request_id, attempt, reply_to = (envelope.get(key) for key in ("request_id", "attempt", "reply_to"))
        if isinstance(request_id, str) and isinstance(reply_to, str) and reply_to.startswith(REPLY_PREFIX):
            return request_id, attempt if isinstance(attempt, int) else 1, reply_to
    raise InvalidRequest("an envelope without request_id and reply_to: nobody to answer to")


def _accept(node: Node, envelope: Any, operation: str, answer: ReplyWriter, cancel_token: CancelToken) -> _Work:
    request = FleetRequest.decode(envelope, max_bytes=node.settings.max_body_bytes)
    if request.operation != operation:
        raise InvalidRequest(f"a request for {request.operation} came as a task for {operation}")
    if request.provider_instance not in ("any", node.instance):
        raise InstanceUnavailable(f"the request is for another instance than {node.instance}, who took it")
    offering = offering_for(request, node.offerings)
    started, queue_wait, remaining = time.monotonic(), request.queue_wait, request.remaining
    if remaining <= 0:
        raise Expired(f"the request waited {queue_wait:.1f} s in its lane, longer than its timeout")
    # A drained node still does what it took in that moment: its server works.
    if node.state.status == "unavailable":  # taken in the moment before its lanes were left
        raise InstanceUnavailable(f"the instance is not available: {node.state.reason}")
    if not node.listeners.listens(request.reply_to):
        raise not_listening()
    answer.deadline = started + remaining
    answer.accept(instance=node.instance, queue_wait=queue_wait)
    return _Work(node, request, offering, answer, cancel_token, queue_wait, started, started + remaining)
