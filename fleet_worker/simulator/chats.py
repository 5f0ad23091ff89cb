"""One chat request on a simulated machine: waiting for its turn, the tokens of the reply, and when each is sent."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from functools import cached_property
from typing import Any

from fleet_worker.simulator.answers import Answer, answer
from fleet_worker.simulator.chunks import DONE, Chunks, completion
from fleet_worker.simulator.machine import Machine, Request
from fleet_worker.simulator.manners import ENDINGS
from fleet_worker.simulator.prompt_cache import Kind, Tokens
from fleet_worker.simulator.prompts import CALL, Prompt, prompt_of
from fleet_worker.simulator.refusals import is_poison
from fleet_worker.simulator.replies import INTERRUPTIONS, Fault, Reply
from fleet_worker.simulator.scripts import Script, script_of
from fleet_worker.simulator.servers import mlx_lm_opening

PREFILL_STEP = 2048  # tokens that mlx_lm.server 0.32 prefills before the other streams get a token
LONGEST_STEP = 0.25  # seconds: the step is shorter where prefill is slow, so that tests need not be
CLIENT_CHECK = 0.2  # seconds between two checks whether the client is still there
RELEASE_CHECK = 0.01  # seconds between two checks whether a held reply may go on


class Died(Exception):
    """The generation thread died under a request."""


class Chat:
    """One chat request and its answer."""

    def __init__(
        self, machine: Machine, reply: Reply, record: Request, body: Mapping[str, Any], fault: Fault | None
    ) -> None:
        self.machine, self.engine, self.flavour = machine, machine.engine, machine.behaviour
        self.reply, self.record, self.body, self.fault = reply, record, body, fault
        self.streamed = body.get("stream") is True and not (fault and fault.kind == "unstreamed")
        self.model = str(body.get("model") or "default_model")
        self._struck = False
        self._cached = 0  # tokens of the prompt that need no prefill
        self._first_token = 0.0  # when it is due

    async def run(self) -> None:
        """Answer the request."""
        if refusal := self.flavour.refuses(self.body) or self._unserved():
            return await self.reply.whole(refusal)
        if self.flavour.rejects and self.engine.full():
            return await self._busy()
        if self.streamed and self.flavour.opening:
            self.reply.start_stream()
            await self.reply.send([self._chunks.opening()])
        async with self.engine.turn(self._turn_key()):
            try:
                return await self._generate()
            except Died:
                self.reply.closes = True
            except ConnectionError:
                if self._alone and self.record.generated:
                    self._keep()
                raise

    def _unserved(self) -> Answer | None:
        if not self.body["messages"]:
            return self.flavour.no_messages()
        known = self.flavour.swaps or self.model in ("default_model", *self.machine.models)
        return None if known else self.flavour.unknown_model(self.model)

    async def _busy(self) -> None:
        """vllm-mlx 0.6: a stream that finds the Simple engine busy is a 200 with an error event."""
        if not self.streamed:
            detail = {"error": "text_generation_busy", "message": "Text generation is busy"}
            return await self.reply.whole(answer(503, {"detail": detail}))
        self.reply.start_stream()
        return await self.reply.finish([self._chunks.opening(), *self._chunks.error("Internal server error", 500)])

    def _turn_key(self) -> object:
        """mlx_lm.server 0.32: requests share a batch if their model strings are the same, and with a seed never."""
        if not self.flavour.batches_by_model:
            return None
        return object() if self._alone else self.model

    @property
    def _alone(self) -> bool:
        return self.flavour.batches_by_model and self.body.get("seed") is not None

    async def _generate(self) -> None:
        await self._check()
        if self.engine.dead:
            return await self._without_engine()
        if self.flavour.swaps and not await self.engine.load(self.model):
            return await self.reply.whole(self.flavour.unknown_model(self.model))
        whole = self._recall()
        if self.flavour.batches_by_model and (is_poison(self.body) or (whole and not self._alone)):
            self.engine.die()
            return await self._without_engine()
        if self.flavour.batches_by_model and whole:
            return await self._nothing_to_prefill()
        return await (self._stream() if self.streamed else self._whole())

    def _recall(self) -> bool:
        """Look the prompt up in the cache; return whether it is there as a whole."""
        prompt = self._prompt.tokens
        cached = self.engine.prompts.match(self.machine.name_of(self.model), prompt)
        self._cached = min(cached, len(prompt) - 1)
        self.record.prompt_tokens, self.record.cached_tokens = len(prompt), self._cached
        self.machine.count(prompt_tokens=len(prompt), cached_tokens=self._cached)
        return cached == len(prompt)

    async def _nothing_to_prefill(self) -> None:
        """mlx_lm.server 0.32 fails so on a prompt that is wholly cached; in a batch its generation thread dies."""
        self.reply.closes = True
        if self.streamed:
            self.reply.start_stream()
        self.reply.on_end()

    async def _without_engine(self) -> None:
        """mlx_lm.server 0.32.2 fails fast; older ones, and other servers, are silent."""
        if not self.machine.dies_loudly:
            return await self.reply.silence()
        return await self.reply.whole(self.flavour.error(404, "generation thread died"))

    # --- the two kinds of answer

    async def _stream(self) -> None:
        script = self._script
        if not self.reply.started:
            self.reply.start_stream()
        await self._prefill()
        said = script.tokens[:-1] if self.flavour.content_on_finish else script.tokens
        async for start, end in self._ticks(len(script.tokens) + script.silent):
            if await self._strikes(start):
                return
            self._account(end - start)
            texts = [f" {_now():.6f}"] * (end - start) if self.machine.stamped else said[start:end]
            await self.reply.send(self._chunks.tokens(texts, script.thinking - start))
        self._keep()
        if not await self._strikes(sys.maxsize):
            await self.reply.finish([*self._chunks.calls(script.calls), *self._ending(script)])

    def _ending(self, script: Script) -> list[bytes]:
        options = self.body.get("stream_options")
        asked = bool((options or {}).get("include_usage"))
        finish = self._chunks.finish(script.finish, self._usage(script), asked=asked, last=self._last_delta(script))
        if self.fault and self.fault.kind in ENDINGS:
            return ENDINGS[self.fault.kind](finish)
        crashes = self.flavour.batches_by_model and options == {}  # mlx_lm.server 0.32: KeyError 'include_usage'
        return finish if crashes else [*finish, DONE]

    def _last_delta(self, script: Script) -> dict[str, Any]:
        if script.calls and self.flavour.tool_calls == "last":
            return {"tool_calls": script.calls}
        if script.tokens and self.flavour.content_on_finish:
            thinks = len(script.tokens) == script.thinking
            return {self.flavour.reasoning if thinks and self.flavour.reasoning else "content": script.tokens[-1]}
        return {}

    async def _whole(self) -> None:
        script = self._script
        await self._prefill()
        async for start, end in self._ticks(len(script.tokens) + script.silent):
            if await self._strikes(start):
                return
            self._account(end - start)
        self._keep()
        if await self._strikes(sys.maxsize):
            return
        message: dict[str, Any] = {"content": "".join(script.tokens[script.thinking :]) or None}
        if script.thinking:
            message[self.flavour.reasoning or "reasoning"] = "".join(script.tokens[: script.thinking])
        if script.calls:
            message["tool_calls"] = script.calls
        whole = completion(self.flavour, self.model, message, script.finish, self._usage(script))
        await self.reply.whole(whole, sized=True)

    # --- the content

    @cached_property
    def _chunks(self) -> Chunks:
        return Chunks(self.flavour, self.model)

    @cached_property
    def _prompt(self) -> Prompt:
        """The prompt as the tokens that usage and the prompt cache count."""
        opening = mlx_lm_opening(self.body) if self.flavour.continues(self.body) else None
        thinks = bool(self.machine.reasoning) and not self.machine.think_tags
        return prompt_of(self.body, opening=opening, thinks=thinks)

    def _keep(self) -> None:
        """Cache the prompt with as much of its answer as was generated."""
        script, said = self._script, self._script.tokens[: self.record.generated]
        thoughts, content = "".join(said[: script.thinking]), "".join(said[script.thinking :])
        ended = script.finish != "length" and self.record.generated >= len(script.tokens) + script.silent
        sequence = self._prompt.answered(thoughts, content, script.calls if ended else (), ended=ended)
        self._insert(sequence if script.calls or not script.silent else (*sequence, CALL), "assistant")

    def _insert(self, tokens: Tokens, kind: Kind) -> None:
        self.engine.prompts.insert(self.machine.name_of(self.model), tokens, kind)

    def _usage(self, script: Script) -> dict[str, Any]:
        return self.flavour.usage(len(self._prompt.tokens), len(script.tokens) + script.silent, self._cached)

    @cached_property
    def _script(self) -> Script:
        return script_of(self.machine, self.body)

    # --- the timing

    async def _prefill(self) -> None:
        """Wait as long as reading the prompt takes, and cache its beginnings. Meanwhile mlx_lm.server 0.32 sends a
        comment at every step, and one token of every other stream."""
        cached, prompt = self._cached, self._prompt
        new, done, comments = len(prompt.tokens) - cached, 0, list[bytes]()
        for end in self._step_ends():
            if self.machine.prefill_rate:
                async with self.engine.prefill(end - done) as due:
                    await self._until(due)
            for at, kind in () if self._alone else prompt.boundaries:
                if done < at - cached <= end:
                    self._insert(prompt.tokens[:at], kind)
            done = end
            comments += [b": keepalive %d/%d\n\n" % (at, new) for at in ((end - 1, end) if 1 < end == new else (end,))]
            if self.streamed and self.flavour.prefill_comments and (self.machine.prefill_rate or end == new):
                await self.reply.send(comments)
                comments = []
        self._first_token = _now() + self.machine.ttft

    def _step_ends(self) -> list[int]:
        """Where the steps of prefill end, in tokens that are not cached: at the end of a system prompt, too."""
        rate, length = self.machine.prefill_rate, len(self._prompt.tokens)
        step = max(1, min(PREFILL_STEP, int(rate * LONGEST_STEP))) if rate else PREFILL_STEP
        ends = [0]
        for stop in (*(at for at, kind in self._prompt.boundaries if kind == "system"), length):
            if stop > self._cached:
                ends += [*range(ends[-1] + step, stop - self._cached, step), stop - self._cached]
        return ends[1:]

    async def _ticks(self, tokens: int) -> AsyncIterator[tuple[int, int]]:
        """Yield the ranges of tokens that are sent together, each when it is due. A step of prefill delays them all."""
        interval, step = self.machine.token_interval, self._step()
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            await self._while_held(end)
            due = self._first_token + (end - 1) * interval
            late = max(0.0, self.engine.step_ends - due)
            self._first_token += late
            await self._until(due + late)
            yield start, end

    async def _while_held(self, end: int) -> None:
        """Wait until the machine generates as many tokens as `end`; later tokens are as much later."""
        since = _now()
        while self.machine.held_at is not None and end > self.machine.held_at:
            await asyncio.sleep(RELEASE_CHECK)
            await self._check()
        self._first_token += _now() - since

    def _step(self) -> int:
        if self.fault and self.fault.kind in INTERRUPTIONS:
            return 1
        if self.fault and self.fault.kind == "join":
            return 2
        single = self.machine.token_interval or self.machine.flush_each or self.machine.prefill_rate
        return 1 if single else self.machine.tokens_per_write

    async def _until(self, due: float) -> None:
        """Sleep until `due`; check meanwhile whether the client has left or the engine has died."""
        if self.flavour.freezes and not self.streamed:
            time.sleep(max(0.0, due - _now()))  # mlx-omni-server 0.5 generates in its event loop
        interval, silent_since = min(CLIENT_CHECK, self.machine.heartbeat), _now()
        while (wait := due - _now()) > interval:
            await asyncio.sleep(interval)
            await self._check()
            if self.streamed and self.flavour.heartbeats and _now() - silent_since >= self.machine.heartbeat:
                silent_since = _now()
                await self.reply.send([b": heartbeat\n\n"])
        await asyncio.sleep(max(0.0, wait))
        await self._check()

    async def _check(self) -> None:
        """Stop if the client has left and this kind of server notices that, or if the engine has died."""
        notices = self.flavour.notices_leaving if self.streamed else self.flavour.stops_whole
        if notices and self.reply.left:
            raise ConnectionResetError("the client left")
        if self.engine.dead and self.reply.started:
            if not self.machine.dies_loudly:
                await self.reply.silence()
            raise Died

    async def _strikes(self, token: int) -> bool:
        """Return True if the fault strikes before this token and ends the reply."""
        if self.fault is None or self.fault.kind not in INTERRUPTIONS or self._struck or token < self.fault.at_token:
            return False
        self._struck = True
        return await INTERRUPTIONS[self.fault.kind](self.reply, self.fault, self._chunks)

    def _account(self, tokens: int) -> None:
        late = tokens if self.reply.left else 0
        self.record.generated += tokens
        self.record.generated_after_leave += late
        self.machine.count(generated=tokens, generated_after_leave=late)


def _now() -> float:
    return asyncio.get_running_loop().time()
