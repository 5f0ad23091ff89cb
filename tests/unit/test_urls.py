"""The URLs of the broker and of the MLX servers."""

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings


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


@pytest.mark.parametrize("url", ["", "localhost", "http://h", "sqs://", "memory://", "6379"])
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
