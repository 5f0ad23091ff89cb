"""What each kind of MLX server does with each parameter of a chat: the one table.

A parameter is never dropped in silence. It is sent, or the node does what it asks for, or the request is refused by its
name, so that the router tries an instance that can. What has no influence on the answer is dropped, and the reply says
so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, get_args

from fleet_worker.errors import UnsupportedParameter
from fleet_worker.protocol.openai import ChatParams

Kind = Literal["mlx_lm", "vllm_mlx", "mlx_openai", "omni", "rapid_mlx", "mlx_vlm", "openai"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Treatment = Literal["sent", "checked", "node", "renamed", "dropped", "refused"]
"""sent: the server does it. checked: it is sent, and the node corrects or checks the answer. node: it is not sent, the
node does it. renamed: it is sent under another name. dropped: it is not sent, and the reply says so. refused: the
request fails with `UnsupportedParameter`, unless the value changes nothing."""

_SENT: Final = "sent"
_CHECKED: Final = "checked"
_NODE: Final = "node"
_RENAMED: Final = "renamed"
_DROPPED: Final = "dropped"
_REFUSED: Final = "refused"

# fmt: off
TABLE: Mapping[str, tuple[Treatment, ...]] = {
    # in the order of KINDS:                mlx_lm     vllm_mlx   mlx_openai omni      rapid_mlx  mlx_vlm    openai
    "max_tokens":                          (_SENT,     _SENT,     _SENT,     _SENT,    _SENT,     _SENT,     _SENT),
    "max_completion_tokens":               (_RENAMED,  _RENAMED,  _RENAMED,  _RENAMED, _RENAMED,  _RENAMED,  _RENAMED),
    "temperature":                         (_SENT,     _SENT,     _SENT,     _SENT,    _SENT,     _SENT,     _SENT),
    "top_p":                               (_SENT,     _SENT,     _SENT,     _SENT,    _SENT,     _SENT,     _SENT),
    "top_k":                               (_SENT,     _SENT,     _SENT,     _REFUSED, _SENT,     _SENT,     _REFUSED),
    "min_p":                               (_SENT,     _SENT,     _SENT,     _REFUSED, _SENT,     _SENT,     _REFUSED),
    "presence_penalty":                    (_SENT,     _SENT,     _SENT,     _REFUSED, _SENT,     _SENT,     _SENT),
    "frequency_penalty":                   (_SENT,     _REFUSED,  _SENT,     _REFUSED, _SENT,     _SENT,     _SENT),
    "repetition_penalty":                  (_SENT,     _SENT,     _SENT,     _REFUSED, _SENT,     _SENT,     _REFUSED),
    "logit_bias":                          (_SENT,     _SENT,     _SENT,     _REFUSED, _REFUSED,  _SENT,     _SENT),
    "seed":                                (_SENT,     _REFUSED,  _REFUSED,  _REFUSED, _SENT,     _SENT,     _SENT),
    "stop":                                (_NODE,     _CHECKED,  _NODE,     _NODE,    _CHECKED,  _NODE,     _CHECKED),
    "tools":                               (_SENT,     _SENT,     _SENT,     _SENT,    _SENT,     _SENT,     _SENT),
    "tool_choice: none":                   (_NODE,     _SENT,     _NODE,     _NODE,    _SENT,     _SENT,     _SENT),
    "tool_choice: required or a function": (_REFUSED,  _SENT,     _REFUSED,  _REFUSED, _SENT,     _SENT,     _SENT),
    "parallel_tool_calls: false":          (_NODE,     _NODE,     _NODE,     _NODE,    _CHECKED,  _NODE,     _CHECKED),
    "response_format: json_object":        (_NODE,     _CHECKED,  _NODE,     _NODE,    _CHECKED,  _CHECKED,  _CHECKED),
    "response_format: json_schema":        (_REFUSED,  _CHECKED,  _CHECKED,  _CHECKED, _CHECKED,  _CHECKED,  _CHECKED),
    "reasoning_effort":                    (_RENAMED,  _RENAMED,  _RENAMED,  _DROPPED, _SENT,     _SENT,     _SENT),
    "chat_template_kwargs":                (_SENT,     _SENT,     _SENT,     _REFUSED, _SENT,     _RENAMED,  _REFUSED),
    "chat_template_kwargs.thinking_budget": (_SENT,    _SENT,     _REFUSED,  _REFUSED, _SENT,     _RENAMED,  _REFUSED),
    "user":                                (_DROPPED,  _DROPPED,  _DROPPED,  _DROPPED, _DROPPED,  _DROPPED,  _DROPPED),
}
# fmt: on
"""Facts of mlx_lm.server 0.32, vllm-mlx 0.6, mlx-openai-server 1.8, mlx-omni-server 0.5, rapid-mlx 0.16 and mlx-vlm
0.7. An `openai` server is unknown: it is taken to do what OpenAI documents, and nothing else."""

_CHANGES_NOTHING: Mapping[str, Any] = {
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "stop": [],
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "n": 1,
}
"""Values that ask for what a server does anyway. They are sent where the field is, and else left out."""
_ONLY_DRAWS = ("seed", "top_k", "min_p")
"""What has no influence at temperature 0, where nothing is drawn at random."""


def treatment(row: str, kind: str) -> Treatment:
    """Return what this kind of server, or its node, does with a row of the table; "refused" if it is not in there."""
    return TABLE[row][KINDS.index(kind)] if row in TABLE else "refused"


@functools.cache
def sent_fields(kind: str) -> frozenset[str]:
    """Return the fields of a chat that may be sent to this kind of server, `messages` apart."""
    sent = (row for row in TABLE if treatment(row, kind) in ("sent", "checked"))
    return frozenset(re.split("[:.]", row)[0] for row in sent)


def may_be_refused(params: ChatParams) -> bool:
    """Return False if no kind of server refuses these parameters. It is quick: most requests have only those."""
    return not params.model_fields_set <= _NEVER_REFUSED


_NEVER_REFUSED = {"messages", "n", *(row for row, cells in TABLE.items() if "refused" not in cells)}


def refused_parameter(params: ChatParams, kind: str, temperature: float) -> str | None:
    """Return the name of a parameter that this kind of server cannot do; None if it can do all of them.

    A kind that is not in the table, of a newer version, can do everything as far as is known.
    """
    if kind not in KINDS or not may_be_refused(params):
        return None
    refused = (field for field, row in _asked(params, temperature) if treatment(row, kind) == "refused")
    return next(refused, None)


def check_parameters(params: ChatParams, kind: str, temperature: float) -> None:
    """Raise `UnsupportedParameter` if this kind of server cannot do what one of the parameters asks for."""
    if field := refused_parameter(params, kind, temperature):
        error = unsupported(field, f"a {kind} server cannot do")
        error.retryable = True  # another one may
        raise error


def unsupported(parameter: str, servers: str) -> UnsupportedParameter:
    """Return the error that names this parameter. `servers` tells who cannot do it: "a mlx_lm server cannot do"."""
    text = f"{parameter}: {servers} what it asks for: leave it out, or use an instance with another MLX server"
    return UnsupportedParameter(text, param=parameter)


_MAY_BE_DROPPED = {*_ONLY_DRAWS, *(row for row, cells in TABLE.items() if "dropped" in cells)}


def dropped_parameters(params: ChatParams, kind: str, temperature: float) -> list[str]:
    """Return the names of the parameters that are given, and that nothing is done with."""
    if params.model_fields_set.isdisjoint(_MAY_BE_DROPPED):
        return []
    dropped = [field for field, row in _asked(params, temperature) if treatment(row, kind) == "dropped"]
    if temperature == 0:
        given = params.model_dump(include=set(_ONLY_DRAWS), exclude_none=True)
        dropped += [field for field in given if treatment(field, kind) == "refused"]
    return dropped


def _asked(params: ChatParams, temperature: float) -> Iterator[tuple[str, str]]:
    """Yield name and row of each parameter that asks for something."""
    for field, value in params.model_dump(exclude={"messages"}, exclude_none=True).items():
        if _asks(field, value, temperature):
            yield field, _row(field, value)
    if params.chat_template_kwargs and params.chat_template_kwargs.thinking_budget is not None:
        yield "chat_template_kwargs.thinking_budget", "chat_template_kwargs.thinking_budget"


def _asks(field: str, value: Any, temperature: float) -> bool:
    if field in _ONLY_DRAWS and temperature == 0:
        return False
    return bool(value != _CHANGES_NOTHING.get(field, {}))


def _row(field: str, value: Any) -> str:
    match field:
        case "response_format":
            return f"response_format: {value.get('type')}"
        case "tool_choice":
            return "tool_choice: none" if value == "none" else "tool_choice: required or a function"
        case "parallel_tool_calls":
            return "parallel_tool_calls: false"
    return field
