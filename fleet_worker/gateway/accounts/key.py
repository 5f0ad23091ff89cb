"""A key of the gateway: what its requests may ask for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from fnmatch import fnmatchcase
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from fleet_worker.instance_settings import Group
from fleet_worker.protocol.request import Priority

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAMED_WITH = "a key is named with up to 64 letters, digits, '-', '_' and '.' only"
_HASH = re.compile(r"[0-9a-f]{8}:[0-9a-f]{64}")


def _as_list(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        raise ValueError("must be the name of a model, or a list of names")
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


Name = Annotated[str, _named(NAME, NAMED_WITH)]
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
    max_wait: float | None = Field(None, ge=0)
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
    cache_scope: bool = False
    """Whether prompts of other keys are no reason to expect its own to be cached, and its own none for theirs."""
    keep_warm: bool = True
    """Whether routers may keep its last prompts in memory, to have a server read them again that lost its cache."""
    may_set_timeout: bool = True
    """Whether a request may set its time limits."""
    may_choose_node: bool = False
    """Whether a request may name the node that runs it."""
    may_read_metrics: bool = False
    """Whether it may read `/metrics`, which name all keys."""

    def allows(self, model: str) -> bool:
        return any(model == each or fnmatchcase(model, each) for each in self.models)

    def models_for(self, asked: str) -> list[str]:
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
        """Return the names that a client with this key is shown: those of these models that it may use, and each alias
        for at least one of them. Aliases that are globs are not shown.
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


ANYONE = Key(name="anyone", highest_priority="critical", may_choose_node=True, may_read_metrics=True)
"""The key of every request to a gateway without keys, which serves only its own machine."""
