"""Files of certificates in a configuration, and what the errors of TLS mean."""

import ssl
import subprocess

import pytest

from fleet_worker.certificates import OF_BROKER, OF_INSTANCE, TLS, UnusableFile, explain, is_lasting
from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings
from tests.tls import Certificates

TLS_URL = "rediss://broker:6379/0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


def refused(**values):
    with pytest.raises(ConfigurationError) as caught:
        Settings(**{"broker_url": TLS_URL, **values})
    return caught.value.message.removeprefix("configuration: ")


def instance_with(**values):
    return {"instances": {"local": {"base_url": "https://mini", **values}}}


# --- The configuration


@pytest.mark.parametrize("url", [TLS_URL, "valkeys://h", "amqps://h//"])
def test_good_files_are_taken_with_every_scheme_of_tls(made, url):
    cert, key = made.client
    settings = Settings(broker_url=url, broker_ca=made.ca, broker_cert=cert, broker_key=key)
    assert settings.broker_tls == TLS(made.ca, cert, key)
    assert settings.broker_tls.authenticates


@pytest.mark.parametrize("url", ["redis://h", "amqp://h//", "pyamqp://h//", "valkey://h"])
def test_without_tls_there_is_nothing_to_verify_and_a_file_for_it_is_refused(made, url):
    assert Settings(broker_url=url).broker_tls is None
    secure = "amqps" if "amqp" in url else "rediss"
    expected = f"broker_ca is set, but broker_url uses no TLS: begin it with {secure}://"
    assert refused(broker_url=url, broker_ca=made.ca).endswith(expected)


@pytest.mark.parametrize("name", ["broker_ca", "broker_cert", "broker_key"])
def test_a_file_that_is_not_there_is_named_with_its_setting(name, tmp_path):
    assert refused(**{name: tmp_path / "no.pem"}) == f"{name}: the file {tmp_path}/no.pem does not exist"
    assert refused(**{name: tmp_path}) == f"{name}: {tmp_path} is not a file"
    assert name in refused(**{name: ""})
    assert name in refused(**{name: "x" * 5000})
    assert name in refused(**{name: "~nobody-here/x.pem"})


def test_the_ca_of_an_instance_is_checked_alike(made, tmp_path):
    assert Settings(**instance_with(ca=made.ca)).instances["local"].ca == made.ca
    missing = f"instances.local.ca: the file {tmp_path}/no.pem does not exist"
    assert refused(**instance_with(ca=tmp_path / "no.pem")) == missing
    assert "base_url does not begin with https://" in refused(**instance_with(ca=made.ca, base_url="http://mini"))
    assert f"ca: {made.client.key} holds no certificate" in refused(**instance_with(ca=made.client.key))


