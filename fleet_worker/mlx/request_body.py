"""The bodies that an MLX server is sent: of a chat, and of one that goes on where it broke off."""

from __future__ import annotations

from typing import Any

from fleet_worker.mlx.chat_templates import left_open
from fleet_worker.mlx.offering import Offering
from fleet_worker.mlx.profiles import ServerProfile
from fleet_worker.protocol.openai import ChatParams, Message


def chat_body(params: ChatParams, offering: Offering, quirks: ServerProfile) -> dict[str, Any]:
    """The body for one server: always streaming (only a stream can be stopped), always with explicit limits."""
    given = params.model_dump(exclude={"messages"}, exclude_none=True)
    given["messages"] = [_message(message) for message in params.messages]
    given["max_tokens"] = params.max_tokens or params.max_completion_tokens or offering.settings.max_output_tokens
    given.setdefault("temperature", offering.settings.temperature)
    if params.reasoning_effort and "reasoning_effort" not in quirks.fields:
        given["chat_template_kwargs"] = {
            "reasoning_effort": params.reasoning_effort,
            **given.get("chat_template_kwargs", {}),
        }
    if params.tool_choice == "none" and "tool_choice" not in quirks.fields:
        given.pop("tools", None)
    body = {name: value for name, value in given.items() if name in quirks.fields}
    return {**body, "model": offering.backend, "stream": True, "stream_options": {"include_usage": True}}


def continued_body(
    body: dict[str, Any], partial: str, offering: Offering, quirks: ServerProfile, *, exact: bool
) -> dict[str, Any] | None:
    """The body by which a server goes on with `partial`, the beginning of its answer to `body`; None if none does.

    mlx_lm.server needs the model's own chat template for it: it refuses the flags that others take, with a 404.
    And it dies of a prompt that it has cached to its end: an earlier answer to the same request that `max_tokens` ended
    where `partial` ends. Unless the text has to be `exact`, a space in front of it makes another prompt.
    """
    turn = {"role": "assistant", "content": partial}
    longer = {**body, "messages": [*body["messages"], turn]}
    match quirks.continues:
        case "flags":
            return _with_template_kwargs(longer, add_generation_prompt=False, continue_final_message=True)
        case "partial" if not offering.features["vision"].value:  # started for images, it begins a new turn
            return {**longer, "messages": [*body["messages"], {**turn, "partial": True}]}
        case "always":
            return {**body, "messages": _with_more_of_the_last_turn(body["messages"], partial)}
        case "template" if offering.template:
            template = offering.template.tool_use if "tools" in body else offering.template.default
            # The prompt ends inside of an open tag; what was delivered is visible text.
            closing = "\n</think>\n\n" if offering.settings.starts_in_reasoning else ""
            before = closing if exact else f"{closing} "
            return _with_template_kwargs(longer, chat_template=left_open(template, before=before))
    return None


def lacks_template(offering: Offering, quirks: ServerProfile) -> bool:
    """Would it take the model's chat template to go on with a stream of it here, and is that not found?"""
    return quirks.continues == "template" and "stream_chat" in offering.capabilities and not offering.template


def _with_template_kwargs(body: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    return {**body, "chat_template_kwargs": {**body.get("chat_template_kwargs", {}), **kwargs}}


def _with_more_of_the_last_turn(messages: list[dict[str, Any]], partial: str) -> list[dict[str, Any]]:
    """It went on with a caller's own last turn, if that is an assistant's, as it goes on with ours."""
    *before, last = messages
    if last["role"] == "assistant" and isinstance(last["content"], str):
        return [*before, {**last, "content": last["content"] + partial}]
    return [*messages, {"role": "assistant", "content": partial}]


def _message(message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    plain.setdefault("content", "")
    # OpenAI's newer name for it: mlx-openai-server answers 422, and templates do not know it.
    plain["role"] = plain["role"].replace("developer", "system")
    return plain
