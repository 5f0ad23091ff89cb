"""The gateway as an ASGI application: which path means what, and what every request has in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from fleet_worker.errors import FleetError, where
from fleet_worker.gateway import models
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.accounts.keys import Keys
from fleet_worker.gateway.accounts.quotas import Quotas, Reservation
from fleet_worker.gateway.dialects import (
    anthropic_count,
    anthropic_messages,
    ollama_chat,
    ollama_embed,
    ollama_embeddings,
    ollama_generate,
    openai_completions,
    openai_embeddings,
    openai_responses,
)
from fleet_worker.gateway.dialects.dialect import Asked, ChatAsked, Dialect, EmbedAsked, capability
from fleet_worker.gateway.dialects.openai_chat import OpenAIChat
from fleet_worker.gateway.exchange import Exchange
from fleet_worker.gateway.facts import Facts
from fleet_worker.gateway.http.browsers import refuse_foreign_pages
from fleet_worker.gateway.http.departure import while_client_stays
from fleet_worker.gateway.http.request import BodyMemory, ClientLeft, Receive, Request
from fleet_worker.gateway.http.response import Response, Send
from fleet_worker.gateway.known_fleet import KnownFleet
from fleet_worker.gateway.lookups import Lookups
from fleet_worker.gateway.options import prompt_options, router_options, tags
from fleet_worker.gateway.problems import Problem, Refused, only, refuse
from fleet_worker.gateway.records import Records, shown
from fleet_worker.gateway.running import Running
from fleet_worker.gateway.token_counts import most_generated, quick_estimate
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)


class Gateway:
    """The application. `Lookups` answers what needs no model; all else goes through an `Exchange`."""

    def __init__(self, settings: Settings, router: Router, keys: Keys, quotas: Quotas, records: Records) -> None:
        self._settings = settings.gateway
        self._default_max_wait = settings.router.max_wait
        self._bodies = BodyMemory(settings.max_body_bytes)
        self._router = router
        self._keys = keys
        self._quotas = quotas
        self._records = records
        self.fleet = KnownFleet(router)
        self.running = Running(self._settings.drain_grace)
        self._lookups = Lookups(settings, self.fleet, self.running, keys, self._bodies, records)
        self._chat = OpenAIChat(self._settings.reasoning_field)
        self._dialects: Mapping[str, Dialect] = {
            "/chat/completions": self._chat,
            "/completions": openai_completions,
            "/embeddings": openai_embeddings,
            "/responses": openai_responses,
            "/messages": anthropic_messages,
            "/messages/count_tokens": anthropic_count,
            "/api/chat": ollama_chat,
            "/api/generate": ollama_generate,
            "/api/embed": ollama_embed,
            "/api/embeddings": ollama_embeddings,
        }

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
        except Exception as error:  # a mistake of ours, while an error was written
            response.break_off()
            self._report(request, error)
        finally:
            self._records.ended(request, response, facts)

    async def _serve(self, request: Request, response: Response, facts: Facts) -> None:
        path = _normalized(request.path)
        dialect = self._dialects.get(path)
        try:
            if not self._keys.are_needed and not self._settings.socket:  # no page can ask a Unix socket
                refuse_foreign_pages(request.headers)
            if dialect:
                facts.operation = path.strip("/")
                await self._answer(dialect, request, response, facts)
            elif self._lookups.has(path):
                await self._lookups.answer(path, request, response)
            else:
                raise refuse(404, "not_found", f"there is nothing at {shown(request.path)}{_way_out(request.path)}")
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
        if request.method != "POST":
            raise only("POST")
        async with self.running.until_the_end():
            key = self._keys.find(request.secret)
            self._records.begun(facts, key)
            facts.tags = tags(request)
            body = await request.json(self._bodies, self._settings.body_timeout)
            asked = dialect.asked(body, request.id, int(time.time()))
            facts.model_asked = asked.model[: models.LONGEST_NAME]
            options = router_options(request, key, self._default_max_wait)
            if isinstance(asked, ChatAsked):
                options |= prompt_options(asked, request, key)
            names = models.require(self.fleet.known(), key, asked.model, capability(asked))
            exchange = Exchange(self._router, response, facts, options, heartbeat=self._settings.heartbeat)
            async with while_client_stays(request):
                reservation = await self._reserve(key, asked, request.size, facts)
                try:
                    await exchange.run(asked, names)
                finally:
                    reservation.settle(facts.prompt_tokens + facts.completion_tokens)

    async def _reserve(self, key: Key, asked: Asked, size: int, facts: Facts) -> Reservation:
        """Take what a request with a body of `size` bytes may use from the limits of its key.

        Counting tokens and loading a model use none.
        """
        generated = 0
        if isinstance(asked, ChatAsked | EmbedAsked):
            facts.prompt_estimate = quick_estimate(asked.body, size)
            generated = most_generated(asked.body)
        reservation = await self._quotas.reserve(key, facts.prompt_estimate + generated)
        facts.limits = reservation.headers
        return reservation

    async def _tell(
        self, dialect: Dialect | None, request: Request, response: Response, facts: Facts, problem: Problem
    ) -> None:
        facts.error = problem.code
        if response.status is not None:
            await response.fail(problem)
            return
        body = (dialect or self._dialect_of(request)).problem_body(problem, request.id)
        last = [(b"connection", b"close")] if self.running.draining else []  # then the client asks another gateway
        await response.whole(problem.status, body, [*facts.headers(), *problem.headers, *last])

    def _dialect_of(self, request: Request) -> Dialect:
        """Return the dialect of a client that asks for what is not there, or only looks something up."""
        if request.path.startswith("/api/"):
            return ollama_chat
        return anthropic_messages if "anthropic-version" in request.headers else self._chat

    def _report(self, request: Request, error: Exception) -> None:
        """Log where it failed, and no text of the error, which may hold that of the client."""
        log.error("request %s failed: %s in %s", request.id, type(error).__name__, where(error))


def _way_out(path: str) -> str:
    return ": the base URL of this client must not end in /v1" if path.startswith("/v1/v1/") else ""


def _normalized(path: str) -> str:
    """Return a path without the version and without a slash at its end."""
    return path.removeprefix("/v1").rstrip("/") or "/"
