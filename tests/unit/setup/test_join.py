"""Joining a fleet, from the line that was printed to the file that is written."""

import shlex
import stat
from pathlib import Path

import pytest

from fleet_worker.errors import BrokerUnavailable, ConfigurationError
from fleet_worker.host.child_process import free_port
from fleet_worker.ops.findings import Finding
from fleet_worker.settings import Settings
from fleet_worker.setup.invitation import Invitation, Membership
from fleet_worker.setup.invite import invite
from fleet_worker.setup.join import join
from fleet_worker.setup.worker_file import WorkerFile
from fleet_worker.simulator import SimulatedMLX
from tests.brokers import Valkey
from tests.commands import fleet_worker

KNOWN = WorkerFile("", "mini-2")


@pytest.fixture
def path(tmp_path, monkeypatch):
    path = tmp_path / "fleet" / "worker.toml"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("fleet_worker.setup.join.ANSWERS_WITHIN", 0.05)
    return path


def of_file(path, monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", str(path))
    return Settings()


def test_the_file_has_what_the_fleet_gives_and_only_its_owner_reads_it(fleet, path, monkeypatch):
    join(invite(fleet).encode(), path, KNOWN)
    settings = of_file(path, monkeypatch)
    assert (settings.broker_url, settings.max_body_bytes, settings.host) == (fleet.broker_url, 4096, "mini-2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_exists_costs_no_invitation(fleet, path):
    line = invite(fleet).encode()
    path.parent.mkdir()
    path.write_text("mine", "utf-8")
    with pytest.raises(ConfigurationError, match="exists already: --force"):
        join(line, path, KNOWN)
    assert path.read_text("utf-8") == "mine"
    join(line, path, KNOWN, force=True)
    assert fleet.broker_url in path.read_text("utf-8")


def test_a_folder_that_cannot_be_written_costs_no_invitation(fleet, tmp_path):
    line = invite(fleet).encode()
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        join(line, tmp_path / "file" / "worker.toml", KNOWN)
    join(line, tmp_path / "worker.toml", KNOWN)


def test_where_the_name_of_the_broker_is_not_known_its_address_is_used(fleet, path, monkeypatch):
    monkeypatch.setattr("fleet_worker.setup.invite.lan_address", lambda: "127.0.0.1")
    line = invite(fleet, address="mini-1.invalid").encode()
    membership, _ = join(line, path, KNOWN)
    assert membership.broker_url == fleet.broker_url
    assert of_file(path, monkeypatch).broker_url == fleet.broker_url


def test_a_broker_that_does_not_answer_is_told_and_leaves_no_file(path):
    invitation = Invitation(broker_url=f"redis://127.0.0.1:{free_port()}/0", id="00", secret="hush-hush")
    with pytest.raises(BrokerUnavailable, match="does not run: nothing listens there") as raised:
        join(invitation.encode(), path, KNOWN)
    assert "broker_url" not in raised.value.metadata["advice"]
    assert not path.exists()


def test_the_ca_of_the_broker_stands_beside_the_file(fleet, path, monkeypatch):
    url = fleet.broker_url
    membership = Membership(broker_url=url, broker_ca="-----BEGIN CERTIFICATE-----", max_body_bytes=2048)
    join(Invitation(broker_url=url, membership=membership).encode(), path, KNOWN)
    assert path.with_name("broker-ca.pem").read_text("utf-8") == membership.broker_ca
    assert f'broker_ca = "{path.with_name("broker-ca.pem")}"' in path.read_text("utf-8")


def test_a_router_gets_the_settings_that_routers_share(fleet, path, monkeypatch):
    router = Settings(router={"affinity_secret": "for-routers", "affinity": False}).router
    join(invite(fleet.model_copy(update={"router": router}), "router").encode(), path, KNOWN)
    settings = of_file(path, monkeypatch)
    assert settings.router.affinity_secret.get_secret_value() == "for-routers"
    assert settings.router.affinity is False


# --- The commands


@pytest.fixture
def of_fleet(fleet, tmp_path):
    """The options of a command that runs on the host of the fleet."""
    file = tmp_path / "of-fleet.toml"
    text = f'broker_url = "{fleet.broker_url}"\nup = {{ broker = true, address = "127.0.0.1" }}\n'
    file.write_text(text, "utf-8")
    return f"--config {file}"


@pytest.fixture
def server(monkeypatch):
    findings = [Finding("ok", "all is well"), Finding("warning", "it sleeps at night", "wake it")]
    monkeypatch.setattr("fleet_worker.ops.doctor.examine", lambda **_: findings)
    with SimulatedMLX(flavour="mlx_lm", models=["qwen3-14b"]) as mlx:
        port = int(mlx.base_url.rpartition(":")[2])
        monkeypatch.setattr("fleet_worker.setup.local_servers.local_servers.__defaults__", ((port,),))
        yield mlx


def test_the_line_that_invite_prints_makes_a_host_join_with_its_servers(of_fleet, server, path, monkeypatch, password):
    invited = fleet_worker(f"invite {of_fleet}")
    assert invited.stdout.startswith("fleet-worker join fleet1")
    assert invited.stdout.endswith(" --up\n")
    assert "once, within 10 minutes" in invited.stderr
    assert password not in invited.stdout + invited.stderr
    joined = fleet_worker(f"join - --yes --host mini-2 --output {path}", given=invited.stdout.replace(" --up", ""))
    assert joined.returncode == 0, joined
    assert "mini-2 belongs to the fleet at 127.0.0.1:" in joined.stdout
    assert f"local: qwen3-14b at {server.base_url}" in joined.stdout
    assert "it sleeps at night" in joined.stdout
    assert "all is well" not in joined.stdout
    assert password not in joined.stdout + joined.stderr
    assert list(of_file(path, monkeypatch).serving()) == ["local"]


def test_an_error_of_the_check_is_an_exit_code_and_the_host_has_joined(of_fleet, server, path, monkeypatch):
    monkeypatch.setattr("fleet_worker.ops.doctor.examine", lambda **_: [Finding("error", "the clock is wrong")])
    line = shlex.split(fleet_worker(f"invite {of_fleet}").stdout)[2]
    joined = fleet_worker(f"join {line} --yes --host mini-2 --output {path}")
    assert (joined.returncode, joined.stderr) == (1, "")
    assert "the clock is wrong" in joined.stdout
    assert list(of_file(path, monkeypatch).serving()) == ["local"]


def test_a_host_with_a_space_is_refused_before_the_invitation_is_used(path):
    refused = fleet_worker(f"join fleet1PABC --host 'a b' --output {path}")
    assert (refused.returncode, path.exists()) == (2, False)
    assert "Invalid value for '--host'" in refused.stderr


def test_a_host_without_a_server_keeps_the_account_and_goes_on_later(of_fleet, path, server, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr("fleet_worker.setup.instances.local_servers", list)
        without.setattr("fleet_worker.setup.instances.local_models", list)
        line = shlex.split(fleet_worker(f"invite {of_fleet}").stdout)[2]
        refused = fleet_worker(f"join {line} --yes --output {path}")
    assert refused.returncode == 78
    assert "no MLX server runs on this host" in refused.stderr
    assert "quickstart" not in refused.stderr  # which would make a fleet of its own
    assert f"The account of the fleet is kept in {path}; then go on by: fleet-worker join\n" in refused.stderr
    again = fleet_worker(f"join --yes --output {path}")
    assert again.returncode == 0, again
    assert "local: qwen3-14b" in again.stdout
    assert "has its instances already" in fleet_worker(f"join --yes --output {path}").stderr


def test_the_host_of_a_router_needs_no_server(of_fleet, path):
    """The file may be named as that of any other command."""
    line = fleet_worker(f"invite --role router {of_fleet}").stdout.strip().removeprefix("fleet-worker join ")
    joined = fleet_worker(f"join {line} --config {path}")
    assert joined.returncode == 0, joined
    assert "A router of this host reads that file" in joined.stdout


def test_an_account_is_read_from_standard_input_and_shown_nowhere(of_fleet, path):
    invited = fleet_worker(f"invite --account {of_fleet}", given="mini:of-its-own\n")
    assert "of-its-own" not in invited.stdout + invited.stderr
    line = invited.stdout.strip().removeprefix("fleet-worker join ").removesuffix(" --up")
    fleet_worker(f"join {line} --yes --output {path}")
    assert "redis://mini:of-its-own@127.0.0.1" in path.read_text("utf-8")
    for given in ("no-colon", "no-password:"):
        assert fleet_worker(f"invite --account {of_fleet}", given=given).returncode == 2


def test_a_password_may_have_any_character(of_fleet, path):
    invited = fleet_worker(f"invite --account {of_fleet}", given="mini:a/b@c%20:#d")
    line = invited.stdout.strip().removeprefix("fleet-worker join ").removesuffix(" --up")
    fleet_worker(f"join {line} --yes --output {path}")
    assert "redis://mini:a%2Fb%40c%2520%3A%23d@127.0.0.1" in path.read_text("utf-8")


@pytest.mark.parametrize("address", ["a b", "mini-1/0", "mini-1:6379", "me@mini-1", "redis://mini-1"])
def test_an_address_is_that_of_a_host(address, of_fleet):
    refused = fleet_worker(f"invite --address '{address}' {of_fleet}")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "without a scheme and without a port" in refused.stderr


def test_without_a_line_and_a_file_the_line_is_asked_for(path):
    refused = fleet_worker(f"join --yes --output {path}")
    assert refused.returncode == 2
    assert "LINE is missing: fleet-worker invite prints it" in refused.stderr


@pytest.mark.parametrize("line", ["", "hello", "fleet1PABC"])
def test_what_is_no_invitation_is_refused(line, path):
    refused = fleet_worker(f"join {line or '-'} --output {path}")
    assert refused.returncode == 78
    assert "copy the whole line" in refused.stderr


def test_over_tls_the_line_has_the_ca_and_a_client_certificate_is_given_by_hand(path, monkeypatch):
    with Valkey() as valkey, valkey.secured() as secured:
        settings = Settings(broker_url=secured.url, **secured.files)
        line = invite(settings, address="localhost").encode()
        cert, key = (Path(secured.files[name]) for name in ("broker_cert", "broker_key"))
        with pytest.raises(BrokerUnavailable, match="certificate"):
            join(line, path, KNOWN)
        join(line, path, WorkerFile("", "mini-2", broker_cert=cert, broker_key=key))
        joined = of_file(path, monkeypatch)
        assert joined.broker_ca == path.with_name("broker-ca.pem")
        assert joined.broker_ca.read_bytes() == Path(secured.files["broker_ca"]).read_bytes()
        assert joined.broker_cert == cert