def test_a_file_that_may_not_be_read_is_named_with_its_setting(made, monkeypatch):
    """Root may read all files, so the system is told to refuse."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert refused(broker_ca=made.ca) == f"broker_ca: the file {made.ca} cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["broker_ca", "broker_cert"])
@pytest.mark.parametrize("text", [b"", b"hello", b"\x30\x82\x01\x0a", b"-----BEGIN CERTIFICATE-----\nAA\n"])
def test_a_file_without_a_certificate_is_named(name, text, tmp_path):
    file = tmp_path / "a.pem"
    file.write_bytes(text)
    assert refused(**{name: file}).endswith(
        f"{name}: {file} holds no certificate that can be used; its format must be PEM"
    )


def test_a_key_that_belongs_to_another_certificate_is_named(made):
    cert, key = made.client.cert, made.server.key
    text = f"broker_key: {key} does not belong to the certificate in {cert} (broker_cert)"
    assert refused(broker_cert=cert, broker_key=key) == text


def test_a_key_is_not_without_a_certificate_nor_a_certificate_without_a_key(made, tmp_path):
    cert, key = made.client
    assert "broker_key is set, but not broker_cert" in refused(broker_key=key)
    assert f"broker_cert: {cert} holds no private key: set broker_key" in refused(broker_cert=cert)
    assert f"broker_key: {cert} holds no private key that can be used" in refused(broker_cert=cert, broker_key=cert)
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    assert Settings(broker_url=TLS_URL, broker_cert=both).broker_tls.cert == both


def test_nobody_is_asked_for_the_passphrase_of_a_key(made, tmp_path):
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "pkey", "-in", made.client.key, "-aes256", "-passout", "pass:hush", "-out", encrypted]
    subprocess.run(command, check=True, timeout=30)
    text = refused(broker_cert=made.client.cert, broker_key=encrypted)
    assert f"broker_key: {encrypted} is encrypted" in text


def test_a_file_may_be_named_from_the_home_directory(made, monkeypatch):
    monkeypatch.setenv("HOME", str(made.ca.parent))
    assert Settings(broker_url=TLS_URL, broker_ca="~/ca.pem").broker_ca == made.ca


# --- The context


def test_the_own_ca_is_the_only_one_that_is_trusted(made):
    assert len(TLS(made.ca).context().get_ca_certs()) == 1


@pytest.mark.parametrize(
    ("switches", "mode", "checks_host"),
    [
        ({}, ssl.CERT_REQUIRED, True),
        ({"checks_host": False}, ssl.CERT_REQUIRED, False),
        ({"checks_chain": False}, ssl.CERT_NONE, False),
    ],
)
def test_a_context_verifies_unless_that_is_turned_off(switches, mode, checks_host):
    context = TLS(**switches).context()
    assert (context.verify_mode, context.check_hostname) == (mode, checks_host)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_a_file_that_was_removed_later_is_an_error_in_our_words(tmp_path):
    with pytest.raises(UnusableFile) as caught:
        TLS(tmp_path / "no.pem").context()
    assert is_lasting(caught.value)
    assert explain(caught.value, OF_BROKER)[1] == "correct broker_ca, broker_cert and broker_key"


# --- What errors mean; the real ones are in tests/flow/test_tls.py


def rejected(code, message="hush"):
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] hush")
    error.verify_code, error.verify_message, error.reason = code, message, "CERTIFICATE_VERIFY_FAILED"
    return error


def alert(reason):
    error = ssl.SSLError(1, f"[SSL: {reason}] hush")
    error.reason = reason
    return error


ERRORS = {
    "expired": (rejected(10), "has a certificate that has expired", "renew it"),
    "not yet valid": (rejected(9), "not valid yet", "clock"),
    "other host": (rejected(62), "for another host", "broker_url"),
    "other address": (rejected(64), "for another host", "broker_url"),
    "self-signed": (rejected(18), "of a CA that is not trusted here", "set broker_ca"),
    "unknown CA": (rejected(20), "of a CA that is not trusted here", "set broker_ca"),
    "weak": (rejected(66, "EE certificate key too weak"), "not accepted: EE certificate key too weak", "issue another"),
    "no client certificate": (alert("TLSV13_ALERT_CERTIFICATE_REQUIRED"), "asks for a client", "broker_cert"),
    "none, TLS 1.2": (alert("SSLV3_ALERT_HANDSHAKE_FAILURE"), "perhaps it asks for a client", "broker_cert"),
    "client unknown": (alert("TLSV1_ALERT_UNKNOWN_CA"), "its CA is unknown there", "broker_cert"),
    "client expired": (alert("SSLV3_ALERT_CERTIFICATE_EXPIRED"), "it has expired", "broker_cert"),
    "client bad": (alert("SSLV3_ALERT_BAD_CERTIFICATE"), "refuses the client certificate", "broker_cert"),
    "no TLS": (alert("WRONG_VERSION_NUMBER"), "does not speak TLS", "port"),
    "old TLS": (alert("TLSV1_ALERT_PROTOCOL_VERSION"), "no version of TLS that is safe", "TLS 1.2"),
}


@pytest.mark.parametrize(("error", "found", "advice"), ERRORS.values(), ids=ERRORS)
def test_an_error_of_tls_tells_what_is_wrong_and_what_to_do(error, found, advice):
    wrapped = OSError("of a library")
    wrapped.__context__ = error
    for each in (error, wrapped):
        told = explain(each, OF_BROKER)
        assert found in told[0]
        assert advice in told[1]
        assert "hush" not in str(told)
        assert is_lasting(each)


def test_a_connection_that_breaks_is_no_fault_of_a_certificate():
    for error in (
        ssl.SSLEOFError(8, "EOF"),
        ssl.SSLZeroReturnError(6, "closed"),
        alert("UNEXPECTED_EOF_WHILE_READING"),
    ):
        assert explain(error, OF_BROKER)[0] == "broke off the TLS connection"
        assert not is_lasting(error)
    assert explain(ConnectionResetError(), OF_BROKER) is None


def test_a_server_that_asks_for_what_has_no_setting_is_told_so():
    assert "no setting for one" in explain(alert("TLSV13_ALERT_CERTIFICATE_REQUIRED"), OF_INSTANCE)[1]
    assert explain(rejected(20), OF_INSTANCE)[1] == "set ca to the certificate of that CA"
