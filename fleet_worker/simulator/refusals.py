"""The checks of a chat request: what each MLX server refuses, and what kills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fleet_worker.simulator.answers import Answer, answer, openai_error, unprocessable

Body = Mapping[str, Any]
Check = Callable[[Body], tuple[str, str] | None]

VOCABULARY_SIZE = 49_152  # SmolLM2's
NUMBER = (float, int)
MLX_LM_FIELDS: tuple[tuple[str, Any, Any, float | None, float | None], ...] = (
    ("stream", False, bool, None, None),
    ("max_tokens", 512, int, 1, None),
    ("temperature", 0.0, NUMBER, 0, None),
    ("top_p", 1.0, NUMBER, 0, 1),
    ("top_k", 0, int, 0, None),
    ("min_p", 0.0, NUMBER, 0, 1),
    ("num_draft_tokens", 3, int, 0, None),
    ("repetition_penalty", 0.0, NUMBER, 0, None),
    ("repetition_context_size", 20, int, 0, None),
    ("presence_penalty", 0.0, NUMBER, None, None),
    ("presence_context_size", 20, int, 0, None),
    ("frequency_penalty", 0.0, NUMBER, None, None),
    ("frequency_context_size", 20, int, 0, None),
    ("logprobs", False, bool, None, None),
    ("top_logprobs", -1, int, -1, 11),
    ("xtc_probability", 0.0, float, 0, 1),
    ("xtc_threshold", 0.1, float, 0, 1),
    ("model", "default_model", str, None, None),
    ("adapters", "", (str, type(None)), None, None),
    ("seed", None, (int, type(None)), None, None),
    ("logit_bias", None, (dict, type(None)), None, None),
)


def mlx_lm_refuses(body: Body) -> Answer | None:
    """mlx_lm.server 0.32 checks the fields first, and answers 404 if the chat template fails."""
    if body.get("max_completion_tokens") is not None:
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    if problem := mlx_lm_field(body):
        return answer(400, {"error": problem})
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return answer(400, {"error": "'str' object has no attribute 'get'"})
    if not all("role" in message for message in messages):
        return answer(404, {"error": "'dict object' has no attribute 'role'"})
    if problem := mlx_lm_template(body.get("chat_template_kwargs") or {}):
        return answer(404, {"error": problem})
    return None


def mlx_lm_template(kwargs: Body) -> str | None:
    """It always asks for a generation prompt, which conflicts with the flags that continue a reply elsewhere."""
    if "add_generation_prompt" in kwargs:
        return "apply_chat_template() got multiple values for keyword argument 'add_generation_prompt'"
    if kwargs.get("continue_final_message"):
        return "continue_final_message and add_generation_prompt are not compatible."
    return None


def mlx_lm_field(body: Body) -> str | None:
    """A field that is present must have its type, so that an explicit null is refused."""
    for name, default, kind, least, most in MLX_LM_FIELDS:
        value = body.get(name, default)
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            return f"{name} must be of type {', '.join(one.__name__ for one in kinds)}"
        if least is not None and value < least:
            return f"{name} must be at least {least}"
        if most is not None and value > most:
            return f"{name} must be at most {most}"
    try:
        _ = {int(token): float(bias) for token, bias in (body.get("logit_bias") or {}).items()}
    except ValueError:
        return "logit_bias must be a dict of int to float"
    return None if "messages" in body else "Request did not contain messages"


def is_poison(body: Body) -> bool:
    """Whether the request ends the generation thread of mlx_lm.server 0.32 for good."""
    stop = body.get("stop") or []
    words = [] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return True
    return bool(body.get("top_k", 0) >= VOCABULARY_SIZE and body.get("temperature", 0) > 0)


def has_messages(body: Body) -> tuple[str, str] | None:
    messages = body.get("messages")
    fine = isinstance(messages, list) and all(isinstance(message, dict) and "role" in message for message in messages)
    return None if fine else ("messages", "Input should be a valid list")


def has_model(body: Body) -> tuple[str, str] | None:
    return None if isinstance(body.get("model"), str) else ("model", "Field required")


def has_whole_max_tokens(body: Body) -> tuple[str, str] | None:
    values = (body.get("max_tokens"), body.get("max_completion_tokens"))
    fine = all(isinstance(value, int | None) for value in values)
    return None if fine else ("max_tokens", "Input should be a valid integer")


def has_positive_max_tokens(body: Body) -> tuple[str, str] | None:
    value = body.get("max_tokens")
    return ("max_tokens", "Input should be greater than 0") if value is not None and value <= 0 else None


def has_stop_list(body: Body) -> tuple[str, str] | None:
    return None if isinstance(body.get("stop"), list | None) else ("stop", "Input should be a valid list")


def has_no_nulls(body: Body) -> tuple[str, str] | None:
    wrong = next((name for name in ("max_tokens", "temperature", "top_p", "seed") if body.get(name, 0) is None), None)
    return (wrong, "Input should be a valid number") if wrong else None


def has_known_roles(body: Body) -> tuple[str, str] | None:
    known = {"system", "user", "assistant", "tool"}
    fine = all(message["role"] in known for message in body["messages"])
    return None if fine else ("messages", "Input should be 'system', 'user', 'assistant' or 'tool'")


def has_only_text(body: Body) -> tuple[str, str] | None:
    parts = (part for m in body["messages"] if isinstance(m.get("content"), list) for part in m["content"])
    fine = all(isinstance(value, str) for part in parts for value in part.values())
    return None if fine else ("messages", "Input should be a valid string")


def fastapi_refuses(*checks: Check) -> Callable[[Body], Answer | None]:
    """The first check that fails, as FastAPI reports it: 422, and `detail` is a list."""

    def refuses(body: Body) -> Answer | None:
        for check in (has_messages, has_whole_max_tokens, *checks):
            if problem := check(body):
                return unprocessable(*problem)
        return None

    return refuses


def openai_refuses(body: Body) -> Answer | None:
    for check in (has_messages, has_model, has_whole_max_tokens, has_positive_max_tokens):
        if problem := check(body):
            return openai_error(400, f"{problem[0]}: {problem[1]}")
    return None


def rapid_refuses(body: Body) -> Answer | None:
    """rapid-mlx 0.16 names each field that it refuses, and crashes on the flags that continue a reply elsewhere."""
    for check in (has_messages, has_whole_max_tokens, has_positive_max_tokens):
        if problem := check(body):
            return openai_error(400, f"Invalid request body: {problem[0]}: {problem[1]}")
    if body.get("logit_bias"):
        return openai_error(400, "logit_bias is not supported on this server")
    if "add_generation_prompt" in (body.get("chat_template_kwargs") or {}):
        return answer(500, {"error": {"message": "Internal server error"}})
    return None
