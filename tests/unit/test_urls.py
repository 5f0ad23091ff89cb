"""The URLs of the broker and of the MLX servers."""

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings
from fleet_worker.urls import host_name, is_loopback


def refused(**values):
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    return caught.value.message


def server(url):
    return Settings(instances={"local": {"base_url": url}}).instances["local"].base_url


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("valkey://:pw@h:1/0", "redis://:pw@h:1/0"),
        ("valkeys://h/0", "rediss://h/0"),
        ("redis://valkey/0", "redis://valkey/0"),
        ("rediss://h/0", "rediss://h/0"),
        ("amqp://u:p@h:5672//", "amqp://u:p@h:5672//"),
        ("amqps://h//", "amqps://h//"),
    ],
)
def test_a_broker_is_valkey_redis_or_rabbitmq(given, used):
    assert Settings(broker_url=given).broker_url == used


@pytest.mark.parametrize(
    "url", ["", "localhost", "http://h", "sqs://", "memory://", "6379", "amqps:/h", "redis:h:6379"]
)
def test_another_broker_is_refused(url):
    message = refused(broker_url=url)
    assert all(f"{scheme}://" in message for scheme in ("redis", "rediss", "valkey", "valkeys", "amqp", "amqps"))


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://h/", "redis://h:1/15", "redis:///0", "redis://h//", "amqp://h/abc"]
)
def test_a_broker_may_be_named_without_a_database_and_one_of_redis_has_a_number(url):
    assert Settings(broker_url=url).broker_url == url


@pytest.mark.parametrize("end", ["/abc", "/0/1", "/-1", "/0x", "/1.5", "/hush", "/pass@h:1/0"])
@pytest.mark.parametrize("scheme", ["redis", "rediss", "valkey", "valkeys"])
def test_a_database_of_redis_that_is_no_number_is_refused_before_anything_connects(scheme, end):
    message = refused(broker_url=f"{scheme}://h:1{end}")
    assert "broker_url: must end with the number of a database, as in redis://broker:6379/0" in message
    assert end.strip("/") not in message.replace("redis://broker:6379/0", "")


@pytest.mark.parametrize("url", ["redis://h:port/0", "amqp://h:70000//", "redis://u:pass#word@h:1/0"])
def test_a_port_that_is_no_number_is_refused(url):
    text = "broker_url: is not a URL, or its port is not a number; in a password write / as %2F, ? as %3F, # as %23"
    assert text in refused(broker_url=url)


def test_a_list_of_brokers_is_refused_and_shows_no_password():
    with pytest.raises(ConfigurationError, match="one broker") as caught:
        Settings(broker_url="redis://u:first@h1;redis://u:swordfish@h2")
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "used"),
    {"REDISS://h/0": "rediss://h/0", "ValKeys://h/0": "rediss://h/0", " amqps://h// ": "amqps://h//"}.items(),
)
def test_a_scheme_may_be_written_in_any_case(given, used):
    assert Settings(broker_url=given).broker_url == used


@pytest.mark.parametrize("scheme", ["rediss", "valkeys", "amqps"])
@pytest.mark.parametrize(
    ("query", "checks"),
    {
        "": (True, True),
        "?": (True, True),
        "?ssl_cert_reqs=required": (True, True),
        "?ssl_cert_reqs=CERT_REQUIRED&ssl_check_hostname=true": (True, True),
        "?ssl_cert_reqs=none": (False, True),
        "?ssl_cert_reqs=CERT_NONE": (False, True),
        "?ssl_check_hostname=False": (True, False),
    }.items(),
)
def test_what_verifies_the_broker_is_on_unless_it_is_turned_off(scheme, query, checks):
    tls = Settings(broker_url=f"{scheme}://h/0{query}").broker_tls
    assert (tls.checks_chain, tls.checks_host) == checks


