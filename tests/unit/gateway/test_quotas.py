"""The quotas of keys: on one gateway alone, and of several together on a real Valkey."""

import asyncio
import calendar
import logging
import re
import signal
import time
from contextlib import asynccontextmanager

import pytest
import redis

from fleet_worker import Settings
from fleet_worker.broker.topology import quota_keys
from fleet_worker.gateway.accounts import count_scripts, shared_counts
from fleet_worker.gateway.accounts import quotas as module
from fleet_worker.gateway.accounts.counts import number_of
from fleet_worker.gateway.accounts.key import ANYONE, Key
from fleet_worker.gateway.accounts.quota_texts import QuotaExceeded
from fleet_worker.gateway.accounts.quotas import Quotas
from tests.brokers import Valkey
from tests.clock import Clock

NOON = calendar.timegm((2026, 12, 31, 12, 0, 0))


@pytest.fixture
def clock():
    return Clock(NOON)


@pytest.fixture
def quotas(clock):
    return Quotas(clock=clock)


def key(name="alice", **limits):
    return Key(name=name, **limits)


def reserve(quotas, key, tokens=0):
    return asyncio.run(quotas.reserve(key, tokens))


def refused(quotas, key, tokens=0):
    with pytest.raises(QuotaExceeded) as raised:
        reserve(quotas, key, tokens)
    return raised.value


def headers(reservation):
    return {name.decode(): value.decode() for name, value in reservation.headers}


# --- Rates


def test_a_key_without_limits_has_none(quotas):
    reservation = reserve(quotas, ANYONE, 10**9)
    assert reservation.headers == ()
    reservation.settle(10**9)
    reservation.release()


def test_as_many_requests_are_admitted_in_a_minute_as_the_key_may_send(quotas, clock):
    alice = key(rpm=3)
    for _ in range(3):
        reserve(quotas, alice).release()
        clock.now += 1
    problem = refused(quotas, alice).problem
    assert (problem.status, problem.code, problem.may_retry) == (429, "rate_limit_exceeded", True)
    assert problem.message.startswith("this key may use 3 requests per minute: try again in ")


def test_the_time_that_a_client_is_told_is_the_one_at_which_it_is_admitted(quotas, clock):
    alice = key(rpm=3)
    for _ in range(3):
        reserve(quotas, alice)
    retry_after = refused(quotas, alice).problem.retry_after
    clock.now += retry_after - 0.1
    refused(quotas, alice)
    clock.now += 0.11
    reserve(quotas, alice)
    assert 60 <= retry_after <= 120


def test_no_minute_has_many_more_requests_than_the_key_may_send(quotas, clock):
    """Neither does one that begins in the middle of a window."""
    clock.now += 59
    for _ in range(60):
        reserve(quotas, key(rpm=60))
    clock.now += 2
    reserve(quotas, key(rpm=60))
    refused(quotas, key(rpm=60))


def test_after_two_minutes_all_is_forgotten(quotas, clock):
    reserve(quotas, key(rpm=1))
    clock.now += 120
    reserve(quotas, key(rpm=1))


def test_one_key_does_not_use_the_limit_of_another(quotas):
    reserve(quotas, key("alice", rpm=1))
    reserve(quotas, key("bob", rpm=1))


def test_tokens_are_reserved_and_what_was_not_used_is_given_back(quotas):
    alice = key(tpm=1000)
    first = reserve(quotas, alice, 900)
    assert refused(quotas, alice, 200).limit == "tpm"
    first.settle(50)
    reserve(quotas, alice, 900)


def test_what_was_used_beyond_the_reservation_counts(quotas):
    reserve(quotas, key(tpm=1000), 10).settle(990)
    refused(quotas, key(tpm=1000), 20)


def test_only_the_first_end_of_a_request_counts(quotas):
    alice = key(tpm=1000)
    reservation = reserve(quotas, alice, 500)
    reservation.settle(900)
    reservation.release()
    reservation.settle(0)
    refused(quotas, alice, 200)


def test_a_request_that_may_need_more_than_a_minute_s_tokens_gets_a_minute_of_its_own(quotas):
    alice = key(tpm=1000)
    reservation = reserve(quotas, alice, 32_000)
    refused(quotas, alice, 1)
    reservation.settle(100)
    reserve(quotas, alice, 900)


