"""Everything that httpx can raise is one of our errors, and its text stays behind."""

import traceback
from contextlib import closing

import httpx
import pytest

from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    MalformedOutput,
    Overloaded,
    ProviderError,
    RequestTimeout,
)
from fleet_worker.mlx.error_mapping import foreign_errors_mapped
from tests.clients import Client

SECRET = "swordfish"
EXPECTED = {
    httpx.CloseError: ConnectionFailure,
    httpx.ConnectError: InstanceUnavailable,
    httpx.ConnectTimeout: InstanceUnavailable,
    httpx.CookieConflict: ProviderError,
    httpx.DecodingError: MalformedOutput,
    httpx.HTTPError: ConnectionFailure,
    httpx.HTTPStatusError: ConnectionFailure,
    httpx.InvalidURL: ConfigurationError,
    httpx.LocalProtocolError: ProviderError,
    httpx.NetworkError: ConnectionFailure,
    httpx.PoolTimeout: Overloaded,
    httpx.ProtocolError: ConnectionFailure,
    httpx.ProxyError: ConnectionFailure,
    httpx.ReadError: ConnectionFailure,
    httpx.ReadTimeout: RequestTimeout,
    httpx.RemoteProtocolError: ConnectionFailure,
    httpx.RequestError: ConnectionFailure,
    httpx.RequestNotRead: ProviderError,
    httpx.ResponseNotRead: ProviderError,
    httpx.StreamClosed: ProviderError,
    httpx.StreamConsumed: ProviderError,
    httpx.StreamError: ProviderError,
    httpx.TimeoutException: RequestTimeout,
    httpx.TooManyRedirects: MalformedOutput,
    httpx.TransportError: ConnectionFailure,
    httpx.UnsupportedProtocol: ConfigurationError,
    httpx.WriteError: ConnectionFailure,
    httpx.WriteTimeout: RequestTimeout,
}


def descendants(kind):
    return {kind}.union(*map(descendants, kind.__subclasses__()))


def test_every_exception_of_httpx_has_a_meaning_here():
    """A new one must be thought about."""
    public = {kind for kind in vars(httpx).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {each for kind in public for each in descendants(kind)} == set(EXPECTED)


def made(kind):
    """An exception of httpx with a text that nobody may see."""
    if kind is httpx.HTTPStatusError:
        return kind(SECRET, request=httpx.Request("GET", "http://a"), response=httpx.Response(500))
    if kind in (httpx.StreamConsumed, httpx.StreamClosed, httpx.ResponseNotRead, httpx.RequestNotRead):
        return kind()
    return kind(SECRET)


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_what_httpx_raises_is_one_error_of_ours(kind):
    with pytest.raises(FleetError) as raised, foreign_errors_mapped():
        raise made(kind)
    assert type(raised.value) is EXPECTED[kind]
    assert raised.value.message
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("error", [FleetError("ours"), ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
def test_what_is_not_of_httpx_passes(error):
    with pytest.raises(type(error)) as raised, foreign_errors_mapped():
        raise error
    assert raised.value is error


class Breaking(httpx.SyncByteStream):
    """A body that breaks after one token."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
        raise self.error


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_a_client_raises_nothing_of_httpx(kind):
    """Neither before an answer nor in the middle of it; connecting is tried again for a moment."""

    def before(request):
        raise made(kind)

    def amid(request):
        return httpx.Response(200, stream=Breaking(made(kind)))

    for handler in (before, amid):
        with closing(Client("http://a", transport=httpx.MockTransport(handler), clocks={"connect": 0.01})) as client:
            for ask in (client.ask, client.stream, lambda: client.vectors("a"), client.health, client.models):
                with pytest.raises(FleetError) as raised:
                    ask()
                assert type(raised.value) is EXPECTED[kind]


def test_a_failure_after_done_is_none():
    class Done(Breaking):
        def __iter__(self):
            yield b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
            raise self.error

    def handler(request):
        return httpx.Response(200, stream=Done(httpx.ReadError("late")))

    with closing(Client("http://a", transport=httpx.MockTransport(handler))) as client:
        assert client.ask().content == "a"


def test_an_error_whose_body_breaks_is_told_by_its_status():
    def handler(request):
        return httpx.Response(503, stream=Breaking(httpx.ReadError("late")))

    transport = httpx.MockTransport(handler)
    with closing(Client("http://a", transport=transport)) as client, pytest.raises(InstanceUnavailable):
        client.ask()
