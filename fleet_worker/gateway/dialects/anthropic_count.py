"""`/v1/messages/count_tokens`: how many tokens a prompt has."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.anthropic_messages import problem_body, prompt
from fleet_worker.gateway.dialects.anthropic_request import WAYS_OUT, Prompt
from fleet_worker.gateway.dialects.client_body import read
from fleet_worker.gateway.dialects.dialect import CountAsked
from fleet_worker.gateway.json_text import compact

__all__ = ["asked", "problem_body"]


def asked(body: dict[str, Any], request_id: str, created: int) -> CountAsked:
    given = read(Prompt, body, WAYS_OUT)
    return CountAsked(given.model, prompt(given), _answer)


def _answer(tokens: int) -> bytes:
    return compact({"input_tokens": tokens}).encode("ascii")
