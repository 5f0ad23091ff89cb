"""Why nothing that is offered can take a request now, for whoever waits: in words, and in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fleet_worker.protocol.status import STATUSES
from fleet_worker.registry.offered import Offered

MOST_REASONS = 3
LONGEST_REASON = 60
"""Characters of a reason that are told. It comes from another host."""
WITHOUT_MODEL = "without the model"


def is_absent(offered: Sequence[Offered]) -> bool:
    """Return whether something is offered, and nothing of it is ready."""
    return bool(offered) and not any(each.ready for each in offered)


def are_away(offered: Sequence[Offered]) -> bool:
    """Return whether the owners of all these machines need them."""
    return bool(offered) and all(each.instance.status == "away" for each in offered)


def takes_work_later(offered: Offered) -> bool:
    """Return whether it is not ready, but will be by itself: it starts, which takes minutes for a large model; or it
    works, and some servers do not answer while they read a long prompt."""
    status = offered.instance.status
    return status == "starting" or (status in ("degraded", "unavailable") and offered.instance.running > 0)


def counts(offered: Sequence[Offered]) -> dict[str, int]:
    """Return how many are in each state, the most frequent first."""
    return dict(Counter(map(_state, offered)).most_common())


def described(offered: Sequence[Offered]) -> str:
    """Return in words why nothing of this is ready, as in `of its 3 instances 2 are away (a user is at it) and 1 is
    drained`. Reasons are told of those that are away: they tell when it is worth another try."""
    states = counts(offered)
    if len(states) == 1:
        (state,) = states
        subject = "its only instance is" if len(offered) == 1 else f"all {len(offered)} instances of it are"
        return f"{subject} {state}{_reasons(state, offered)}"
    parts = [f"{n} {'is' if n == 1 else 'are'} {state}{_reasons(state, offered)}" for state, n in states.items()]
    return f"of its {len(offered)} instances {', '.join(parts[:-1])} and {parts[-1]}"


def _state(offered: Offered) -> str:
    """Return what keeps it from being ready. A newer host may send a status that is not known here."""
    status = offered.instance.status
    if status == "available":
        return status if offered.ready else WITHOUT_MODEL
    return status if status in STATUSES else "not ready"


def _reasons(state: str, offered: Sequence[Offered]) -> str:
    if state != "away":
        return ""
    told = {_printable(each.instance.reason) for each in offered if each.instance.status == "away"}
    reasons = sorted(told - {""})
    more = "; ..." if len(reasons) > MOST_REASONS else ""
    return f" ({'; '.join(reasons[:MOST_REASONS])}{more})" if reasons else ""


def _printable(reason: str) -> str:
    return "".join(character for character in reason[:LONGEST_REASON] if character.isprintable())
