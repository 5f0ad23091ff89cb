"""One request through the router: submitted, relayed to its client, and stopped when the client leaves."""

from __future__ import annotations

import asyncio

from fleet_worker.errors import FleetSaturated, ModelUnavailable, ProviderError, QueueTimeout
from fleet_worker.gateway.dialects.dialect import Asked, ChatAsked, CountAsked, EmbedAsked, LoadAsked
from fleet_worker.gateway.facts import Facts
from fleet_worker.gateway.http.event_stream import EventStream
from fleet_worker.gateway.http.response import Response
from fleet_worker.gateway.token_counts import counted_tokens
from fleet_worker.router.options import RequestOptions
from fleet_worker.router.router import Router

ANOTHER_MODEL_MAY = (ModelUnavailable, FleetSaturated, QueueTimeout, ProviderError)
"""Errors after which the next model of an alias or of a fallback list is tried, if nothing was written yet."""


class Exchange:
    """The way of one request to a model, and of the answer back.

    What becomes known of it is noted in `facts`. `heartbeat`: seconds of silence after which a stream gets one.
    """

    def __init__(self, router: Router, response: Response, facts: Facts, options: RequestOptions, *, heartbeat: float):
        self._router = router
        self._response = response
        self._facts = facts
        self._options = options
        self._heartbeat = heartbeat

    async def run(self, asked: Asked, models: list[str]) -> None:
        """Write the answer of the first of these models that can give one.

        Raises:
            FleetError: none can. The stream may have begun.
        """
        is_busy = False
        for model in models[:-1]:
            try:
                return await self._answer(asked, model)
            except ANOTHER_MODEL_MAY as error:
                if self._response.status is not None:
                    raise
                is_busy = is_busy or isinstance(error, FleetSaturated)
        try:
            return await self._answer(asked, models[-1])
        except QueueTimeout as error:
            if is_busy and error.metadata.pop("by_owner", False):  # a model before this one may be free soon
                error.metadata.pop("retry_after", None)
            raise

    async def _answer(self, asked: Asked, model: str) -> None:
        self._facts.model, self._facts.node = model, None
        match asked:
            case ChatAsked(stream=True):
                await self._stream(asked, model)
            case ChatAsked():
                await self._chat(asked, model)
            case EmbedAsked():
                await self._embed(asked, model)
            case CountAsked():
                await self._count(asked, model)
            case LoadAsked():
                await self._response.whole(200, asked.answer, self._facts.headers())

    async def _stream(self, asked: ChatAsked, model: str) -> None:
        stream = self._router.stream_chat(model, body=asked.body, **self._options)
        events = EventStream(self._response, asked.writer, self._facts.headers, self._heartbeat)
        async with events, stream:
            try:
                async for batch in stream.batches():
                    if self._facts.ttft is None:
                        self._facts.note_first_token(stream.progress)
                    await events.write(batch)
                self._facts.note_answer(stream.response)
            except BaseException:
                self._facts.note_cut_off(stream.progress, stream.tokens)
                raise
            await events.end(stream.response)

    async def _chat(self, asked: ChatAsked, model: str) -> None:
        response = await self._router.achat(model, body=asked.body, **self._options)
        self._facts.note_answer(response)
        await self._response.whole(200, asked.writer.whole(response), self._facts.headers())

    async def _embed(self, asked: EmbedAsked, model: str) -> None:
        response = await self._router.aembed(model, body=asked.body, **self._options)
        self._facts.note_answer(response)
        await self._response.whole(200, asked.writer.whole(response), self._facts.headers())

    async def _count(self, asked: CountAsked, model: str) -> None:
        tokens = await asyncio.to_thread(counted_tokens, model, asked.body)
        await self._response.whole(200, asked.answer(tokens), self._facts.headers())
