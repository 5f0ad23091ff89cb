"""The bodies of OpenAI requests, chat completions and embeddings, validated field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from fleet_worker.protocol.wire import WireModel

Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda texts: [texts] if isinstance(texts, str) else texts),
]
"""A list of texts that are not empty, or one text for a list of one."""
StopTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    BeforeValidator(lambda texts: [texts] if isinstance(texts, str) else texts),
]
"""As `Texts`; a node searches each of them in the answer."""


class TextPart(WireModel):
    type: Literal["text"]
    text: str = Field(repr=False)


class ImageUrl(WireModel):
    url: str = Field(repr=False)
    detail: Literal["auto", "low", "high"] | None = None

    @field_validator("url")
    @classmethod
    def _inline(cls, url: str) -> str:
        # mlx_lm.server would fetch http image URLs itself, even for text models: from inside the minis' network.
        if not url.startswith("data:image/"):
            raise ValueError("images must be data:image/... URLs")
        return url


class ImagePart(WireModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(WireModel):
    """One turn. Other fields that OpenAI clients copy from an answer are dropped: no MLX server needs them."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = Field(None, repr=False)
    name: str | None = Field(None, repr=False)
    tool_calls: list[dict[str, Any]] | None = Field(None, repr=False)
    tool_call_id: str | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _not_empty(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content")
        return self


class ChatTemplateKwargs(WireModel):
    """Only the safe arguments: others change how the tokenizer works (`return_tensors` kills mlx_lm.server 0.32)."""

    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


class ChatParams(WireModel):
    """The body of an OpenAI chat completion without `model` and `stream`.

    The bounds exclude what is known to kill servers: the generation thread of mlx_lm.server 0.32 dies of a `stop` that
    is not text, and of a `top_k` as large as the vocabulary.
    """

    messages: list[Message] = Field(min_length=1, repr=False)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1000)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: StopTexts | None = Field(None, max_length=16, repr=False)
    tools: list[dict[str, Any]] | None = Field(None, repr=False)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = Field(None, repr=False)
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = Field(None, repr=False)
    logit_bias: dict[str, float] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    n: Literal[1] | None = None
    user: str | None = Field(None, repr=False)

    @property
    def has_images(self) -> bool:
        return any(
            isinstance(part, ImagePart)
            for message in self.messages
            if isinstance(message.content, list)
            for part in message.content
        )


class EmbedParams(WireModel):
    """The body of an OpenAI embedding without `model`. Only texts: token ids have another meaning for each model."""

    input: Texts = Field(min_length=1, max_length=2048, repr=False)
    user: str | None = Field(None, repr=False)
