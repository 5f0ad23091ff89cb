"""One chat request on a simulated machine: waiting for its turn, the tokens of the reply, and when each is sent."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fleet_worker.simulator.answers import Answer, answer
from fleet_worker.simulator.chunks import DONE, Chunks, completion, tool_call
from fleet_worker.simulator.machine import Machine, Request
from fleet_worker.simulator.manners import ENDINGS
from fleet_worker.simulator.refusals import Body, is_poison
from fleet_worker.simulator.replies import INTERRUPTIONS, Fault, Reply
from fleet_worker.simulator.servers import mlx_lm_opening
from fleet_worker.simulator.texts import first_characters, first_of, json_tokens, reply_tokens, whole_tokens, without

PREFILL_STEP = 2048  # tokens between two keepalive comments of mlx_lm.server 0.32
CLIENT_CHECK = 0.2  # seconds between two checks whether the client is still there
RELEASE_CHECK = 0.01  # seconds between two checks whether a held reply may go on


class Died(Exception):
    """The generation thread died under a request."""


@dataclass(frozen=True, slots=True)
class Script:
    """The content of a reply: its tokens, of which the first `thinking` are reasoning, and then tool calls."""

    tokens: Sequence[str]
    thinking: int
    silent: int  # tokens of the tool calls, which are no text
    calls: Sequence[Mapping[str, Any]]
    finish: str


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
        return self.model if self.body.get("seed") is None else object()

    async def _generate(self) -> None:
        await self._check()
        if self.engine.dead:
            return await self._without_engine()
        if self.flavour.swaps and not await self.engine.load(self.model):
            return await self.reply.whole(self.flavour.unknown_model(self.model))
        if self.flavour.batches_by_model and (is_poison(self.body) or self._is_cached()):
            self.engine.die()
            return await self._without_engine()
        return await (self._stream() if self.streamed else self._whole())

    def _is_cached(self) -> bool:
        return self.body.get("seed") is None and self.engine.has_cached(self._text)

    @cached_property
    def _text(self) -> str:
        """The prompt as one text."""
        if self.flavour.continues(self.body):
            return json.dumps(self.body["messages"][:-1]) + mlx_lm_opening(self.body)
        return json.dumps(self.body["messages"])

    async def _without_engine(self) -> None:
        """mlx_lm.server 0.32.2 fails fast; older ones, and other servers, are silent."""
        if not self.machine.dies_loudly:
            return await self.reply.silence()
        return await self.reply.whole(self.flavour.error(404, "generation thread died"))

    # --- the two kinds of answer

    async def _stream(self) -> None:
        script = self._script()
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
        if self.flavour.batches_by_model:
            ending = "<|tool_call|>" * script.silent + "<|im_end|>" * (script.finish != "length")
            self.engine.keep(self._text + "".join(script.tokens) + ending)
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
        script = self._script()
        await self._prefill()
        async for start, end in self._ticks(len(script.tokens) + script.silent):
            if await self._strikes(start):
                return
            self._account(end - start)
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
    def _prompt(self) -> list[str]:
        """The prompt as the tokens that usage and the prefix cache count."""
        return [word for message in self.body["messages"] for word in str(message.get("content")).split()]

    @cached_property
    def _cached(self) -> int:
        return self.engine.recall(self._prompt) if self.machine.prefill_rate else 0

    def _usage(self, script: Script) -> dict[str, Any]:
        return self.flavour.usage(len(self._prompt), len(script.tokens) + script.silent, self._cached)

    def _script(self) -> Script:
        limit = self.flavour.limit(self.body)
        thoughts = self._thoughts()
        has_results = self.body["messages"][-1].get("role") == "tool"
        calls = self.machine.tool_calls if self.body.get("tools") and not has_results else ()
        content, natural = ([], 0) if calls else self._stopped(*self._content(limit))
        silent = sum(len(json.dumps(call)) // 4 for call in calls)
        cut = len(thoughts) + natural + silent >= limit
        tokens = [*thoughts, *content][: limit - 1 if cut and self.flavour.drops_last else limit]
        unlimited = "tool_calls" if calls else "stop"
        limited = "length" if self.flavour.says_length else "stop"
        return Script(
            tokens=tokens,
            thinking=0 if self.machine.think_tags else min(len(thoughts), len(tokens)),
            silent=min(silent, limit - len(tokens)),
            calls=[] if cut else [tool_call(call, index) for index, call in enumerate(calls)],
            finish=limited if cut else unlimited,
        )

    def _thoughts(self) -> list[str]:
        """The tokens of reasoning. A continued reply has none: they came with its beginning."""
        reasoning = () if self.flavour.continues(self.body) else self.machine.reasoning
        return ["<think>", *reasoning, "</think>"] if reasoning and self.machine.think_tags else list(reasoning)

    def _content(self, limit: int) -> tuple[list[str], int]:
        """The visible tokens, as far as the limit allows, and how many there would be without one."""
        wanted = self.body.get("response_format") or {}
        if wanted.get("type") in self.flavour.json_formats:
            whole = json_tokens(wanted)
            return whole[:limit], len(whole)
        whole = self._reply(self.body["messages"], limit)
        if not self.flavour.continues(self.body):
            return whole, self.machine.tokens
        *before, partial = self.body["messages"]
        rest, said = self._reply(before, self.machine.tokens), str(partial.get("content"))
        said = said.rstrip() if self.flavour.trims_partial else said
        if not "".join(rest).startswith(said):
            return whole, self.machine.tokens  # this model would not have begun so: continue with any text
        left = len(said)
        while rest and left >= len(rest[0]):
            left -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][left:] if self.flavour.keeps_space else rest[0][left:].removeprefix(" ")
        if self.machine.drift is not None:
            rest[self.machine.drift :] = reversed(rest[self.machine.drift :])
        return rest, len(rest)

    def _stopped(self, content: list[str], natural: int) -> tuple[list[str], int]:
        """What a stop string of the request leaves of the content, and how many tokens there would be."""
        stop = self.body.get("stop") or []
        texts = [stop] if isinstance(stop, str) else stop
        if self.flavour.stop == "ignored":
            return content, natural
        ending = texts if self.flavour.stop == "ends" else whole_tokens(content, texts)
        end = first_of(ending, "".join(content))
        if end is not None:
            content = first_characters(content, end)
            return content, len(content)
        return without(content, texts) if self.flavour.stop == "cut" else content, natural

    def _reply(self, messages: Sequence[Body], limit: int) -> list[str]:
        return reply_tokens(messages, limit, tokens=self.machine.tokens, separators=self.machine.separators)

    # --- the timing

    async def _prefill(self) -> None:
        """Wait as long as reading the prompt takes. Meanwhile mlx_lm.server 0.32 sends a comment at every step, and no
        token of any stream."""
        begin, rate, new = _now(), self.machine.prefill_rate or float("inf"), len(self._prompt) - self._cached
        if self.machine.prefill_rate:
            begin = max(begin, self.engine.busy_until)
            self.engine.busy_until = begin + new / rate
        self._first_token = begin + new / rate + self.machine.ttft
        if self.streamed and self.flavour.prefill_comments:
            for done in (*range(PREFILL_STEP, new, PREFILL_STEP), new):
                await self._until(begin + done / rate)
                await self.reply.send([b": keepalive %d/%d\n\n" % (done, new)])

    async def _ticks(self, tokens: int) -> AsyncIterator[tuple[int, int]]:
        """Yield the ranges of tokens that are sent together, each when it is due."""
        interval, step = self.machine.token_interval, self._step()
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            await self._while_held(end)
            await self._until(max(self._first_token + (end - 1) * interval, self.engine.busy_until))
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
        return 1 if self.machine.token_interval or self.machine.flush_each else self.machine.tokens_per_write

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
