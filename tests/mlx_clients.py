"""Clients of simulated MLX servers, for tests."""

import json
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

from fleet_worker.errors import Cancelled
from fleet_worker.mlx.client import MLXClient
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import join
from fleet_worker.settings import Instance, Model
from fleet_worker.testing import SimulatedMLX

HELLO = [{"role": "user", "content": "Hello"}]
KINDS = {
    "mlx_lm": "mlx_lm",
    "vllm_simple": "vllm_mlx",
    "vllm_batched": "vllm_mlx",
    "mlx_openai": "mlx_openai",
    "omni": "omni",
    "rapid_mlx": "rapid_mlx",
    "mlx_vlm": "mlx_vlm",
    "openai": "openai",
}
"""What `server` of an instance is for each flavour of the simulator."""


SOON = 1.0
"""Seconds; a cancel takes milliseconds, and these machines are busy."""
WHY = Cancelled("nobody wants it")


class Client(MLXClient):
    """A client with one offering, and a deadline far away unless a test says when."""

    def __init__(self, base_url, *, server="mlx_lm", model=None, transport=None, **instance):
        if "ca" in instance:  # of an https:// server only
            instance["base_url"] = base_url
        settings = Instance(models={"m": Model(**{"backend": "sim-chat", **(model or {})})}, **instance)
        super().__init__(settings, base_url, server=server, transport=transport)
        self.offering = offerings_of(settings, {}, ())["m"]

    def ask(self, messages=HELLO, *, seconds=30.0, token=None, **params):
        deadline = time.monotonic() + seconds
        return self.chat(chat_params(messages, **params), self.offering, deadline=deadline, cancel_token=token)

    def open(self, messages=HELLO, *, seconds=30.0, token=None, resume=None, **params):
        options = {"deadline": time.monotonic() + seconds, "cancel_token": token, "resume": resume}
        return self.stream_chat(chat_params(messages, **params), self.offering, **options)

    def stream(self, messages=HELLO, *, seconds=30.0, token=None, resume=None, **params):
        """The deltas of a whole stream, what they say together, and how it ended."""
        with self.open(messages, seconds=seconds, token=token, resume=resume, **params) as stream:
            deltas = [delta for arrived in stream for delta in arrived]
        return deltas, join(deltas), stream.answer()

    def vectors(self, *texts, seconds=30.0, token=None):
        return self.embed(texts, self.offering, deadline=time.monotonic() + seconds, cancel_token=token)


def chat_params(messages=HELLO, **params):
    return ChatParams.model_validate({"messages": messages, "max_tokens": 100, "temperature": 0, **params})


@contextmanager
def client_of(simulated, **instance):
    """A client that knows what kind of server this is."""
    client = Client(simulated.base_url, **{"server": KINDS[simulated.behaviour.name], **instance})
    try:
        yield client
    finally:
        client.close()


@contextmanager
def served(flavour="mlx_lm", *, client=None, **server):
    """A simulated server and a client of it."""
    with SimulatedMLX(flavour=flavour, **server) as simulated, client_of(simulated, **(client or {})) as of_it:
        yield simulated, of_it


def said(*pieces):
    """The text of a stream that says these pieces."""
    deltas = [*({"content": piece} for piece in pieces), {}]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None if delta else "stop"}]} for delta in deltas]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@contextmanager
def answering(answer, tls=None):
    """A server that sends this to everybody, and then nothing, with the connection open; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as opened:

        def serve():
            with suppress(OSError):  # the listener ends
                while True:
                    connection = opened.enter_context(listener.accept()[0])
                    with suppress(ssl.SSLError):  # a client that does not trust this server
                        if tls:
                            connection = opened.enter_context(tls.wrap_socket(connection, server_side=True))
                        connection.recv(65536)
                        connection.sendall(answer.encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def cancelled(ask, *arguments, within=SOON, **options):
    """Run a request in a thread, and cancel it at the end of the block: it raises just that error, and soon."""
    token = CancelToken()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, *arguments, token=token, **options)
        try:
            yield
            assert not answer.done(), "it ended before it was cancelled"
        finally:
            token.cancel(WHY)
        with took_less_than(within):
            assert answer.exception(timeout=10) is WHY


@contextmanager
def took_less_than(seconds):
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def until(true, seconds=5.0):
    """Wait until it is true."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not come true in time"
        time.sleep(0.002)