def test_what_is_given_back_late_is_given_back_to_its_own_minute(quotas, clock):
    alice = key(tpm=1000)
    late = reserve(quotas, alice, 1000)
    clock.now += 180
    reserve(quotas, alice, 1000)
    late.settle(0)
    refused(quotas, alice, 100)


def test_a_refused_request_takes_nothing(quotas):
    alice = key(rpm=10, tpm=100)
    for _ in range(50):
        reserve_or_not(quotas, alice, 60)
    assert headers(reserve(quotas, alice, 40))["x-ratelimit-remaining-requests"] == "8"


def reserve_or_not(quotas, key, tokens):
    try:
        return reserve(quotas, key, tokens)
    except QuotaExceeded:
        return None


def test_headers_tell_what_is_left(quotas, clock):
    clock.now += 15
    told = headers(reserve(quotas, key(rpm=60, tpm=1000), 400))
    assert told == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "105.000s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "105.000s",
    }


def test_a_refused_client_is_told_what_is_left_and_when_to_come_back(quotas):
    reserve(quotas, key(rpm=1))
    told = dict(refused(quotas, key(rpm=1)).problem.headers)
    assert told[b"x-ratelimit-remaining-requests"] == b"0"
    assert told[b"x-should-retry"] == b"true"
    assert 1 <= int(told[b"retry-after"]) <= 120


def test_a_clock_that_was_set_back_blocks_no_key(quotas, clock):
    clock.now += 10**8
    reserve(quotas, key(rpm=1))
    clock.now = NOON
    refused(quotas, key(rpm=1))
    clock.now += 120
    reserve(quotas, key(rpm=1))


# --- Parallel requests


def test_so_many_requests_run_at_a_time(quotas):
    alice = key(max_parallel=2)
    first, _ = reserve(quotas, alice), reserve(quotas, alice)
    problem = refused(quotas, alice).problem
    assert problem.message == "this key may run 2 requests at the same time: try again in 1 s"
    first.release()
    reserve(quotas, alice)
    refused(quotas, alice)


# --- Budgets


def test_a_budget_that_is_used_up_is_no_reason_to_try_again(quotas, clock):
    alice = key(budget_per_day=1000)
    reserve(quotas, alice, 10).settle(1000)
    error = refused(quotas, alice)
    problem = error.problem
    assert (error.limit, problem.status, problem.code, problem.may_retry) == ("day", 429, "insufficient_quota", False)
    assert problem.message == ("this key may use 1,000 tokens per day, which are used up; a new day begins in 12 h")
    clock.now += 12 * 3600
    reserve(quotas, alice)


def test_what_running_requests_have_reserved_may_be_free_again_soon(quotas):
    alice = key(budget_per_month=1000)
    running = reserve(quotas, alice, 32_000)
    problem = refused(quotas, alice).problem
    assert (problem.code, problem.may_retry) == ("rate_limit_exceeded", True)
    running.settle(10)
    reserve(quotas, alice, 10)


def test_many_requests_at_once_cannot_exceed_a_budget_by_more_than_one_of_them(quotas):
    alice = key(budget_per_day=1000)
    admitted = [each for each in (reserve_or_not(quotas, alice, 300) for _ in range(50)) if each]
    assert len(admitted) == 4


def test_a_month_is_one_of_the_calendar(quotas, clock):
    alice = key(budget_per_month=100)
    clock.now = calendar.timegm((2028, 2, 29, 23, 59, 59))
    reserve(quotas, alice).settle(100)
    assert "a new month begins in 1 s" in refused(quotas, alice).problem.message
    clock.now += 1
    reserve(quotas, alice).settle(100)
    assert "in 31 days" in refused(quotas, alice).problem.message


def test_budgets_begin_with_what_was_used_before_a_restart(clock):
    asked = []

    def spent(name, since):
        asked.append((name, since))
        return 990

    quotas = Quotas(clock=clock, spent=spent)
    alice = key(budget_per_day=1000, budget_per_month=1000)
    reserve(quotas, alice).settle(10)
    refused(quotas, alice)
    begun = [calendar.timegm((2026, 12, day, 0, 0, 0)) for day in (31, 1)]
    assert asked == [("alice", each) for each in begun]


# --- Several gateways, with a real Valkey


@pytest.fixture(scope="module")
def valkey():
    with Valkey() as valkey:
        yield valkey


@pytest.fixture
def name(request):
    """A key's name that no other test uses."""
    return "".join(each if each.isalnum() else "-" for each in request.node.name)[-60:].strip("-")


