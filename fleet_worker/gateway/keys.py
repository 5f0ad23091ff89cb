"""Keys: who may use the gateway, and what each may ask for.

A client sends `sk-fleet-ID-SECRET`. The gateway keeps only the SHA-256 of it, in a TOML file with a table for each key:

    [keys.alice]
    hashes = ["3f9c1b2a:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
    models = ["qwen3-*"]
    aliases = { "gpt-4o" = "qwen3-14b", "claude-*" = ["qwen3-32b", "qwen3-14b"] }
    rpm = 60
    expires = 2027-01-31

`fleet-worker keys new alice` makes one. `Keys.load(path)` reads the file, `keys.find(secret)` returns the `Key`, and
`keys.reload()` reads it again. No text, log line or repr here shows a secret or its hash.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator

from fleet_worker import config_file
from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.problems import Problem, Refused
from fleet_worker.instance_settings import Group
from fleet_worker.protocol.request import Priority

log = logging.getLogger(__name__)

PREFIX = "sk-fleet-"
MOST_BYTES = 10_000_000
"""Bytes of the file: some 20,000 keys."""
PRIORITIES: tuple[Priority, ...] = ("critical", "high", "normal", "low")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{8}:[0-9a-f]{64}")


class InvalidKey(Refused):
    """A request without a key that counts here."""

    def __init__(self, message: str) -> None:
        super().__init__(Problem(status=401, code="invalid_api_key", message=message))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_moment(value: Any) -> Any:
    """A date begins at 0:00 UTC; a time without a zone is in UTC."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time_of_day())
    if not isinstance(value, datetime):
        raise ValueError("must be a date, as in 2027-01-31, without quotes")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _named(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(what)
        return text

    return AfterValidator(check)


Name = Annotated[str, _named(_NAME, "a key is named with up to 64 letters, digits, '-', '_' and '.' only")]
Hash = Annotated[str, _named(_HASH, "must be as fleet-worker keys new prints it")]
Models = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Limit = Annotated[int, Field(ge=1, le=10**15)]


class Key(Group):
    """One key. All limits are None where there is none."""

    name: Name
    """The name of its table: in the ledger, in metrics, in the access log."""
    hashes: tuple[Hash, ...] = Field((), repr=False)
    """Id and SHA-256 of its secret. Two of them, while clients change from one secret to the other."""
    models: Models = ("*",)
    """The models that it may use, as they are named or as globs."""
    aliases: dict[str, Models] = Field({})
    """The models that stand behind a name of the client, first choice first. The name may be a glob."""
    fallbacks: dict[str, Models] = Field({})
    """The models that may answer if that one cannot."""
    highest_priority: Priority = "normal"
    """A request that asks for more gets this one."""
    max_wait: float | None = Field(None, gt=0)
    """Seconds that a request may wait for a node."""
    rpm: Limit | None = None
    """Requests in a minute."""
    tpm: Limit | None = None
    """Tokens in a minute, of prompts and answers."""
    max_parallel: Limit | None = None
    """Requests at the same time."""
    budget_per_day: Limit | None = None
    """Tokens in a day of UTC."""
    budget_per_month: Limit | None = None
    """Tokens in a month of UTC."""
    expires: Annotated[datetime, BeforeValidator(_as_moment)] | None = None
    """When it ends: a date, at 0:00 UTC, or a date and a time."""
    may_set_timeout: bool = True
    """Whether a request may set its time limits."""
    may_choose_node: bool = False
    """Whether a request may name the node that runs it."""

    def allows(self, model: str) -> bool:
        return any(model == each or fnmatchcase(model, each) for each in self.models)

    def model_of(self, asked: str) -> list[str]:
        """Return the models of the fleet that may answer a request for `asked`, first choice first: what an alias
        stands for, or the model itself, and then their fallbacks. It is empty if the key may not use it. What aliases
        and fallbacks name need not be among `models`.
        """
        first = self._alias(asked) or ((asked,) if self.allows(asked) else ())
        later = (model for each in first for model in self.fallbacks.get(each, ()))
        return list(dict.fromkeys([*first, *later]))

    def _alias(self, asked: str) -> tuple[str, ...] | None:
        globs = (models for name, models in self.aliases.items() if fnmatchcase(asked, name))
        return self.aliases.get(asked) or next(globs, None)

    def visible(self, models: Iterable[str]) -> list[str]:
        """Return what a client with this key is shown of these models of the fleet: those that it may use, and the
        aliases, but no globs, of which it has one.
        """
        there = list(dict.fromkeys(models))
        aliases = (name for name, named in self.aliases.items() if not _is_glob(name) and set(named) & set(there))
        return list(dict.fromkeys([*filter(self.allows, there), *aliases]))

    def priority(self, asked: Priority | None = None) -> Priority:
        """Return the priority of a request that asks for this one, or for none."""
        return max(asked or "normal", self.highest_priority, key=PRIORITIES.index)

    @property
    def has_expired(self) -> bool:
        return self.expires is not None and self.expires.timestamp() <= time.time()


def _is_glob(name: str) -> bool:
    return bool(re.search(r"[*?\[]", name))


ANYONE = Key(name="anyone", highest_priority="critical", may_choose_node=True)
"""The key of every request to a gateway without keys, which serves only its own machine."""


class _File(Group):
    """The file of keys."""

    keys: dict[str, Key] = Field(min_length=1)

    @field_validator("keys", mode="before")
    @classmethod
    def _with_names(cls, keys: Any) -> Any:
        if not isinstance(keys, dict):
            return keys
        return {name: {**key, "name": name} if isinstance(key, dict) else key for name, key in keys.items()}

    @field_validator("keys")
    @classmethod
    def _with_hashes(cls, keys: dict[str, Key]) -> dict[str, Key]:
        for name, key in keys.items():
            if not key.hashes:
                raise ValueError(f"{name} has no hashes: fleet-worker keys new {name} prints one")
        return keys


class Keys:
    """The keys of a gateway. Thread-safe."""

    def __init__(self, path: Path | None, by_id: dict[str, tuple[bytes, Key]]) -> None:
        self._path = path
        self._by_id = by_id

    @classmethod
    def load(cls, path: Path | None) -> Keys:
        """Read the file of keys. Without a path, every request has the key `ANYONE`.

        Raises:
            ConfigurationError: the file cannot be read, or is wrong.
        """
        return cls(path, _read(path) if path else {})

    @property
    def are_needed(self) -> bool:
        """Whether a request needs a key."""
        return self._path is not None

    def find(self, secret: str | None) -> Key:
        """Return the key that a client has sent. The time it takes tells nothing about another one.

        Raises:
            InvalidKey: there is no such key, or it has expired.
        """
        if self._path is None:
            return ANYONE
        if not secret:
            raise InvalidKey("no key was sent: send it as Authorization: Bearer KEY, or as x-api-key: KEY")
        digest, key = self._by_id.get(_id_of(secret), _NOBODY)
        if not hmac.compare_digest(_digest(secret), digest) or key is ANYONE:
            raise InvalidKey("this gateway does not know the key")
        if key.has_expired:
            raise InvalidKey("the key has expired: ask the operator of this gateway for a new one")
        return key

    def reload(self) -> bool:
        """Read the file again. If it is wrong, log why, keep the keys as they are, and return False."""
        if self._path is None:
            return True
        try:
            self._by_id = _read(self._path)
        except ConfigurationError as error:
            log.error("the keys stay as they were: %s", error.message)
            return False
        log.info("%d keys were read from %s", len(self._by_id), self._path)
        return True


_NOBODY = (bytes(32), ANYONE)
"""What a secret with an unknown id is compared with."""


def _id_of(secret: str) -> str:
    return secret.removeprefix(PREFIX).partition("-")[0]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).digest()


