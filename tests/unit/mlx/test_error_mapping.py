"""Every failure of a request is one of our errors, and no text of httpx or of a server is in it."""

import json
import traceback
from contextlib import closing
from itertools import product
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import (
    ConnectionFailure,
    ContextLengthExceeded,
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    ProviderError,
    RequestTimeout,
    Unauthorized,
    UnsupportedCapability,
)
from fleet_worker.mlx.error_mapping import error_in, error_of_response, error_of_status
from tests.mlx_clients import Client

SECRET = "swordfish"
EXPECTED = {
    httpx.CloseError: ConnectionFailure,
    httpx.ConnectError: InstanceUnavailable,
    httpx.ConnectTimeout: InstanceUnavailable,
    httpx.DecodingError: ConnectionFailure,
    httpx.HTTPError: ConnectionFailure,
    httpx.HTTPStatusError: ConnectionFailure,
    httpx.LocalProtocolError: ProviderError,
    httpx.NetworkError: ConnectionFailure,
    httpx.PoolTimeout: RequestTimeout,
    httpx.ProtocolError: ConnectionFailure,
    httpx.ProxyError: ConnectionFailure,
    httpx.ReadError: ConnectionFailure,
    httpx.ReadTimeout: RequestTimeout,
    httpx.RemoteProtocolError: ConnectionFailure,
    httpx.RequestError: ConnectionFailure,
    httpx.TimeoutException: RequestTimeout,
    httpx.TooManyRedirects: ConnectionFailure,
    httpx.TransportError: ConnectionFailure,
    httpx.UnsupportedProtocol: ConnectionFailure,
    httpx.WriteError: ConnectionFailure,
    httpx.WriteTimeout: RequestTimeout,
}
IMPOSSIBLE = {
    httpx.CookieConflict,  # no cookie is asked for by its name
    httpx.InvalidURL,  # the URL is checked when the client is made
    *(httpx.StreamError, httpx.StreamConsumed, httpx.StreamClosed, httpx.ResponseNotRead),  # a body is read only once
    httpx.RequestNotRead,  # the body of a request is bytes
}


def descendants(kind):
    return {kind}.union(*map(descendants, kind.__subclasses__()))


