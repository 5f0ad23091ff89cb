"""A long prompt waits until a new router knows what is cached."""

import time
from types import SimpleNamespace

import pytest

from fleet_worker import Settings
from fleet_worker.registry.view import Registry
from fleet_worker.router import prompt_caches as module
from fleet_worker.router.prompt_caches import LONG_PROMPT, PromptCaches
from fleet_worker.router.submission import Submission

SETTINGS = Settings(broker_url="redis://127.0.0.1:1/0", host="mini")
LATER = 1e9


@pytest.fixture
def caches(monkeypatch):
    """Those of a router that was just connected; `waited` are the seconds that it was ready to wait."""
    waited = []
    digests = SimpleNamespace(start=lambda: None, first=SimpleNamespace(wait=waited.append))
    monkeypatch.setattr(module, "DigestConsumer", lambda *_: digests)
    scheduler = SimpleNamespace(at=lambda *_: None)
    caches = PromptCaches(SETTINGS, Registry(), None, lambda *_: set(), "reply", None, None, scheduler)
    caches.start()
    return caches, waited


def asked(size=LONG_PROMPT, **options):
    return Submission.of(SETTINGS, "chat", "m", {"messages": [{"role": "user", "content": "x" * size}]}, None, options)


def test_a_long_prompt_waits_while_the_router_is_new(caches):
    caches, waited = caches
    caches.wait_until_known(asked(), LATER)
    assert waited[0] == pytest.approx(module.KNOWN_WITHIN, abs=0.2)
    caches._known_at = time.monotonic()
    caches.wait_until_known(asked(), LATER)
    assert len(waited) == 1


def test_it_never_waits_beyond_its_deadline(caches):
    caches, waited = caches
    caches.wait_until_known(asked(), time.monotonic() + 0.3)
    assert waited[0] <= 0.3


@pytest.mark.parametrize(
    "request_",
    [asked(LONG_PROMPT - 1), asked(node="local@mini-7"), asked(instance="local")],
    ids=["short", "node", "instance"],
)
def test_what_a_cache_does_not_decide_waits_for_nothing(caches, request_):
    caches, waited = caches
    caches.wait_until_known(request_, LATER)
    assert waited == []
