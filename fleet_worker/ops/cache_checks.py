"""Why prompt caches help less than they could, as far as the nodes have noticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fleet_worker.ops.findings import Finding
from fleet_worker.protocol.status import CacheTrouble, InstanceStatus
from fleet_worker.terminal import count

CHECK = "prompt cache"


def prompt_caches(instances: Iterable[InstanceStatus]) -> Iterator[Finding]:
    """Return a finding for each node and kind of trouble. Kinds that only newer nodes know are left out."""
    for instance in instances:
        for kind in dict.fromkeys(trouble.kind for trouble in instance.cache_troubles):
            trouble = next(each for each in instance.cache_troubles if each.kind == kind)
            if kind in _TEXTS:
                found, advice = _TEXTS[kind]
                yield Finding("warning", _said(found, instance, trouble), advice, check=CHECK)


def _said(found: str, instance: InstanceStatus, trouble: CacheTrouble) -> str:
    of = f"{trouble.count} of {count(trouble.of, 'request')}"
    return f"{instance.node}: {found.format(of=of, model=trouble.model)} (last: {trouble.request_id})"


_TEXTS = {
    "changing": (
        "{of} for {model} began differently from the turn before in the same conversation: no cache helps them",
        "keep what changes, as a time stamp, out of the system prompt and the tools: put it into the last message",
    ),
    "unused": (
        "nothing was cached for {of} for {model} that repeated at least 1,000 tokens of earlier ones",
        "start its server with a prompt cache (mlx_lm.server: --prompt-cache-size 10), or set prompt_cache_size = 0 "
        "for this instance; some models can reuse whole conversations only, not just a system prompt",
    ),
    "small": (
        "{of} for {model} came after their beginning had to leave the cache",
        "if the host has the memory, start its server with a larger prompt cache (mlx_lm.server: --prompt-cache-size), "
        "and set prompt_cache_size of this instance to the same",
    ),
}
"""By kind of `CacheTrouble`: what was found, and what to do."""