@pytest.fixture
def patient(monkeypatch):
    """The gateways wait for the broker on a machine that is busy with other work, too, and decide nothing alone."""
    for limit in ("ANSWER_WITHIN", "LOST_AFTER", "OPEN_WITHIN"):
        monkeypatch.setattr(shared_counts, limit, 5.0)


async def counted(*quotas):
    """Wait until the broker has counted what these gateways have told it: `settle` and `release` do not wait, and what
    one gateway tells may overtake what another does. The words of one are counted in their order."""
    for each in quotas:
        assert (await each.reserve(key("another", rpm=10**6), 0)).is_shared


async def notice_the_loss(quotas):
    """A request is the first that needs the broker."""
    for each in quotas:
        await each.reserve(key("another", rpm=10**6), 0)
        await until(lambda each=each: not each.are_shared)


@asynccontextmanager
async def gateways(url, *names, **options):
    """Quotas of these gateways, which are connected."""
    quotas = [Quotas(Settings(broker_url=url), gateway=name, **options) for name in names]
    for each in quotas:
        each.open()
    try:
        await until(lambda: all(each.are_shared for each in quotas))
        yield quotas
    finally:
        for each in quotas:
            await each.close()


async def until(condition, within=10):
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


async def admitted(quotas, key, tokens, times):
    """Reserve so many times at once on each gateway in turn; return the reservations."""
    answers = await asyncio.gather(
        *(quotas[at % len(quotas)].reserve(key, tokens) for at in range(times)), return_exceptions=True
    )
    assert all(isinstance(each, QuotaExceeded) for each in answers if isinstance(each, BaseException))
    return [each for each in answers if not isinstance(each, BaseException)]


@pytest.mark.parametrize(
    ("limits", "tokens", "most"),
    [
        ({"rpm": 30}, 0, 30),
        ({"tpm": 1000}, 100, 10),
        ({"max_parallel": 7}, 0, 7),
        ({"budget_per_day": 1000}, 100, 10),
        ({"budget_per_month": 1000}, 300, 4),
        ({"rpm": 50, "tpm": 100_000, "max_parallel": 9, "budget_per_day": 10**9}, 100, 9),
    ],
)
def test_a_limit_holds_for_two_gateways_together(patient, valkey, name, limits, tokens, most):
    async def run():
        async with gateways(valkey.url, "one", "other") as quotas:
            got = await admitted(quotas, key(name, **limits), tokens, 100)
            assert len(got) == most
            assert await admitted(quotas, key(name, **limits), tokens, 10) == []

    asyncio.run(run())


def test_what_one_gateway_gives_back_the_other_can_take(patient, valkey, name):
    async def run():
        alice = key(name, tpm=1000, max_parallel=1, budget_per_day=5000)
        async with gateways(valkey.url, "one", "other") as (one, other):
            for _ in range(3):
                await until_admitted(one, alice, 900)
                await until_admitted(other, alice, 900)

    asyncio.run(run())


async def until_admitted(quotas, key, tokens):
    async with asyncio.timeout(5):
        while True:
            try:
                return (await quotas.reserve(key, tokens)).settle(10)
            except QuotaExceeded:
                await asyncio.sleep(0.01)


def test_a_minute_of_the_broker_counts_and_not_one_of_the_gateway(patient, valkey, name):
    """The clock of one gateway is wrong by a month."""

    async def run():
        alice = key(name, rpm=1, budget_per_month=100)
        wrong_clock = gateways(valkey.url, "wrong", clock=lambda: time.time() + 40 * 86_400)
        async with wrong_clock as (wrong,), gateways(valkey.url, "right") as (right,):
            (await wrong.reserve(alice, 10)).settle(100)
            await refused_on(right, alice, "rpm")
            await refused_on(right, key(name, budget_per_month=100), "month")

    asyncio.run(run())


async def refused_on(quotas, key, limit, tokens=0):
    async with asyncio.timeout(5):
        while True:
            try:
                (await quotas.reserve(key, tokens)).release()
            except QuotaExceeded as error:
                if error.limit == limit:
                    return error
            await asyncio.sleep(0.01)


def test_a_gateway_that_dies_holds_no_place_for_ever(patient, valkey, name, monkeypatch):
    """Neither while another request of the key goes on."""
    monkeypatch.setattr(shared_counts, "LEASE", 0.5)
    monkeypatch.setattr(module, "LEASE", 0.5)

    async def run():
        alice = key(name, max_parallel=2)
        async with gateways(valkey.url, "right") as (right,):
            await right.reserve(alice, 10)
            async with gateways(valkey.url, "dead") as (dead,):
                await dead.reserve(alice, 10)
                await refused_on(right, alice, "parallel")
            await until_admitted(right, alice, 10)

    asyncio.run(run())


