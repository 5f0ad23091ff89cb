"""Inviting another host: what the broker keeps, and for whom."""

import re
import time
from contextlib import closing

import pytest
import redis

from fleet_worker.errors import BrokerUnavailable, ConfigurationError
from fleet_worker.host.child_process import free_port
from fleet_worker.host.embedded_broker import folder
from fleet_worker.settings import Settings
from fleet_worker.setup.invite import invite
from fleet_worker.setup.own_names import own_address, own_host
from fleet_worker.setup.single_use import redeem


@pytest.fixture
def client(fleet):
    with closing(redis.Redis.from_url(fleet.broker_url)) as client:
        yield client


def accounts(client):
    return [name for name in client.acl_users() if name.startswith("fleet-invitation")]


def refused(invitation):
    with pytest.raises(ConfigurationError) as caught:
        redeem(invitation)
    return caught.value.message


def test_it_gives_what_the_other_host_needs_once(fleet, password):
    invitation = invite(fleet)
    assert password not in str(invitation.model_dump())
    membership = redeem(invitation)
    assert (membership.broker_url, membership.max_body_bytes) == (fleet.broker_url, 4096)
    for _ in range(2):
        assert refused(invitation).startswith(
            "the invitation was used already; another one: fleet-worker invite, on the"
        )


def test_the_broker_keeps_nothing_that_shows_the_account(fleet, client, password):
    invitation = invite(fleet)
    assert password.encode() not in client.get(f"fleet-invitation:{invitation.id}")
    client.execute_command("CONFIG", "SET", "appendfsync", "always")
    redeem(invitation)
    assert not [file for file in folder(fleet).rglob("*") if file.is_file() and password.encode() in file.read_bytes()]


def test_a_router_gets_the_secret_of_affinity_too(fleet):
    settings = fleet.model_copy(update={"router": Settings(router={"affinity_secret": "for-routers"}).router})
    assert redeem(invite(settings, "router")).affinity_secret == "for-routers"
    assert redeem(invite(settings, "mini")).affinity_secret is None


def test_an_account_of_its_own_may_be_given(fleet):
    membership = redeem(invite(fleet, account="mini:own"))
    assert membership.broker_url.startswith("redis://mini:own@127.0.0.1:")


