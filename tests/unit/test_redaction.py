"""What is secret in a configuration is not shown."""

import shlex

import pytest

from fleet_worker.redaction import redacted_command, redacted_url, secret_values


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://broker:6379/0", "redis://broker:6379/0"),
        ("redis://:hush@broker:6379/0", "redis://:(set)@broker:6379/0"),
        ("amqps://me:hu%2Fsh@broker/v?ssl_cert_reqs=none", "amqps://me:(set)@broker/v?ssl_cert_reqs=none"),
        ("redis://me@broker/0", "redis://me@broker/0"),
        ("redis://:a:b@[::1]:6379/0", "redis://:(set)@[::1]:6379/0"),
    ],
)
def test_the_password_of_a_url(url, shown):
    assert redacted_url(url) == shown


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("mlx_lm.server --port {port}", "mlx_lm.server --port {port}"),
        ("vllm-mlx serve a --api-key hush --port 1", "vllm-mlx serve a --api-key (set) --port 1"),
        ("x --api_key=hush --HF-TOKEN hush", "x --api_key=(set) --HF-TOKEN (set)"),
        ("x --auth --port 1", "x --auth --port 1"),
        ("x --api-key -hush", "x --api-key (set)"),
        ("env HF_TOKEN=hush OMP_NUM_THREADS=4 x", "env HF_TOKEN=(set) OMP_NUM_THREADS=4 x"),
        ("x -H 'Authorization: Bearer hush' --url a", "x -H 'Authorization: (set)' --url a"),
        ("x --cache redis://me:hush@b/0 --db=amqp://:hush@b", "x --cache redis://me:(set)@b/0 --db=amqp://:(set)@b"),
        ("""x --args '{"a": 1, "api_key": "hush"}'""", """x --args '{"a": 1, "api_key": (set)'"""),
        ("x --max-tokens 512 --tokenizer a --api-tokens hush", "x --max-tokens 512 --tokenizer a --api-tokens (set)"),
        (["x", "--model", "/a b/c", "--password", "hu sh"], "x --model '/a b/c' --password (set)"),
    ],
)
def test_the_options_of_a_command_line(line, shown):
    assert redacted_command(line) == shown


@pytest.mark.parametrize(
    ("line", "secrets"),
    [
        ("x --port 1 --max-tokens 5", []),
        ("x --api-key hush --port 1 --token=hush2", ["hush", "hush2"]),
        ("x --cache redis://me:hush@b/0", ["hush"]),
        ("x -H 'Authorization: Bearer hush'", ["hush"]),
        ("""x --args '{"a": 1, "api_key": "hush"}'""", ["hush"]),
    ],
)
def test_the_secrets_of_a_command_line(line, secrets):
    assert list(secret_values(shlex.split(line))) == secrets