def test_a_refused_request_takes_no_place_while_leases_are_renewed(patient, valkey, name, monkeypatch):
    monkeypatch.setattr(module, "LEASE", 0.001)

    async def run():
        alice = key(name, max_parallel=1)
        async with gateways(valkey.url, "one") as (one,):
            running = await one.reserve(alice, 0)
            for _ in range(10):
                assert await admitted([one], alice, 0, 20) == []
            running.release()
            await counted(one)
            await one.reserve(alice, 0)

    asyncio.run(run())


@pytest.mark.rest
def test_a_request_that_runs_long_keeps_its_place(patient, valkey, name, monkeypatch):
    monkeypatch.setattr(shared_counts, "LEASE", 1)
    monkeypatch.setattr(module, "LEASE", 0.6)

    async def run():
        alice = key(name, max_parallel=1)
        async with gateways(valkey.url, "one", "other") as (one, other):
            running = await one.reserve(alice, 10)
            for _ in range(15):
                with pytest.raises(QuotaExceeded):
                    await other.reserve(alice, 10)
                await asyncio.sleep(0.1)
            running.release()
            await until_admitted(other, alice, 10)

    asyncio.run(run())


def test_what_was_used_of_a_budget_survives_a_broker_that_has_forgotten_it(patient, name):
    async def run(valkey):
        alice = key(name, budget_per_day=1000, max_parallel=2)
        async with gateways(valkey.url, "one", "other") as quotas:
            for each in quotas:
                (await each.reserve(alice, 100)).settle(400)
            running = await quotas[0].reserve(alice, 150)
            valkey.kill()
            await notice_the_loss(quotas)
            valkey.start()
            await until(lambda: all(each.are_shared for each in quotas))
            await counted(*quotas)
            assert len(await admitted(quotas, alice, 100, 10)) == 1
            running.settle(150)
            await refused_on(quotas[1], alice, "day", 100)

    with Valkey() as valkey:
        asyncio.run(run(valkey))


def test_what_runs_keeps_its_place_at_a_broker_that_has_forgotten_it(patient, name):
    async def run(valkey):
        alice = key(name, max_parallel=1)
        async with gateways(valkey.url, "one", "other") as (one, other):
            running = await one.reserve(alice, 0)
            valkey.kill()
            await notice_the_loss([one, other])
            valkey.start()
            await until(lambda: one.are_shared and other.are_shared)
            await refused_on(other, alice, "parallel")
            running.release()
            await until_admitted(other, alice, 0)

    with Valkey() as valkey:
        asyncio.run(run(valkey))


def test_while_the_broker_is_away_each_gateway_counts_alone_and_says_so_once_each_time(patient, name, caplog):
    caplog.set_level(logging.INFO, "fleet_worker.gateway")

    async def run(valkey):
        alice = key(name, rpm=10)
        async with gateways(valkey.url, "one", "other") as quotas:
            assert len(await admitted(quotas, alice, 0, 6)) == 6
            valkey.kill()
            await notice_the_loss(quotas)
            assert len(await admitted(quotas, alice, 0, 30)) == 20 - 6
            valkey.start()
            await until(lambda: all(each.are_shared for each in quotas))
            assert len(await admitted(quotas, alice, 0, 30)) == 10
            valkey.kill()
            await notice_the_loss(quotas)
            valkey.start()
            await until(lambda: all(each.are_shared for each in quotas))

    with Valkey() as valkey:
        asyncio.run(run(valkey))
    said = [record.getMessage() for record in caplog.records]
    assert len([each for each in said if "for this gateway alone: the broker is away" in each]) == 4
    assert len([each for each in said if "for all gateways together again" in each]) == 4


@pytest.mark.rest
def test_what_a_broker_counts_too_late_is_given_back(name, monkeypatch):
    monkeypatch.setattr(shared_counts, "LOST_AFTER", 5.0)

    async def run(valkey):
        async with gateways(valkey.url, "one") as (one,):
            valkey.signal(signal.SIGSTOP)
            try:
                got = await admitted([one], key(name, max_parallel=2, rpm=10), 0, 8)
                assert len(got) == 2
            finally:
                valkey.signal(signal.SIGCONT)
            with redis.Redis.from_url(valkey.url) as client:
                counts, running = quota_keys(name)
                await until(lambda: (client.hget(counts, "rpm:count"), client.zcard(running)) == (b"2", 2), within=3)
                got[0].release()
                await until(lambda: client.zcard(running) == 1, within=3)

    with Valkey() as valkey:
        asyncio.run(run(valkey))


