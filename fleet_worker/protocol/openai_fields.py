"""The table of what a body of OpenAI may have, for the router and for all that is in front of it.

- pass: the fields of `ChatParams` and `EmbedParams`, which check their values (`openai`)
- map: `openai_older.REPLACED`, what means the same under another name
- drop: `_NO_EFFECT`, whatever the value; `_NO_EFFECT_IF` and `_UNSET`, with some values; nulls; and in the body of a
  client (`of_client`) the fields that nobody here knows, unless their names are near to those of known ones
- refuse: `_NO_EFFECT_IF` with all other values

What is dropped makes no difference to an answer of this fleet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from fleet_worker.protocol import openai_older

MOST_UNKNOWN = 100
"""Unknown fields of a body that are dropped: each name is compared with those of the known ones."""
LONGEST_NAME = 40
"""Characters of an unknown name that is compared."""
_NO_EFFECT = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "top_a",
    "verbosity",
}
"""Dropped, whatever their value: they say how OpenAI stores, bills or hurries an answer, how long it is likely to be,
and what its stream ends with (here always with the usage). What names the conversation, `prompt_cache_key`, is read by
routers and gateways before. `top_a` is a field of other servers, near to `top_p`."""
_FORMAT = "use response_format"
_OF_OPERATOR = "whoever operates the server decides it: leave it out"
_NO_EFFECT_IF: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False,), "answers come without log probabilities: leave it out"),
    "top_logprobs": ((0,), "answers come without log probabilities: leave it out"),
    "modalities": ((["text"],), "answers are text: leave it out"),
    "functions": (([],), "OpenAI replaced it: use tools"),
    "function_call": (("none",), "OpenAI replaced it: use tool_choice"),
    "audio": ((), "answers are text: leave it out"),
    "web_search_options": ((), "nothing here searches the web: leave it out"),
    "stream": ((False,), "call stream_chat for a stream, and leave it out"),
    "best_of": ((1,), "send the request once for each answer"),
    "prompt_logprobs": ((0,), "answers come without log probabilities: leave it out"),
    "echo": ((False,), "an answer is without its prompt: leave it out"),
    "continue_final_message": ((False,), "an answer is a message of its own: leave it out"),
    "add_generation_prompt": ((True,), "an answer is a message of its own: leave it out"),
    "adapters": ((), _OF_OPERATOR),
    "chat_template": ((), _OF_OPERATOR),
    "draft_model": ((), _OF_OPERATOR),
    "role_mapping": ((), _OF_OPERATOR),
    "grammar": (("",), _FORMAT),
    "guided_choice": ((), _FORMAT),
    "guided_grammar": ((), _FORMAT),
    "guided_json": ((), _FORMAT),
    "guided_regex": ((), _FORMAT),
    "json_schema": ((), _FORMAT),
    "structured_outputs": ((), _FORMAT),
}
"""Dropped with one of these values, refused with any other: then the text tells what to do."""
_UNSET: dict[str, Callable[[int], bool]] = {
    "max_tokens": lambda number: number <= 0,
    "max_completion_tokens": lambda number: number <= 0,
    "seed": lambda number: number < 0,
    "top_k": lambda number: number == -1,
}
"""Integers that mean the same as nothing."""
_EFFORTS = {"xhigh": "high", "max": "high"}
_HANDLED = frozenset({"encoding_format", *_NO_EFFECT, *_NO_EFFECT_IF, *_UNSET})
"""What `prepared_chat` and `prepared_embedding` drop or refuse."""


def of_client(body: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a client's body that are `known`, those that mean the same, and those that are refused.

    Its `model` and `stream` are left out: whoever sends the body on has read them. Unknown fields are dropped, as every
    server of this kind does; one whose name is that of a known field but for one character is a typing error.

    Raises:
        ValidationError: a name is a typing error, or more than `MOST_UNKNOWN` are unknown.
    """
    known = frozenset(known)
    body = {name: value for name, value in body.items() if value is not None and name not in ("model", "stream")}
    if "messages" in known:
        body = openai_older.replaced(body, refused)
    unknown = [name for name in body if isinstance(name, str) and name not in known | _HANDLED]
    if len(unknown) > MOST_UNKNOWN:
        raise refused(unknown[0], f"is one of more than {MOST_UNKNOWN} unknown fields: leave them out")
    near = _near_names(known)
    for name in unknown:
        if meant := next((near[each] for each in _variants(name) if each in near), None):
            raise refused(name, f"unknown field, the nearest that exists is {meant}")
        del body[name]
    return body


