"""TLS with kombu: the options that Celery and Flower get, and who shares a connection."""

import ssl

import pytest
import redis.asyncio
from flower.utils.broker import Broker
from kombu.transport.pyamqp import Transport as AMQPTransport

from fleet_worker.broker.amqp_transport import SSLTransport
from fleet_worker.broker.app import create_app
from fleet_worker.broker.tls import ssl_options, warn_once
from fleet_worker.settings import Settings
from tests.tls import Certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def files(made):
    cert, key = made.client
    return {"broker_ca": made.ca, "broker_cert": cert, "broker_key": key}


def test_without_tls_celery_gets_no_options():
    for url in ("redis://h", "amqp://h//", "pyamqp://h//"):
        app = create_app(Settings(broker_url=url))
        assert app.conf.broker_use_ssl is False
        assert not app.connection_for_write().ssl
    assert create_app(Settings(broker_url="amqp://h//")).connection_for_write().transport_cls == "amqp"
    assert isinstance(create_app(Settings(broker_url="amqp://h//")).connection_for_write().transport, AMQPTransport)


@pytest.mark.parametrize("url", ["rediss://h:1/0", "valkeys://h:1/0", "REDISS://h:1/0"])
def test_celery_gets_the_options_of_redis(url, made, files):
    assert ssl_options(Settings(broker_url=url, **files)) == {
        "ssl_ca_certs": str(made.ca),
        "ssl_certfile": str(made.client.cert),
        "ssl_keyfile": str(made.client.key),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": True,
    }


def test_celery_gets_the_options_of_py_amqp(made, files):
    assert ssl_options(Settings(broker_url="amqps://u:p@[::1]:1//", **files)) == {
        "ca_certs": str(made.ca),
        "certfile": str(made.client.cert),
        "keyfile": str(made.client.key),
        "cert_reqs": ssl.CERT_REQUIRED,
        "server_hostname": "::1",
    }
    assert ssl_options(Settings(broker_url="amqps:////"))["server_hostname"] == "localhost"


@pytest.mark.parametrize("url", ["rediss://h:1/0", "amqps://h:1//"])
@pytest.mark.parametrize("is_node", [False, True])
def test_kombu_sees_no_parameter_of_the_url_and_each_connection_has_the_options(url, is_node):
    app = create_app(Settings(broker_url=f"{url}?ssl_check_hostname=false"), is_node=is_node)
    assert app.conf.broker_url == url
    for connection in (app.connection_for_read(), app.connection_for_write(), app.connection_for_read().clone()):
        assert connection.ssl == app.conf.broker_use_ssl != {}
    if "amqp" in url:
        assert isinstance(app.connection_for_read().transport, SSLTransport)


def test_connections_with_other_certificates_are_not_equal_so_kombu_pools_them_apart():
    one, other = (
        create_app(Settings(broker_url=f"rediss://h:1/0{query}")).connection_for_write
        for query in ("", "?ssl_cert_reqs=none")
    )
    assert one().__eqhash__() != other().__eqhash__()
    assert one().__eqhash__() == one().__eqhash__()


def test_flower_verifies_too_when_it_counts_what_waits(made, files):
    conf = create_app(Settings(broker_url="rediss://h:1/0", **files)).conf
    client = Broker(conf.broker_url, broker_use_ssl=conf.broker_use_ssl).redis
    connection = client.connection_pool.make_connection()
    assert isinstance(connection, redis.asyncio.SSLConnection)
    context = connection.ssl_context.get()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


@pytest.mark.parametrize("query", ["?ssl_cert_reqs=none", "?ssl_check_hostname=false"])
@pytest.mark.parametrize("url", ["rediss://u:hush@broker:1/0", "amqps://u:hush@broker:1//"])
def test_what_is_not_verified_is_one_line_in_the_log(url, query, caplog):
    warn_once.cache_clear()
    for _ in range(3):
        create_app(Settings(broker_url=url + query))
    (line,) = caplog.messages
    assert line.startswith("the broker at broker:1 is not authenticated: ")
    create_app(Settings(broker_url=url))
    assert len(caplog.messages) == 1
