"""An invitation: one word, which `fleet-worker invite` prints and `fleet-worker join` reads.

It holds the address of the broker, its CA if it has one of its own, and a secret of single use, for which the broker
gives the `Membership`. Where a broker cannot do that, it holds the membership itself. It consists of letters and digits
only, so that no chat program changes it.
"""

from __future__ import annotations

import base64
import re
import zlib
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fleet_worker import urls
from fleet_worker.errors import ConfigurationError

VERSION = "fleet1"
"""The beginning of an invitation; the number is that of its format."""
MOST_CHARACTERS = 30_000
ANOTHER = "another one: fleet-worker invite, on the first Mac of the fleet"

Role = Literal["mini", "router"]
BrokerUrl = Annotated[str, AfterValidator(urls.broker_url)]


class _Part(BaseModel):
    """No error text shows a value."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Membership(_Part):
    """What a host needs to belong to a fleet: the settings that must be the same everywhere."""

    role: Role = "mini"
    broker_url: BrokerUrl = Field(repr=False)
    """With the account."""
    broker_ca: str | None = Field(None, max_length=20_000, repr=False)
    """Text of the PEM file."""
    max_body_bytes: int = Field(ge=1024)
    affinity: bool = True
    affinity_secret: str | None = Field(None, max_length=1000, repr=False)
    """For a router only."""


class Invitation(_Part):
    """Exactly one of `membership` and `secret` is there."""

    broker_url: BrokerUrl = Field(repr=False)
    """Without an account."""
    other_address: str | None = Field(None, max_length=255, pattern=r"^[0-9A-Za-z_.:%-]+$")
    """Another address of the same broker, for hosts that do not find the name in broker_url."""
    broker_ca: str | None = Field(None, max_length=20_000, repr=False)
    id: str = Field("", max_length=32, pattern=r"^[0-9a-f]*$")
    """Names the account of single use, and the key that it may read."""
    secret: str = Field("", max_length=100, repr=False)
    membership: Membership | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _complete(self) -> Invitation:
        if bool(self.id and self.secret) == bool(self.membership):
            raise ValueError("it holds a secret or a membership")
        return self

    def encode(self) -> str:
        """Return it as one word."""
        text = self.model_dump_json(exclude_defaults=True).encode()
        return VERSION + base64.b32encode(zlib.compress(text, 9)).decode().rstrip("=")


def decode(line: str) -> Invitation:
    """Read an invitation: the word, or the whole line, also if it was broken into several.

    Raises:
        ConfigurationError: it is none, is damaged, or is of another version.
    """
    line = re.sub(r"^\s*\S*fleet-worker\s+join\b", "", line.strip()[:MOST_CHARACTERS])
    line = re.sub(r"\s[-–—]+\w+", "", line)  # its options, with what chat programs make of hyphens
    word = re.sub(r"\s", "", line).strip("'\"`")
    version = re.match(r"(fleet\d{1,4})P", word, re.IGNORECASE)  # P: the first letter of all that is packed
    if not version and not word.lower().startswith(VERSION):
        raise ConfigurationError(f"this is no invitation, which begins with {VERSION}: copy the whole line")
    if version and version[1].lower() != VERSION:
        text = f"the invitation is of another version, {version[1]}: install the same fleet-worker on both hosts"
        raise ConfigurationError(text)
    try:
        return Invitation.model_validate_json(_unpacked(word[len(VERSION) :].upper()))
    except (ValueError, zlib.error):  # also pydantic's
        raise ConfigurationError(f"the invitation is damaged: copy the whole line again, or {ANOTHER}") from None


def _unpacked(code: str) -> bytes:
    """Raises `ValueError` or `zlib.error`."""
    packed = base64.b32decode(code + "=" * (-len(code) % 8))
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(packed, 100_000)  # it has a checksum
    if not unpacking.eof:
        raise ValueError("it is cut off")
    return text