def test_every_exception_of_httpx_has_a_meaning_here():
    """A new one must be added to one of the two."""
    public = {kind for kind in vars(httpx).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {each for kind in public for each in descendants(kind)} == {*EXPECTED, *IMPOSSIBLE}


def made(kind):
    """An exception of httpx whose text is secret."""
    if kind is httpx.HTTPStatusError:
        return kind(SECRET, request=httpx.Request("GET", "http://a"), response=httpx.Response(500))
    return kind(SECRET)


@pytest.mark.parametrize("error", [FleetError("ours"), ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
def test_what_is_not_of_httpx_passes(error):
    def fail(request):
        raise error

    with closing(Client("http://a", transport=httpx.MockTransport(fail))) as client:
        for ask in (client.ask, client.stream, client.health):
            with pytest.raises(type(error)) as raised:
                ask()
            assert raised.value is error


class Breaking(httpx.SyncByteStream):
    """A body that breaks after one token."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
        raise self.error


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_a_client_raises_nothing_of_httpx_and_none_of_its_text(kind):
    """The failure comes before the answer, or in the middle of it."""

    def before(request):
        raise made(kind)

    def amid(request):
        return httpx.Response(200, stream=Breaking(made(kind)))

    for handler in (before, amid):
        with closing(Client("http://a", transport=httpx.MockTransport(handler))) as client:
            client.unreachable.set()  # connecting is not tried again
            for ask in (client.ask, client.stream, lambda: client.vectors("a"), client.health, client.models):
                with pytest.raises(FleetError) as raised:
                    ask()
                assert type(raised.value) is EXPECTED[kind]
                assert raised.value.message
                assert SECRET not in f"{raised.value!r} {raised.value.metadata}"
                assert SECRET not in "".join(traceback.format_exception(raised.value))


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


# --- What the failures of servers mean

SNAPSHOT = (
    "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing "
    "traffic has been disabled."
)
MISSING = {"error": {"message": "Model 'x' not found", "type": "invalid_request_error", "code": "model_not_found"}}
VALIDATION = [{"type": "list_type", "loc": ["body", "stop"], "msg": "Input should be a valid list", "input": SECRET}]
FAILURES = [
    # mlx_lm.server
    ("mlx_lm: its thread has died", 404, {"error": "generation thread died"}, InstanceUnavailable),
    ("mlx_lm: not healthy", 503, {"status": "unavailable"}, InstanceUnavailable),
    ("mlx_lm: a model that is not there", 404, {"error": SNAPSHOT}, ModelNotServed),
    (
        "mlx_lm: a model nobody has",
        404,
        {"error": "404 Client Error. Repository Not Found for url: https://h"},
        ModelNotServed,
    ),
    ("mlx_lm: a model with a bad name", 404, {"error": "Repo id must use alphanumeric chars"}, ModelNotServed),
    (
        "mlx_lm: a template that fails",
        404,
        {"error": "Conversation roles must alternate user/assistant"},
        InvalidRequest,
    ),
    ("mlx_lm: no messages", 404, {"error": "list index out of range"}, InvalidRequest),
    ("mlx_lm: no such route", 404, b"Not Found", UnsupportedCapability),
    ("mlx_lm: a bad number", 400, {"error": "max_tokens must be a non-negative integer"}, InvalidRequest),
    ("mlx_lm: no length", 411, {"error": "Content-Length required"}, InvalidRequest),
    ("mlx_lm: no such method", 501, b"<html>Unsupported method ('PUT')</html>", ProviderError),
    # vllm-mlx
    ("vllm: another model", 404, {"detail": "The model `x` does not exist. Available models: y"}, ModelNotServed),
    ("vllm: busy", 503, {"detail": {"error": {"code": "text_generation_busy", "message": "..."}}}, Overloaded),
    ("vllm: a bad type", 422, {"detail": VALIDATION}, InvalidRequest),
    ("vllm: no messages", 500, b"Internal Server Error", ProviderError),
    ("vllm: too many tokens wanted", 400, {"detail": "max_tokens must be at most 32768"}, InvalidRequest),
    ("vllm: a wrong key", 401, {"detail": "Invalid API key"}, Unauthorized),
    ("vllm: rate limit", 429, {"detail": "Rate limit exceeded"}, Overloaded),
    ("vllm: 300 s are over", 504, {"detail": "Request timed out after 300.0 seconds"}, RequestTimeout),
    ("vllm: an error in a stream", 500, {"message": "Internal server error", "code": 500}, ProviderError),
    # mlx-openai-server
    ("openai: another model", 404, {"detail": MISSING}, ModelNotServed),
    ("openai: another model, said otherwise", 404, MISSING, ModelNotServed),
    ("openai: a full queue", 429, {"error": {"message": "queue is full", "code": "429"}}, Overloaded),
    ("openai: a chat to an embedding model", 400, {"error": {"message": "not a language model"}}, InvalidRequest),
    ("openai: a broken child", 500, {"error": {"message": "worker process died", "code": 500}}, ProviderError),
    ("openai: a template that refuses", 500, {"error": {"message": "System role not supported"}}, InvalidRequest),
    # mlx-vlm
    ("vlm: a template", 500, {"detail": "Generation failed: System role not supported"}, InvalidRequest),
    ("vlm: roles", 500, {"detail": "Conversation roles must alternate user/assistant/..."}, InvalidRequest),
    ("vlm: no template", 500, {"detail": "Cannot use chat template functions because"}, InvalidRequest),
    ("vlm: a failure that quotes", 500, {"detail": "OOM at 'generation thread died'"}, ProviderError),
    # mlx-omni-server
    ("omni: another model", 500, b"Internal Server Error", ProviderError),
    ("omni: an image", 422, {"detail": VALIDATION}, InvalidRequest),
    ("mlx-vlm: another model", 400, {"detail": "Failed to load model: Cannot find an appropriate"}, ModelNotServed),
    ("mlx-vlm: a text about it", 400, {"detail": "no: Failed to load model"}, InvalidRequest),
    ("rapid-mlx: another model", 404, {"error": {"message": "The model `a` does not exist."}}, ModelNotServed),
    # any of them, and proxies in front of them
    ("fastapi: no such route", 404, {"detail": "Not Found"}, UnsupportedCapability),
    ("a web server: no such route", 404, b"<!DOCTYPE HTML><p>Error code: 404</p>", UnsupportedCapability),
    ("fastapi: no such route, without spaces", 404, b'{"detail":"Not Found"}', UnsupportedCapability),
    ("an empty refusal", 400, b"", InvalidRequest),
    ("an empty failure", 500, b"", ProviderError),
    ("an empty 404", 404, b"", InvalidRequest),
    ("forbidden", 403, b"", Unauthorized),
    ("a body too large", 413, b"", InvalidRequest),
    ("a request too slow", 408, b"", RequestTimeout),
    ("a proxy without its server", 502, b"<html>Bad Gateway</html>", InstanceUnavailable),
    ("not ready", 503, b"", InstanceUnavailable),
    ("site overloaded", 529, b"", Overloaded),
    ("an unknown failure", 599, b"", ProviderError),
    ("a teapot", 418, b"", ProviderError),
    (
        "a long conversation",
        400,
        {"error": {"message": "maximum context length is 8192 tokens"}},
        ContextLengthExceeded,
    ),
    ("a long conversation, said otherwise", 400, {"detail": "prompt is too long: 9000 tokens"}, ContextLengthExceeded),
    ("a long conversation as a text", 413, b"exceeds the context window of 4096", ContextLengthExceeded),
]
RETRYABLE = {InstanceUnavailable, Overloaded, RequestTimeout}


def sent(body):
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.mark.parametrize(("status", "body", "expected"), [pytest.param(*case, id=name) for name, *case in FAILURES])
def test_a_failure_of_a_server_means_one_error(status, body, expected):
    error = error_of_status(status, sent(body))
    assert type(error) is expected
    assert error.retryable is (expected in RETRYABLE or (status >= 500 and expected is not InvalidRequest))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"detail": VALIDATION}, "stop"),
        ({"detail": [{"loc": ["body", "messages", 0, "content"]}]}, "messages"),
        ({"error": {"message": "bad", "param": "top_p"}}, "top_p"),
        ({"detail": [{"loc": ["body", SECRET]}]}, None),
        ({"detail": [SECRET]}, None),
        ({"detail": [{"loc": SECRET}]}, None),
        ({"error": {"param": [SECRET]}}, None),
        ({"error": SECRET}, None),
        (SECRET, None),
        ([SECRET], None),
    ],
)
def test_a_refusal_names_the_field_that_the_server_names(body, field):
    error = error_of_status(422, sent(body))
    assert error.param == field
    assert error.message == f"the MLX server refused {field or 'the request'} (422)"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("System role not supported", "takes no system message: put its text into the first user message"),
        ("System messages are not allowed!", "takes no system message: put its text into the first user message"),
        ("After the optional system message, conversation roles must alternate", "alternate"),
        ("Only user and assistant roles are supported!", "takes user and assistant messages only"),
        ("This model only supports single tool-calls at once!", "one tool call"),
        ("No user query found in messages.", "wants a user message"),
        ("jinja2.exceptions.UndefinedError: 'dict object' has no attribute 'x'", "cannot make a prompt"),
    ],
)
@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_a_refusal_of_a_chat_template_is_told_in_our_words(status, said, told):
    error = error_of_status(status, sent({"detail": f"{said} {SECRET}"}))
    assert (type(error), error.metadata["param"], error.metadata["status"]) == (InvalidRequest, "messages", status)
    assert error.message.startswith("the model's chat template ")
    assert told in error.message
    assert SECRET not in error.message


@pytest.mark.parametrize(("status", "body"), [pytest.param(*case[:2], id=name) for name, *case in FAILURES])
def test_an_error_says_something_and_repeats_nothing(status, body):
    error = error_of_status(status, sent(body))
    assert error.message
    assert SECRET not in f"{error!r} {error.metadata}"


def test_a_busy_server_tells_when_to_come_back():
    assert error_of_status(429, b"", retry_after=2.5).metadata == {"retry_after": 2.5}
    assert error_of_status(503, b"", retry_after=0.0).metadata == {"retry_after": 0.0}
    assert type(error_of_status(503, b"", retry_after=0.0)) is Overloaded
    assert error_of_status(429, b"").metadata == {}


def test_a_report_that_quotes_the_request_is_not_searched_for_marks():
    """A prompt in it may contain the phrases that are searched for."""
    prompt = "context length exceeded, generation thread died, model x not found, busy"
    report = [{"type": "string_type", "loc": ["body", "messages"], "msg": "Input should be a string", "input": prompt}]
    assert type(error_of_status(422, sent({"detail": report}))) is InvalidRequest


def test_a_long_report_that_quotes_the_request_is_not_searched_either():
    prompt = "context length exceeded, generation thread died " * 200
    report = [{"type": "string_type", "loc": ["body", "messages"], "msg": "Input should be a string", "input": prompt}]
    assert type(error_of_status(422, sent({"detail": report}))) is InvalidRequest


SHAPES = [
    lambda text: text.encode(),
    lambda text: json.dumps(text).encode(),
    lambda text: json.dumps({"error": text}).encode(),
    lambda text: json.dumps({"error": {"message": text, "code": text}}).encode(),
    lambda text: json.dumps({"detail": text}).encode(),
    lambda text: json.dumps({"detail": {"error": {"message": text}}}).encode(),
    lambda text: json.dumps({"detail": [{"input": text}]}).encode(),
    lambda text: json.dumps([text, None, 5]).encode(),
    lambda text: b"\xff\xfe" + text.encode(),
    lambda text: b'{"error": "' + text.encode(),
]
MARKS = ["", "busy ", "context length ", "model not found ", "generation thread died ", "Not Found"]


@pytest.mark.parametrize("mark", MARKS)
def test_whatever_a_server_writes_none_of_it_is_repeated(mark):
    for status, shape, retry_after in product(range(400, 600), SHAPES, [None, 2.5]):
        error = error_of_status(status, shape(mark + SECRET), retry_after=retry_after)
        assert SECRET not in f"{error!r} {error} {error.metadata}"


@given(st.integers(400, 599), st.binary(max_size=40))
def test_any_bytes_of_any_failure_are_an_error(status, body):
    assert error_of_status(status, body).message


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"error": "no", "code": 503}, InstanceUnavailable),
        ({"error": {"message": "no"}, "status": 503}, InstanceUnavailable),
        ({"error": {"message": "no", "status_code": "503"}}, InstanceUnavailable),
        ({"error": {"message": "no", "type": "service_unavailable"}}, InstanceUnavailable),
        ({"error": {"message": "longer than the maximum context length"}}, ContextLengthExceeded),
        ({"status": "error", "code": 401, "message": "no"}, Unauthorized),
    ],
)
def test_an_error_of_status_200_is_told_by_its_own_code(answer, kind):
    assert type(error_in(answer)) is kind


def test_only_an_answer_that_names_another_place_is_a_redirect():
    """304 is none: it says that a copy is good, and nobody here has one."""
    timer = SimpleNamespace(limit_rest=lambda seconds: None, cancel_error=None)
    error = error_of_response(httpx.Response(304, stream=httpx.ByteStream(b"")), timer)
    assert (type(error), error.message) == (ProviderError, "the MLX server answered 304")