@pytest.mark.parametrize("scheme", ["redis", "rediss", "valkeys", "amqp", "amqps", "pyamqp"])
@pytest.mark.parametrize(
    "name",
    ["ssl_ca_certs", "ssl_certfile", "ssl_cert_req", "cacertfile", "verify", "heartbeat", "db", "ssl", "SSL_CERT_REQS"],
)
def test_a_parameter_that_is_not_known_is_named_with_those_that_are(scheme, name):
    message = refused(broker_url=f"{scheme}://h/0?{name}=hush")
    assert f"broker_url: the parameter {name} is not known; known are ssl_cert_reqs and ssl_check_hostname" in message
    assert "broker_ca" in message
    assert "hush" not in message


@pytest.mark.parametrize(
    ("query", "fault"),
    {
        "ssl_cert_reqs": "ssl_cert_reqs must be required or none",
        "ssl_cert_reqs=": "ssl_cert_reqs must be required or none",
        "ssl_cert_reqs=hush": "ssl_cert_reqs must be required or none",
        "ssl_check_hostname=0": "ssl_check_hostname must be true or false",
        "ssl_cert_reqs=required&ssl_cert_reqs=none": "ssl_cert_reqs is given twice",
        "ssl_cert_reqs=none&foo=1": "the parameter foo is not known",
        "%68ush%2F=1": "a parameter is not known",
        "hu-sh-hush-hush-hush-hush-hush-hush-hush-hush-hush=1": "a parameter is not known",
    }.items(),
)
def test_a_parameter_that_says_nothing_clear_is_refused(query, fault):
    message = refused(broker_url=f"rediss://h/0?{query}")
    assert fault in message
    assert "hush" not in message


@pytest.mark.parametrize("scheme", ["redis", "valkey", "amqp", "pyamqp"])
def test_a_parameter_for_tls_does_not_turn_tls_on(scheme):
    secure = "amqps" if "amqp" in scheme else "rediss"
    message = refused(broker_url=f"{scheme}://h/0?ssl_cert_reqs=required")
    assert f"begin it with {secure}://" in message


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:12?hush@h/0",
        "rediss://u:12?hush=1@h/0",
        "amqp://u:12/hush@h//",
        "amqps://u:12#hush@h//",
        "rediss://h/0#hush",
    ],
)
def test_a_password_with_a_sign_of_a_url_is_not_taken_for_another_part(url):
    message = refused(broker_url=url)
    assert "%3F" in message
    assert "hush" not in message


@pytest.mark.parametrize(
    "url", ["rediss://socket%3A%2F%2F%2Ftmp%2Fx", "amqps://%2Ftmp//", "redi\nss://h", "rediss://h\t/0"]
)
def test_a_host_is_plain_and_nothing_is_removed_from_a_url_in_silence(url):
    """kombu would make a socket without TLS of the first."""
    assert "broker_url" in refused(broker_url=url)


@pytest.mark.parametrize("end", ["?verify=false", "/v1?hush=1", "#hush"])
def test_a_server_has_no_parameters(end):
    message = refused(instances={"local": {"base_url": f"https://h{end}"}})
    assert "base_url: must not have a part behind ? or #" in message
    assert "hush" not in message


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "//", "/v1//"])
def test_v1_at_the_end_of_a_url_is_stripped(end):
    assert server("http://127.0.0.1:8080" + end) == "http://127.0.0.1:8080"
    assert server("https://proxy/mlx" + end) == "https://proxy/mlx"


def test_v1_elsewhere_in_a_url_stays():
    assert server("http://v1/v1/mlx") == "http://v1/v1/mlx"


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "localhost", "ftp://h", "http://", "http:///v1", "http://h:port", "http://h:99999", ""]
)
def test_a_server_is_an_http_url(url):
    assert "instances.local.base_url" in refused(instances={"local": {"base_url": url}})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_a_loopback_name_is_of_this_host(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["mini", "10.0.0.1", "0.0.0.0", "localhost.evil.example", "fe80::1"])
def test_another_name_is_not(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["mini-1", "mini-1.local", "192.0.2.7", "fe80::1%en0", "::1"])
def test_a_host_is_a_name_or_an_address(host):
    assert host_name(host) == host


@pytest.mark.parametrize("host", ["", "mini-1:6379", "redis://mini-1", "me@mini-1", "a b", "mini-1/0", "[::1]"])
def test_no_host_has_a_port_or_a_scheme(host):
    with pytest.raises(ValueError, match="without a scheme and without a port"):
        host_name(host)
