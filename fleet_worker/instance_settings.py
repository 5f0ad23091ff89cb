"""Settings of an instance, which is one MLX server, and of its models."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from fleet_worker import urls
from fleet_worker.certificates import OF_INSTANCE, TLS, check_content, check_file

Capability = Literal["chat", "stream_chat", "embed"]
Server = Literal["auto", "mlx_lm", "vllm_mlx", "mlx_openai", "omni", "rapid_mlx", "mlx_vlm", "openai"]


def _of_list(value: Any) -> Any:
    """Return what a list of features stands for; what is no list of names is refused as it is."""
    names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return dict.fromkeys(value, True) if names else value


Features = Annotated[dict[str, bool], BeforeValidator(_of_list)]
"""`{tools = true, vision = false}`, or a list of those that are there."""
PemFile = Annotated[Path, AfterValidator(check_file)]

PORT = "{port}"
"""What stands for the port of `base_url` in the command line of a managed server."""
FIRST_PORT = 8080
UNKNOWN_PORTS = (8000, 8080)
"""The ports of this host that are tried for an instance without `base_url`."""


def _words(command: Any) -> Any:
    """Return the words of a command line, split as a POSIX shell would."""
    try:
        words = tuple(shlex.split(command) if isinstance(command, str) else command)
    except ValueError:
        raise ValueError("has a quote that is not closed, or ends with a backslash") from None
    except TypeError:
        words = (None,)
    if not all(isinstance(word, str) for word in words):
        raise ValueError("must be a text, or a list of texts")
    if not words or not words[0].strip():
        raise ValueError("must begin with the name of a program")
    if any(re.search(r"[\x00\r\n]", word) for word in words):
        raise ValueError("must be one line")
    return words


CommandLine = Annotated[str | tuple[str, ...], BeforeValidator(_words)]
"""A tuple of words in the end. `str` is there for variables, whose text would have to be JSON without it."""


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _variables(environment: dict[str, SecretStr]) -> dict[str, SecretStr]:
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError("a variable is named with letters, digits and '_' only")
        if "\0" in value.get_secret_value():
            raise ValueError(f"the value of {name} holds a character that no variable can have")
    return environment


Environment = Annotated[dict[str, Annotated[SecretStr, BeforeValidator(_number_as_text)]], AfterValidator(_variables)]


class Group(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        populate_by_name=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Model(Group):
    """One model that an instance serves, under the public name that callers ask for."""

    backend: str | None = None
    """The only string that is ever sent to this server as `model`. Without it, the public name."""
    context_window: int | None = Field(None, gt=0)
    """Tokens of a prompt and its answer together. Default: what the model's `config.json` says, if it is on this host.
    Published in the registry; routers refuse prompts that surely do not fit."""
    max_output_tokens: int = Field(4096, gt=0)
    """Tokens: the `max_tokens` of a request that names none. Servers default to anything from 512 to 1,000,000."""
    temperature: float = Field(0.7, ge=0, le=2)
    """The `temperature` of a request that names none, without a unit. Servers default to anything from 0.0 to 1.0."""
    dimensions: int | None = Field(None, gt=0)
    """Numbers in an embedding, checked in every reply. A model that has it is an embedding model, whatever its name."""
    starts_in_reasoning: bool = False
    """True if the chat template itself opens `<think>`, so that the output begins with reasoning."""
    chat_template: str | None = Field(None, min_length=1)
    """What mlx_lm.server was started with (a folder, or a name in the local Hugging Face cache), or a Jinja file.

    A server needs it to continue an answer that another server began. It is found without this setting if `backend`
    names the same, or if the server reports a folder.
    """
    features: Features = {}
    """Features of this model, as in `{ tools = true, vision = false }`. They replace what its name suggests."""


class InstanceLimits(Group):
    """`limits` of an instance."""

    concurrency: int = Field(1, ge=1, le=256)
    """Slots: the number of requests that this instance runs at the same time."""
    embed_batch: int = Field(64, ge=1)
    """Number of texts in one embedding request to the server. A larger one is split."""


class AllowedUse(Group):
    """`usage` of an instance."""

    inference: bool = True
    """Allow `chat` and `stream_chat`."""
    embedding: bool = True
    """Allow `embed`."""
    image: bool = False
    """Reserved for image generation: nothing reads it yet."""


class OptIn(Group):
    """`fleet` of an instance. An instance is served only if both switches are on."""

    enabled: bool = False
    """The instance is part of the fleet."""
    respond_to_requests: bool = False
    """The instance takes requests."""
    capabilities: tuple[Capability, ...] = ("chat", "stream_chat", "embed")
    """What it takes requests for, as far as `usage` allows."""


class ServerTimeouts(Group):
    """`clocks` of an instance: three timeouts for one request, because each detects another fault."""

    connect: float = Field(5.0, gt=0)
    """Seconds for connecting to the server."""
    first_content: float = Field(240.0, gt=0)
    """Seconds until the first token: queueing and prefill. A long prompt on a cold cache takes minutes."""
    gap: float = Field(60.0, gt=0)
    """Seconds between two events after the first token. Must be longer than the prefill of a concurrent request."""

    @model_validator(mode="after")
    def _ordered(self) -> ServerTimeouts:
        if self.gap > self.first_content:
            raise ValueError("clocks.gap must not exceed clocks.first_content")
        return self


class Instance(Group):
    """One MLX server."""

    base_url: Annotated[str, AfterValidator(urls.server_url)] | None = Field(
        None, validation_alias=AliasChoices("base_url", "api_base", "endpoint", "mlx_api_base")
    )
    """URL of the server. Without it, and without `serve`, ports 8000 and 8080 of this host are tried."""
    api_key: SecretStr | None = Field(None, validation_alias=AliasChoices("api_key", "mlx_api_key"))
    """Bearer token for the server. Better set by a variable, as in FLEET_INSTANCES__LOCAL__API_KEY."""
    ca: PemFile | None = None
    """PEM file of the CA of an `https://` server. Without it, the CAs count that browsers trust."""
    serve: CommandLine | None = Field(None, repr=False)
    """Command line of the server, which `fleet-worker up` then runs, without a shell. `{port}`: that of `base_url`."""
    environment: Environment = Field({}, repr=False)
    """Variables for the server of `serve`, as in `{ HF_HOME = "~/models" }`. They are never shown."""
    serve_timeout: float = Field(900.0, gt=0)
    """Seconds that the server of `serve` has to accept connections. Then it is ended and started again."""
    max_memory: ByteSize | None = Field(None, ge=100_000_000)
    """Bytes, or text as in `"12 GB"`: if the server of `serve` and its children use more, it is started again."""
    server: Server = "auto"
    """The software of the server; `auto` asks it."""
    usage: AllowedUse = AllowedUse()
    """What the instance may be used for."""
    limits: InstanceLimits = InstanceLimits()
    """How much it does at the same time."""
    fleet: OptIn = OptIn()
    """Whether it is served, and with what capabilities."""
    prompt_cache_size: int = Field(10, ge=0, le=1_000)
    """Number of prompts that the server keeps in its cache, as mlx_lm.server is told by `--prompt-cache-size`.
    0 if it has none. Routers prefer a node whose server should have the beginning of a prompt."""
    clocks: ServerTimeouts = ServerTimeouts()
    """Timeouts of its requests, in seconds."""
    models: dict[str, Model] = {}
    """Its models by public name. Without any, those that the server reports and the two lists below allow."""
    model_whitelist: tuple[str, ...] = ()
    """If not empty, a reported model must contain one of these texts in its name, in any case."""
    model_blacklist: tuple[str, ...] = ()
    """A reported model must contain none of these texts in its name, in any case."""
    features: Features = {}
    """Features of all its models that do not set their own."""

    @model_validator(mode="after")
    def _usable_ca(self) -> Instance:
        if self.ca:
            if not (self.base_url or "").startswith("https://"):
                raise ValueError("ca is set, but base_url does not begin with https://")
            check_content(TLS(self.ca), OF_INSTANCE)
        return self

    @model_validator(mode="after")
    def _servable(self) -> Instance:
        if self.serve and self.base_url and not urls.is_loopback(urlsplit(self.base_url).hostname or ""):
            raise ValueError("serve is set, so base_url must be of this host, as http://127.0.0.1:8080")
        if self.serve and not self.base_url and not any(PORT in word for word in self.serve):
            raise ValueError(f"serve must contain {PORT}, or base_url must name the port that the server listens on")
        if not self.serve and (unused := [name for name in NEED_SERVE if name in self.model_fields_set]):
            raise ValueError(f"{unused[0]} is set, but serve is not, and it is for the server that serve starts")
        return self

    @property
    def opted_in(self) -> bool:
        return self.fleet.enabled and self.fleet.respond_to_requests

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """The capabilities that its lanes may have: those it opted in for, as far as `usage` allows them."""
        allowed = {"chat": self.usage.inference, "stream_chat": self.usage.inference, "embed": self.usage.embedding}
        return tuple(capability for capability in self.fleet.capabilities if allowed[capability])

    def allows(self, model: str) -> bool:
        """Tell whether the whitelist and the blacklist (substrings, in any case) allow this model to be served."""
        name = model.lower()
        if self.model_whitelist and not any(part.lower() in name for part in self.model_whitelist):
            return False
        return not any(part.lower() in name for part in self.model_blacklist)


NEED_SERVE = ("environment", "serve_timeout", "max_memory")
"""Settings that are allowed only beside `serve`."""
OF_MANAGED_SERVER = frozenset({"serve", *NEED_SERVE})
"""Settings that `fleet-worker up` reads, to run the server, and its node does not."""


def with_ports(instances: Mapping[str, Instance]) -> dict[str, Instance]:
    """Return the instances with a `base_url` for each that has `serve` and none: the next port that no other has.

    Raises:
        ValueError: two servers would listen on one port.
    """
    taken = {port for instance in instances.values() for port in _ports(instance)}
    free = (port for port in itertools.count(FIRST_PORT) if port not in taken)
    found: dict[str, Instance] = {}
    managed: dict[int, str] = {}
    for name, instance in instances.items():
        if instance.serve and not instance.base_url:
            instance = instance.model_copy(update={"base_url": f"http://127.0.0.1:{next(free)}"})
        if instance.serve and (other := managed.setdefault(_ports(instance)[0], name)) != name:
            raise ValueError(f"{name} has the port of {other} in its base_url, and serve starts a server for both")
        found[name] = instance
    return found


def _ports(instance: Instance) -> tuple[int, ...]:
    """Return the ports of this host on which the server may be."""
    if not instance.base_url:
        return () if instance.serve else UNKNOWN_PORTS
    url = urlsplit(instance.base_url)
    if not urls.is_loopback(url.hostname or ""):
        return ()
    return (url.port or (443 if url.scheme == "https" else 80),)
