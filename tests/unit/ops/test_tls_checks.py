import pytest

from fleet_worker.certificates import TLS
from fleet_worker.ops.tls_checks import handshake

CERTIFICATE = {"notAfter": "Jan 31 00:00:00 2030 GMT"}
DAY = 24 * 3600.0
EXPIRES = 1_896_048_000.0  # the same in epoch seconds


def test_a_good_handshake_tells_what_was_verified():
    finding = handshake(TLS(), "TLSv1.3", CERTIFICATE, now=EXPIRES - 15 * DAY)
    assert (finding.severity, finding.found) == (
        "ok",
        "TLSv1.3: chain and host name are verified, the broker's certificate is valid until 2030-01-31; "
        "no client certificate is sent",
    )


def test_a_client_certificate_is_told(tmp_path):
    finding = handshake(TLS(cert=tmp_path / "cert.pem"), "TLSv1.3", CERTIFICATE, now=0.0)
    assert finding.found.endswith("; a client certificate is sent")


def test_a_certificate_that_expires_soon_is_a_warning():
    finding = handshake(TLS(), "TLSv1.2", CERTIFICATE, now=EXPIRES - 13 * DAY)
    assert finding.severity == "warning"
    assert "2030-01-31" in finding.found
    assert "renew it" in finding.advice


@pytest.mark.parametrize(
    ("switches", "what"), [({"checks_chain": False}, "certificate"), ({"checks_host": False}, "host name")]
)
def test_what_is_not_verified_is_a_warning(switches, what):
    finding = handshake(TLS(**switches), "TLSv1.3", {})
    assert finding.severity == "warning"
    assert f"the broker's {what} is not verified" in finding.found
