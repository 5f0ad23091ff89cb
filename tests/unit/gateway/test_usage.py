"""What was used, by ledgers; and the commands of the gateway that print it, or make a key."""

import csv
import io
import json
import time
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner

from fleet_worker.cli import cli
from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.keys import Keys
from fleet_worker.gateway.accounts.ledger_file import LedgerFile, Row
from fleet_worker.gateway.accounts.usage import key_usage, moment, usage

NOW = time.time()
HOUR = 3600.0
OUTSIDE = ["0001-01-01T00:00+14:00", "9999-12-31T23:59-14:00"]
"""Times that have no date in UTC."""


def row(key="alice", ago=0.0, **fields):
    default = {
        "operation": "chat/completions",
        "model": "large",
        "node": "local@mini-1",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "duration": 1.0,
        "status": 200,
    }
    return Row(request_id="r", key=key, at=NOW - ago, **{**default, **fields})


def ledger(path, *rows):
    file = LedgerFile(path)
    file.write(rows)
    file.close()
    return path


@pytest.fixture
def files(tmp_path):
    one = ledger(
        tmp_path / "ledger.sqlite",
        row(tags=("team-a", "nightly"), ttft=1.0, queue_wait=0.5),
        row(tags=("team-a",), ttft=2.0),
        row("bob", model="small", cached_tokens=4),
        row("bob", ago=48 * HOUR),
    )
    other = ledger(
        tmp_path / "other.sqlite",
        row(node="local@mini-2", prompt_tokens=1000),
        row("carol", model=None, node=None, prompt_tokens=0, completion_tokens=0, status=404, error="model_not_found"),
        row("carol", status=499),
    )
    return [one, other]


def found(files, by, ago=24 * HOUR, **options):
    return {each.name: each for each in usage(files, by, NOW - ago, **options)}


def test_several_ledgers_are_taken_together(files):
    alice = found(files, "key")["alice"]
    assert (alice.requests, alice.prompt_tokens, alice.completion_tokens, alice.tokens) == (3, 1020, 15, 1035)


def test_only_the_time_that_is_asked_for_counts(files):
    assert found(files, "key")["bob"].requests == 1
    assert found(files, "key", ago=72 * HOUR)["bob"].requests == 2
    assert found(files, "key", ago=-1.0) == {}


def test_who_used_most_is_first(files):
    assert [each.name for each in usage(files, "key", NOW - HOUR)] == ["alice", "carol", "bob"]


def test_requests_that_failed_or_were_left_are_counted_apart(files):
    carol = found(files, "key")["carol"]
    assert (carol.requests, carol.failed, carol.tokens) == (2, 2, 15)


def test_a_request_counts_for_each_of_its_tags(files):
    tags = {name: each.requests for name, each in found(files, "tag").items()}
    assert tags == {"team-a": 2, "nightly": 1, "-": 4}


def test_models_and_nodes_have_their_names_and_what_has_none_a_dash(files):
    assert {name: each.requests for name, each in found(files, "model").items()} == {"large": 4, "small": 1, "-": 1}
    assert found(files, "node").keys() == {"local@mini-1", "local@mini-2", "-"}


def test_averages_are_of_those_that_have_a_value(files):
    alice = found(files, "key")["alice"]
    assert (alice.ttft, alice.queue_wait) == (1.5, 0.5)
    assert found(files, "key")["bob"].ttft is None


def test_a_key_is_told_what_it_has_used_itself(files):
    told = key_usage(files, "bob", NOW - 72 * HOUR)
    assert (told["object"], told["key"], told["requests"], told["prompt_tokens"]) == ("usage", "bob", 2, 20)
    assert {each["model"]: each["cached_tokens"] for each in told["models"]} == {"large": 0, "small": 4}
    assert json.dumps(told)


def test_a_key_that_used_nothing_is_told_so(files):
    told = key_usage(files, "nobody' OR 1=1 --", NOW - HOUR)
    assert (told["requests"], told["models"]) == (0, [])


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    (tmp_path / "x").write_text("x" * 5000, "utf-8")
    with pytest.raises(ConfigurationError, match=r"the ledger .*/x cannot be read"):
        usage([tmp_path / "x"], "key", 0.0)