def prepared_chat(body: Any) -> Any:
    """Return the body of a chat without what has no effect.

    Clients of llama.cpp, LM Studio and Ollama send `max_tokens` -1 or 0 for no limit, and a `seed` below 0 for any;
    vLLM takes `top_k` -1 for no limit.
    """
    if not isinstance(body, dict):
        return body
    body = _without_effect(body)
    for name, is_unset in _UNSET.items():
        if isinstance(given := body.get(name), int) and not isinstance(given, bool) and is_unset(given):
            del body[name]
    if isinstance(tools := body.get("tools"), list):
        body["tools"] = [_without(tool, "cache_control") for tool in tools]
    return body


def prepared_embedding(body: Any) -> Any:
    """Return the body of an embedding without `encoding_format`: a reply holds its vectors in both forms."""
    if not isinstance(body, dict):
        return body
    given = body.get("encoding_format", "float")
    if given not in ("float", "base64"):
        raise refused("encoding_format", "must be 'float' or 'base64'; a reply has its vectors in both forms")
    return {name: value for name, value in body.items() if name not in ("encoding_format", *_NO_EFFECT)}


def prepared_message(message: Any) -> Any:
    """Return a message without what an answer may have empty, and with a refusal as the text that it is."""
    if not isinstance(message, dict):
        return message
    message = dict(message)
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if message.get("content") is None and isinstance(message.get("refusal"), str):
        message["content"] = message["refusal"]
    if isinstance(parts := message.get("content"), list):
        message["content"] = [_as_text(part) for part in parts]
    return message


def known_effort(effort: str) -> str:
    """Return the effort that servers and chat templates know: OpenAI's higher ones are `high`."""
    return _EFFORTS.get(effort, effort)


def refused(name: str, reason: str) -> ValidationError:
    """Return the error of one field of an object, for a validator of that object to raise."""
    fault = InitErrorDetails(type=PydanticCustomError("unsupported", reason), loc=(name,), input=None)
    return ValidationError.from_exception_data("body", [fault])


@functools.cache
def _near_names(known: frozenset[str]) -> dict[str, str]:
    """Return the known names by all their variants. Short ones are near to too many others."""
    names = sorted(name for name in known if len(name) >= 4)
    variants = {variant: name for name in names for variant in _variants(name)}
    return variants | {_plain(name): name for name in names}


def _variants(name: str) -> list[str]:
    """Return the plain name, and it without each of its characters. Two names of which one character is missing, added,
    another one or moved have such a variant in common."""
    plain = _plain(name[: LONGEST_NAME + 1])
    if len(plain) > LONGEST_NAME:
        return []
    return [plain, *(plain[:at] + plain[at + 1 :] for at in range(len(plain)))]


def _plain(name: str) -> str:
    """Return `maxtokens` for max_tokens, maxTokens and max-tokens."""
    return name.lower().replace("_", "").replace("-", "")


def _without_effect(body: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in body.items():
        harmless, way_out = _NO_EFFECT_IF.get(name, ((), ""))
        if name in _NO_EFFECT or any(type(value) is type(each) and value == each for each in harmless):
            continue
        if way_out and value is not None:
            raise refused(name, f"is not supported: {way_out}")
        kept[name] = value
    return kept


def _as_text(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _without(value: Any, name: str) -> Any:
    return {key: part for key, part in value.items() if key != name} if isinstance(value, dict) else value
