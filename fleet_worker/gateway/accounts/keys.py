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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from fleet_worker import config_file
from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.key import ANYONE, NAME, NAMED_WITH, Key
from fleet_worker.gateway.problems import Problem, Refused
from fleet_worker.instance_settings import Group

log = logging.getLogger(__name__)

PREFIX = "sk-fleet-"
MOST_BYTES = 10_000_000
"""Bytes of the file: some 20,000 keys."""
_SECRET = re.compile(r"\bsk-[\w-]{16,}")
_NOBODY = (bytes(32), ANYONE)
"""What a secret with an unknown id is compared with."""


class InvalidKey(Refused):
    """A request without a valid key."""

    def __init__(self, message: str) -> None:
        super().__init__(Problem(status=401, code="invalid_api_key", message=message))


class _File(Group):
    """The file of keys."""

    keys: dict[str, Key] = Field({}, validate_default=True)

    @field_validator("keys", mode="before")
    @classmethod
    def _with_names(cls, keys: Any) -> Any:
        if not isinstance(keys, dict):
            return keys
        return {name: {**key, "name": name} if isinstance(key, dict) else key for name, key in keys.items()}

    @field_validator("keys")
    @classmethod
    def _with_hashes(cls, keys: dict[str, Key]) -> dict[str, Key]:
        if not keys:
            raise ValueError("there is no table [keys.NAME]: fleet-worker keys new NAME prints one")
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


def _id_of(secret: str) -> str:
    return secret.removeprefix(PREFIX).partition("-")[0]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).digest()


def _read(path: Path) -> dict[str, tuple[bytes, Key]]:
    """Return hash and key by id. No error shows a secret, which may stand where a name or a hash belongs."""
    try:
        return _checked(path)
    except ConfigurationError as error:
        raise ConfigurationError(_SECRET.sub("sk-...", error.message)) from None


def _checked(path: Path) -> dict[str, tuple[bytes, Key]]:
    try:
        keys = _File.model_validate(config_file.read_toml(path, MOST_BYTES, of="gateway.keys")).keys
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {config_file.explain(error, _File)}") from None
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
    if not NAME.fullmatch(name):
        raise ConfigurationError(NAMED_WITH)
    id_ = secrets.token_hex(4)
    secret = f"{PREFIX}{id_}-{secrets.token_hex(32)}"
    table = f'"{name}"' if "." in name else name
    text = f'[keys.{table}]\nhashes = ["{id_}:{_digest(secret).hex()}"]\nmodels = ["*"]\n'
    return NewKey(text, secret)