def _read(path: Path) -> dict[str, tuple[bytes, Key]]:
    """Return hash and key by id."""
    try:
        keys = _File.model_validate(config_file.read_toml(path, MOST_BYTES, named="gateway.keys")).keys
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {config_file.faults(error, _File)}") from None
    by_id: dict[str, tuple[bytes, Key]] = {}
    for key in keys.values():
        for each in key.hashes:
            id_, _, digest = each.partition(":")
            if id_ in by_id:
                raise ConfigurationError(f"{path}: keys {by_id[id_][1].name} and {key.name} have the same id {id_}")
            by_id[id_] = bytes.fromhex(digest), key
    _check_rights(path)
    return by_id


def _check_rights(path: Path) -> None:
    mode = path.stat().st_mode
    if mode & 0o022:
        log.warning("other users of this machine may change the keys in %s: chmod 600 it", path)
    elif mode & 0o004:
        log.warning("all users of this machine may read %s: chmod 600 it", path)


@dataclass(frozen=True)
class NewKey:
    """A key that was made just now."""

    table: str = field(repr=False)
    """Its table, for the file of keys."""
    secret: str = field(repr=False)


def new_key(name: str) -> NewKey:
    """Make a key. Its secret is nowhere else.

    Raises:
        ConfigurationError: it cannot have this name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError("a key is named with up to 64 letters, digits, '-', '_' and '.' only")
    id_ = secrets.token_hex(4)
    secret = f"{PREFIX}{id_}-{secrets.token_hex(32)}"
    table = f'"{name}"' if "." in name else name
    text = f'[keys.{table}]\nhashes = ["{id_}:{_digest(secret).hex()}"]\nmodels = ["*"]\n'
    return NewKey(text, secret)