@pytest.mark.parametrize(
    ("text", "ago"),
    [("7d", 7 * 86_400), ("24h", 86_400), ("30m", 1800), ("2w", 14 * 86_400), (" 1d ", 86_400), ("999999w", None)],
)
def test_a_time_can_be_so_long_ago(text, ago):
    assert moment(text) == pytest.approx(max(0.0, time.time() - ago) if ago else 0.0, abs=5)


@pytest.mark.parametrize("text", ["2026-11-30", "2026-11-30T00:00", "2026-11-30T02:00+02:00"])
def test_a_time_can_be_a_date_in_utc(text):
    assert moment(text) == datetime(2026, 11, 30, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("text", ["", "7", "d", "7y", "-7d", "yesterday", "2026-13-01", "1" * 400 + "d", *OUTSIDE])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="must be as 7d"):
        moment(text)


# --- fleet-worker usage


def run(*words, columns="80", env=None):
    return CliRunner().invoke(cli, list(words), env={"COLUMNS": columns, **(env or {})}, catch_exceptions=False)


def test_the_command_prints_a_line_for_each_name(files):
    lines = run("usage", *map(str, files), "--by", "model").stdout.splitlines()
    assert lines[0].split() == ["model", "requests", "failed", "prompt", "output", "cached", "ttft", "wait"]
    assert lines[1].split() == ["large", "5", "1", "1,040", "25", "0", "1.5s", "0.5s"]


def test_large_numbers_are_shortened_for_people_only(tmp_path):
    path = ledger(tmp_path / "l.sqlite", row(prompt_tokens=12_345_678, completion_tokens=9_999))
    assert "12.35M" in run("usage", str(path)).stdout
    assert "9,999" in run("usage", str(path)).stdout
    assert "12345678" in run("usage", str(path), "--csv").stdout


def test_the_command_prints_json(files):
    printed = json.loads(run("usage", *map(str, files), "--json", "--since", "1d", "--key", "alice").stdout)
    assert printed["by"] == "key"
    assert [each["key"] for each in printed["usage"]] == ["alice"]
    assert printed["usage"][0]["prompt_tokens"] == 1020


def test_the_command_prints_csv(files):
    printed = list(csv.DictReader(io.StringIO(run("usage", *map(str, files), "--csv", "--by", "node").stdout)))
    assert [each["node"] for each in printed] == ["local@mini-2", "local@mini-1", "-"]
    assert printed[0]["completion_tokens"] == "5"


def test_without_arguments_the_ledgers_of_this_host_are_read(tmp_path):
    for name in ("ledger.sqlite", "ledger-2.sqlite"):
        ledger(tmp_path / name, row())
    printed = run("usage", "--json", env={"FLEET_STATE_DIR": str(tmp_path)}).stdout
    assert json.loads(printed)["usage"][0]["requests"] == 2


def test_no_requests_are_told(tmp_path):
    result = run("usage", str(ledger(tmp_path / "l.sqlite")))
    assert (result.stdout, "no requests since" in result.stderr) == ("", True)


def test_a_host_without_a_ledger_is_told_what_to_do(tmp_path):
    with pytest.raises(ConfigurationError, match=r"fleet-worker usage FILE\.\.\."):
        run("usage", env={"FLEET_STATE_DIR": str(tmp_path)})


def test_a_wrong_time_is_a_wrong_option(tmp_path):
    result = run("usage", "--since", "yesterday")
    assert result.exit_code == 2
    assert "must be as 7d, 24h, 30m" in result.stderr


# --- fleet-worker keys new


def test_a_new_key_is_shown_once_and_its_table_can_be_appended_to_the_file(tmp_path):
    result, path = run("keys", "new", "alice"), tmp_path / "keys.toml"
    path.write_text(run("keys", "new", "bob").stdout + result.stdout, "utf-8")
    path.chmod(0o600)
    (secret,) = [line for line in result.stderr.splitlines() if line.startswith("sk-fleet-")]
    assert Keys.load(path).find(secret).name == "alice"
    assert secret not in result.stdout


def test_a_name_that_no_key_can_have_is_refused():
    with pytest.raises(ConfigurationError, match="letters, digits"):
        run("keys", "new", "a b")
