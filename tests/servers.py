"""A small fake MLX server with bad manners: `python -S tests/servers.py PORT MANNER...`.

It imports little, so that it starts in 30 ms.
"""

import os
import signal
import socket
import subprocess
import sys
import time

CHILD = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); signal.pause()"


def main(port, *manners):
    for manner in manners:
        name, _, value = manner.partition("=")
        MANNERS[name](port, value)
    listen(port)


def listen(port):
    answer = b"HTTP/1.0 200 OK\r\n\r\n"
    with socket.create_server(("127.0.0.1", port)) as listener:
        say(f"listens on {port}")
        while True:
            connection, _ = listener.accept()
            with connection:
                asked = connection.recv(4096)
                if asked.startswith(b"print "):
                    say(asked[6:].decode().strip())
                if asked.startswith(b"exit"):
                    os._exit(1)
                if asked:
                    connection.sendall(answer)


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def dies(_, code):
    """Die at once, with a traceback."""
    sys.stderr.write("Traceback (most recent call last):\nModuleNotFoundError: No module named 'mlx_lm'\n")
    sys.exit(int(code or 1))


def never_ready(*_):
    while True:
        signal.pause()


def loads(_, seconds):
    time.sleep(float(seconds))


def deaf(*_):
    """Ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def forks(*_):
    """Start a child in the same group, and one that leaves it."""
    subprocess.Popen([sys.executable, "-S", "-c", CHILD])
    subprocess.Popen([sys.executable, "-S", "-c", CHILD], start_new_session=True)


def detaches(*_):
    """Start a process that is nobody's child, in a session of its own."""
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        os.execv(sys.executable, [sys.executable, "-S", "-c", CHILD])
    os.wait()


def abandons(port, _):
    """Have a child hold the port in a session of its own, and die a moment later."""
    subprocess.Popen([sys.executable, "-S", __file__, str(port), "deaf"], start_new_session=True)
    time.sleep(0.3)
    os._exit(1)


def floods(_, kind):
    """Print without end: whole lines, one line, or bytes that are no text."""
    data = {"lines": b"0123456789 lines\n" * 4000, "line": b"x" * 65536, "binary": bytes(range(256)) * 256}[kind]
    if not os.fork():
        while os.getppid() != 1:
            os.write(1, data)


def holds(_, megabytes):
    """Use memory."""
    holds.memory = bytearray(os.urandom(1024)) * (int(megabytes) * 1024)


def says(_, text):
    say(text)


def shows(_, name):
    """Print a variable."""
    say(f"{name} is {os.environ.get(name)}")


MANNERS = {
    each.__name__: each
    for each in (dies, never_ready, loads, deaf, forks, detaches, abandons, floods, holds, says, shows)
}

if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