def test_a_broker_that_freezes_delays_a_request_by_a_fifth_of_a_second_at_most(name):
    async def run(valkey):
        alice = key(name, rpm=100)
        async with gateways(valkey.url, "one") as (one,):
            valkey.signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                await asyncio.gather(*(one.reserve(alice, 0) for _ in range(10)))
                assert time.monotonic() - began < 1.5  # on a busy machine
                await until(lambda: not one.are_shared)
                began = time.monotonic()
                await one.reserve(alice, 0)
                assert time.monotonic() - began < 0.15
            finally:
                valkey.signal(signal.SIGCONT)
            await until(lambda: one.are_shared)

    with Valkey() as valkey:
        asyncio.run(run(valkey))


@pytest.mark.parametrize("fault", ["-evalsha", "-script|load", "-zadd"])
def test_a_broker_that_refuses_is_as_good_as_none(valkey, name, caplog, fault):
    with redis.Redis.from_url(valkey.url) as client:
        client.execute_command("ACL", "SETUSER", name, "on", "nopass", "~*", "&*", "+@all", fault)

    async def run():
        url = valkey.url.replace("//", f"//{name}:x@")
        quotas = Quotas(Settings(broker_url=url), gateway="one")
        quotas.open()
        await until(lambda: caplog.records)
        assert len(await admitted([quotas], key(name, rpm=3), 0, 10)) == 3
        await quotas.close()

    asyncio.run(run())
    (record,) = caplog.records
    assert "rights" in record.getMessage()


def test_what_a_client_that_leaves_has_asked_for_is_given_back(patient, valkey, name):
    async def run():
        alice = key(name, max_parallel=1, tpm=1000)
        async with gateways(valkey.url, "one", "other") as (one, other):
            task = asyncio.create_task(one.reserve(alice, 1000))
            await asyncio.sleep(0)
            task.cancel()
            await until_admitted(other, alice, 1000)
            await until_admitted(one, alice, 900)

    asyncio.run(run())


@pytest.mark.parametrize("tokens", [10**19, 10**400], ids=["more than Lua can write", "more than it can count"])
def test_a_request_for_any_number_of_tokens_does_not_change_what_was_used_elsewhere(patient, valkey, name, tokens):
    async def run():
        alice = key(name, budget_per_day=1000)
        async with gateways(valkey.url, "one", "other") as (one, other):
            (await other.reserve(alice, 0)).settle(600)
            await counted(other)
            (await one.reserve(alice, tokens)).release()
            await counted(one)
            (await other.reserve(alice, 0)).settle(400)
            await counted(other)
            with pytest.raises(QuotaExceeded):
                await one.reserve(alice, 0)

    asyncio.run(run())


def test_the_month_of_the_broker_is_that_of_the_calendar(valkey, name):
    """As the script computes it, for each day of 60 years."""
    days = range(20_000, 42_000)
    script = (
        f"{_month_of()} local found = {{}} for at, day in ipairs(ARGV) do found[at] = month_of(day) end return found"
    )
    with redis.Redis.from_url(valkey.url) as client:
        found = client.eval(script, 0, *days[:7000]) + client.eval(script, 0, *days[7000:14_000])
    assert found == [number_of("month", day * 86_400) for day in days[:14_000]]


def _month_of():
    return re.search(r"local function month_of.*?\nend", count_scripts.TAKE, re.DOTALL)[0]


@pytest.mark.rest
def test_with_tls_only_the_right_broker_is_believed(patient):
    async def run(secured):
        for files, is_there in ((secured.files, True), (without_ca(secured.files), False)):
            quotas = Quotas(Settings(broker_url=secured.url, **files), gateway="one")
            quotas.open()
            if is_there:
                await until(lambda quotas=quotas: quotas.are_shared)
            await asyncio.sleep(0.3)
            assert quotas.are_shared == is_there
            await quotas.close()

    with Valkey() as valkey, valkey.secured() as secured:
        asyncio.run(run(secured))


def without_ca(files):
    return {name: value for name, value in files.items() if name != "broker_ca"}