def test_its_account_may_do_nothing_else(fleet, client):
    invitation = invite(fleet)
    client.set("llm.fleet.chat.qwen3-14b", "a request")
    (name,) = [name for name in accounts(client) if invitation.id in name]
    port = client.connection_pool.connection_kwargs["port"]
    with closing(redis.Redis(port=port, username=name, password=invitation.secret, protocol=2)) as guest:
        for command in (
            ("GET", name),
            ("GETDEL", "llm.fleet.chat.qwen3-14b"),
            ("EXISTS", "llm.fleet.chat.qwen3-14b"),
            ("KEYS", "*"),
            ("ACL", "LIST"),
            ("INFO",),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                guest.execute_command(*command)
        assert guest.getdel(name)


def run_out(fleet, client):
    """An invitation that nobody has used in time."""
    invitation = invite(fleet, valid=0.001)
    deadline = time.monotonic() + 10
    while client.exists(f"fleet-invitation:{invitation.id}"):
        assert time.monotonic() < deadline
    return invitation


def test_one_that_has_run_out_says_so_each_time(fleet, client):
    invitation = run_out(fleet, client)
    for _ in range(2):
        said = "the invitation has run out before it was used; another one: fleet-worker invite, on the first Mac"
        assert refused(invitation).startswith(said)


def test_accounts_that_were_used_or_have_run_out_are_removed_by_the_next_invitation(fleet, client):
    used = invite(fleet)
    redeem(used)
    ended = [used, *(run_out(fleet, client) for _ in range(3))]
    valid = invite(fleet)
    ids = {name.partition(":")[2] for name in accounts(client)}
    assert (valid.id in ids, ids & {each.id for each in ended}) == (True, set())
    assert "does not know the invitation any more: it was used or has run out" in refused(used)
    assert redeem(valid)


def test_all_that_is_kept_for_an_invitation_expires(fleet, client):
    used, left = invite(fleet), run_out(fleet, client)
    redeem(used)
    assert not list(client.scan_iter(f"fleet-invitation:{used.id}*"))
    (name,) = client.scan_iter(f"fleet-invitation:{left.id}*")
    assert 0 < client.pttl(name) <= 86_401_000


def test_a_broker_that_fails_after_it_gave_the_account_away_loses_nothing(fleet, monkeypatch):
    def getdel(self, name):
        if name.endswith(":unused"):
            raise redis.exceptions.ConnectionError
        return before(self, name)

    before = redis.Redis.getdel
    invitation = invite(fleet)
    monkeypatch.setattr(redis.Redis, "getdel", getdel)
    assert redeem(invitation).broker_url == fleet.broker_url


def test_a_wrong_secret_is_as_one_that_was_used(fleet):
    invitation = invite(fleet)
    assert "the broker does not know the invitation any more" in refused(
        invitation.model_copy(update={"secret": "wrong"})
    )
    assert redeem(invitation)


def test_a_broker_that_is_away_uses_nothing_up(fleet):
    invitation = invite(fleet)
    away = invitation.model_copy(update={"broker_url": f"redis://127.0.0.1:{free_port()}/0"})
    with pytest.raises(BrokerUnavailable, match="does not run") as caught:
        redeem(away)
    assert invitation.secret not in str(caught.value)
    assert redeem(invitation)


def test_an_account_that_may_make_no_accounts_is_in_the_line_itself(fleet, client):
    client.execute_command(
        "ACL", "SETUSER", "fleet", "on", ">limited", "~*llm.*", "&*", "+@all", "-@admin", "-@dangerous"
    )
    url = re.sub(":[^:]*@", "fleet:limited@", fleet.broker_url)
    limited = Settings(broker_url=url)
    invitation = invite(limited, address="127.0.0.1")
    assert invitation.secret == ""
    assert redeem(invitation).broker_url == url


def test_rabbitmq_is_too_and_need_not_even_be_asked():
    invitation = invite(Settings(broker_url="amqp://fleet:x@broker//"))
    assert invitation.membership.broker_url == "amqp://fleet:x@broker//"
    assert invitation.broker_url == "amqp://broker//"


@pytest.mark.parametrize("up", [{"broker": True}, {}])
def test_a_broker_for_this_host_only_has_no_guests(up):
    with pytest.raises(ConfigurationError, match="this host only"):
        invite(Settings(broker_url="redis://:x@127.0.0.1:1/0", up=up))


def test_the_name_for_others_is_told_with_an_address_beside_it(fleet, monkeypatch):
    monkeypatch.setattr("fleet_worker.setup.invite.lan_address", lambda: "10.0.0.7")
    invitation = invite(fleet, address="mini-1.local")
    port = fleet.broker_url.rpartition(":")[2]
    assert (invitation.broker_url, invitation.other_address) == (f"redis://mini-1.local:{port}", "10.0.0.7")
    assert invite(fleet, address="10.0.0.9").other_address is None


def test_this_host_has_some_name_and_address():
    assert own_address()
    assert own_host()


def test_another_invite_at_the_same_time_leaves_it_usable(fleet, client, monkeypatch):
    made = []

    def execute(self, *words, **options):
        if words[:2] == ("ACL", "SETUSER") and not made:
            made.append(words)
            result = before(self, *words, **options)
            invite(fleet)
            return result
        return before(self, *words, **options)

    before = redis.Redis.execute_command
    monkeypatch.setattr(redis.Redis, "execute_command", execute)
    first = invite(fleet)
    assert redeem(first).broker_url == fleet.broker_url


@pytest.mark.parametrize("address", ["redis://mini-1", "a b", "me@mini-1", "mini-1:6379", "mini-1/0"])
def test_an_address_is_no_url_and_no_account(fleet, address):
    with pytest.raises(ConfigurationError, match=r"--address: .*without a scheme"):
        invite(fleet, address=address)


def test_an_address_of_ipv6_may_be_in_brackets(fleet):
    assert "@[fd00::7]:" in redeem_locally(fleet, invite(fleet, address="[fd00::7]"))


def redeem_locally(fleet, invitation):
    """Redeem one whose address is not that of this host."""
    return redeem(invitation.model_copy(update={"broker_url": invite(fleet).broker_url})).broker_url
