"""The bodies of OpenAI requests, chat completions and embeddings, validated field by field.

`openai_fields` says what is changed before, `openai_shapes` what tools and formats look like.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from fleet_worker.protocol import openai_fields
from fleet_worker.protocol.openai_shapes import ResponseFormat, Tool, ToolChoice, check_choice
from fleet_worker.protocol.wire import WireModel

_AS_LIST = BeforeValidator(lambda texts: [texts] if isinstance(texts, str) else texts)
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], _AS_LIST]
"""A list of texts that are not empty, or one text for a list of one."""
StopTexts = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], _AS_LIST]
"""As `Texts`; a node searches each of them in the answer."""
WAYS_OUT = {
    "input": "send texts; LangChain does with check_embedding_ctx_length=False",
    "n": "send the request once for each answer",
    "response_format": 'it is {"type": "json_object"}, or "json_schema" with a schema',
    "role": "developer counts as system; the result of a tool has the role tool",
    "tool_choice": 'it is "auto", "none", "required" or {"type": "function", "function": {"name": "..."}}',
    "tools": 'a tool is {"type": "function", "function": {"name": "...", "parameters": {...}}}',
}
"""What to do about a refused field."""
ReasoningEffort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"], AfterValidator(openai_fields.known_effort)
]


class _Part(WireModel):
    """Other fields of a part, as `cache_control`, are dropped: no MLX server needs them."""

    model_config = ConfigDict(extra="ignore")


class TextPart(_Part):
    type: Literal["text"]
    text: str = Field(repr=False)


class ImageUrl(_Part):
    url: str = Field(repr=False)
    detail: Literal["auto", "low", "high"] | None = None

    @field_validator("url")
    @classmethod
    def _inline(cls, url: str) -> str:
        # mlx_lm.server would fetch http image URLs itself, even for text models: from inside the minis' network.
        if not url.startswith("data:image/"):
            raise ValueError("is an address: put the image itself into a data:image/... URL, in base64")
        return url


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(WireModel):
    """One turn. What an answer has beside its text and tool calls may be sent back (`refusal`, `annotations`, `audio`,
    `reasoning`, `reasoning_content`), and is dropped, as all other fields are: no MLX server needs them."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = Field(None, repr=False)
    name: str | None = Field(None, repr=False)
    tool_calls: list[dict[str, Any]] | None = Field(None, repr=False)
    tool_call_id: str | None = Field(None, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, message: Any) -> Any:
        return openai_fields.prepared_message(message)

    @model_validator(mode="after")
    def _not_empty(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise openai_fields.refused("content", "is missing: a string or a list of parts is needed")
        return self


class ChatTemplateKwargs(WireModel):
    """Only the safe arguments: others change how the tokenizer works (`return_tensors` kills mlx_lm.server 0.32)."""

    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0)
    reasoning_effort: ReasoningEffort | None = None


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
    tools: list[Tool] | None = Field(None, repr=False)
    tool_choice: ToolChoice | None = Field(None, repr=False)
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = Field(None, repr=False)
    logit_bias: dict[str, float] | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    n: Literal[1] | None = None
    user: str | None = Field(None, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, body: Any) -> Any:
        return openai_fields.prepared_chat(body)

    @model_validator(mode="after")
    def _choosable(self) -> ChatParams:
        check_choice(self.tool_choice, self.tools or ())
        return self

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
    dimensions: int | None = Field(None, ge=1)
    """Only the number that the model has: vectors are not shortened."""
    user: str | None = Field(None, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, body: Any) -> Any:
        return openai_fields.prepared_embedding(body)
