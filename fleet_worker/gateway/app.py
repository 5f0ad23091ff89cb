"""The gateway as an ASGI application: which path means what, and what every request has in common."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

from fleet_worker.errors import BrokerUnavailable, FleetError, where
from fleet_worker.gateway import (
    anthropic_count,
    anthropic_messages,
    health,
    models,
    openai_completions,
    openai_embeddings,
    openai_responses,
)
from fleet_worker.gateway.browsers import refuse_foreign_pages
from fleet_worker.gateway.departure import while_client_stays
from fleet_worker.gateway.dialect import Dialect
from fleet_worker.gateway.exchange import Exchange
from fleet_worker.gateway.facts import Facts
from fleet_worker.gateway.json_text import compact
from fleet_worker.gateway.keys import Keys
from fleet_worker.gateway.openai_chat import OpenAIChat
from fleet_worker.gateway.options import router_options, tags
from fleet_worker.gateway.problems import Problem, Refused, only, refuse
from fleet_worker.gateway.quotas import Quotas
from fleet_worker.gateway.records import Records, shown
from fleet_worker.gateway.request import BodyMemory, ClientLeft, Receive, Request
from fleet_worker.gateway.response import Response, Send
from fleet_worker.gateway.token_estimate import most_generated, prompt_tokens
from fleet_worker.registry.view import Registry
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

CONNECT_AGAIN_AFTER = 1.0
"""Seconds between two tries to reach the broker, while there is no connection yet."""
_ALIVE = ("/", "/health", "/health/liveliness", "/health/liveness")
_LOOKED_UP = ("/health/readiness", "/models", "/usage", "/metrics")
_DRAINING = Problem(
    status=503, code="shutting_down", message="this gateway shuts down", retry_after=1.0, may_retry=True
)


class Gateway:
    """Serves HTTP. `registry` is None until the broker was reached."""

    def __init__(self, settings: Settings, router: Router, keys: Keys, quotas: Quotas, records: Records) -> None:
        self._settings = settings.gateway
        self._bodies = BodyMemory(settings.max_body_bytes)
        self._router = router
        self._keys = keys
        self._quotas = quotas
        self._records = records
        self._chat = OpenAIChat(self._settings.reasoning_field)
        self._dialects: Mapping[str, Dialect] = {
            "/chat/completions": self._chat,
            "/completions": openai_completions,
            "/embeddings": openai_embeddings,
            "/responses": openai_responses,
            "/messages": anthropic_messages,
            "/messages/count_tokens": anthropic_count,
        }
        self._running: set[asyncio.Task[None]] = set()
        self.registry: Registry | None = None
        self.draining = False

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        response = Response(scope, send, request.id, self._settings.write_timeout)
        facts = Facts()
        try:
            await self._serve(request, response, facts)
        except ClientLeft:
            response.break_off()
            facts.error = "client_left"
        except Exception as error:  # while an error was told; its text may hold that of the client
            response.break_off()
            self._report(request, error)
        finally:
            self._records.ended(request, response, facts)

    @property
    def drain_grace(self) -> float:
        return self._settings.drain_grace

    async def connect(self) -> None:
        """Connect to the broker, again and again until it is reached. Then models are known."""
        failing = False
        while self.registry is None:
            try:
                self.registry = await asyncio.to_thread(lambda: self._router.registry)
            except FleetError as error:
                if not failing:
                    log.warning("no broker yet: %s", error.message)
                failing = True
                await asyncio.sleep(CONNECT_AGAIN_AFTER)
        log.info("knows the models of %d instances", len(self.registry.instances()))

    async def drain(self) -> None:
        """Refuse new requests, and wait until those that run have ended. After `drain_grace` they are ended."""
        self.draining = True
        if self._running:
            await asyncio.wait(self._running, timeout=self.drain_grace)
        self.end_all()

    def end_all(self) -> None:
        """End all requests that run, each with an error."""
        self.draining = True
        for task in tuple(self._running):
            task.cancel()

    async def _serve(self, request: Request, response: Response, facts: Facts) -> None:
        path = _normalized(request.path)
        dialect = self._dialects.get(path)
        try:
            if not self._keys.are_needed:
                refuse_foreign_pages(request.headers)
            if dialect is None:
                await self._look_up(path, request, response)
            elif request.method != "POST":
                raise only("POST")
            elif self.draining:
                raise Refused(_DRAINING)
            else:
                facts.operation = path.strip("/")
                async with self._until_the_end():
                    await self._answer(dialect, request, response, facts)
        except Refused as refusal:
            await self._tell(dialect, request, response, facts, refusal.problem)
        except FleetError as error:
            await self._tell(dialect, request, response, facts, Problem.of(error))
        except ClientLeft:
            raise
        except Exception as error:
            self._report(request, error)
            problem = Problem(status=500, code="internal_error", message="the gateway failed; its log tells where")
            await self._tell(dialect, request, response, facts, problem)

    async def _answer(self, dialect: Dialect, request: Request, response: Response, facts: Facts) -> None:
        key = self._keys.find(request.secret)
        self._records.begun(facts, key)
        facts.tags = tags(request)
        body = await request.json(self._bodies, self._settings.body_timeout)
        asked = dialect.asked(body, request.id, int(time.time()))
        facts.model_asked = asked.model
        options = router_options(request, key, self._settings.max_wait)
        names = models.require(self._known(), key, asked.model)
        exchange = Exchange(self._router, response, facts, options, heartbeat=self._settings.heartbeat)
        async with while_client_stays(request):
            facts.prompt_estimate = prompt_tokens(request.size)
            reservation = await self._quotas.reserve(key, facts.prompt_estimate + most_generated(asked.body))
            facts.limits = reservation.headers
            try:
                await exchange.run(asked, names)
            finally:
                reservation.settle(facts.prompt_tokens + facts.completion_tokens)

    @contextlib.asynccontextmanager
    async def _until_the_end(self) -> AsyncIterator[None]:
        """Refuse what is inside if it still runs when the gateway ends."""
        task = cast(asyncio.Task[None], asyncio.current_task())
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.draining:
                raise
            task.uncancel()
            raise Refused(_DRAINING) from None
        finally:
            self._running.discard(task)

    async def _look_up(self, path: str, request: Request, response: Response) -> None:
        """Answer what is known without asking a node."""
        if path not in _ALIVE + _LOOKED_UP and not path.startswith("/models/"):
            raise refuse(404, "not_found", f"there is nothing at {shown(request.path)}")
        if request.method not in ("GET", "HEAD"):
            raise only("GET, HEAD")
        status = 200
        if path in _ALIVE:
            found: dict[str, Any] = {"status": "alive"}
        elif path == "/health/readiness":
            status, found = health.readiness(self.registry, draining=self.draining)
        else:
            key = self._keys.find(request.secret)
            if path == "/metrics":
                text, media_type = await self._records.metrics(request, key)
                return await response.whole(200, text, media_type=media_type)
            if path == "/usage":
                found = await self._records.usage(request, key)
            elif path == "/models":
                found = models.page(self._known(), key)
            else:
                found = models.details(self._known(), key, path.removeprefix("/models/"))
        return await response.whole(status, compact(found).encode("ascii"))

    async def _tell(
        self, dialect: Dialect | None, request: Request, response: Response, facts: Facts, problem: Problem
    ) -> None:
        facts.error = problem.code
        if response.status is not None:
            await response.fail(problem)
            return
        body = (dialect or self._chat).problem_body(problem, request.id)
        last = [(b"connection", b"close")] if self.draining else []  # then the client asks another gateway
        await response.whole(problem.status, body, [*facts.headers(), *problem.headers, *last])

    def _report(self, request: Request, error: Exception) -> None:
        log.error("request %s failed: %s in %s", request.id, type(error).__name__, where(error))

    def _known(self) -> Registry:
        if self.registry is None:
            raise BrokerUnavailable("the gateway has not reached the broker yet", retryable=True)
        return self.registry


def _normalized(path: str) -> str:
    """Return a path without the version and without a slash at its end."""
    return path.removeprefix("/v1").rstrip("/") or "/"
