"""The file of keys, and what a key allows."""

import hashlib
import logging
import time
from datetime import UTC, datetime, timedelta

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.key import ANYONE
from fleet_worker.gateway.accounts.keys import InvalidKey, Keys, new_key


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "keys.toml"
    path.touch(0o600)
    return path


@pytest.fixture
def alice(path):
    """A key that is in the file."""
    made = new_key("alice")
    path.write_text(made.table, "utf-8")
    return made


def test_a_new_key_is_found_by_its_secret(path, alice):
    keys = Keys.load(path)
    assert keys.are_needed
    assert keys.find(alice.secret).name == "alice"


def test_two_new_keys_share_nothing(alice):
    other = new_key("alice")
    assert len(alice.secret) == len("sk-fleet-") + 8 + 1 + 64
    assert not set(other.secret.split("-")[2:]) & set(alice.secret.split("-")[2:])


@pytest.mark.parametrize("name", ["a.b", "mini-7", "A_1", "x" * 64])
def test_each_name_that_a_key_can_have_is_written_as_toml(path, name):
    made = new_key(name)
    path.write_text(made.table, "utf-8")
    assert Keys.load(path).find(made.secret).name == name


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "é", "x" * 65, "-a", '"'])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigurationError, match="letters, digits"):
        new_key(name)


def wrong_secrets(secret):
    head, _, tail = secret.rpartition("-")
    return {
        "another secret": f"{head}-{'0' * 64}",
        "one character less": secret[:-1],
        "one more": f"{secret}0",
        "a space": f"{secret} ",
        "upper case": secret.upper(),
        "another id": f"sk-fleet-00000000-{tail}",
        "only the id": head,
        "without the prefix": secret.removeprefix("sk-fleet-"),
        "only the prefix": "sk-fleet-",
        "not ASCII": "sk-fleet-é\udcff",
        "another kind": "sk-ant-123",
        "long": "x" * 100_000,
    }


@pytest.mark.parametrize("kind", wrong_secrets("x-y"))
def test_any_other_secret_is_unknown(path, alice, kind):
    wrong = wrong_secrets(alice.secret)[kind]
    with pytest.raises(InvalidKey, match="does not know the key") as raised:
        Keys.load(path).find(wrong)
    assert (raised.value.problem.status, raised.value.problem.code) == (401, "invalid_api_key")
    assert wrong not in str(raised.value)


@pytest.mark.parametrize("secret", [None, ""])
def test_a_request_without_a_key_is_told_how_to_send_one(path, alice, secret):
    with pytest.raises(InvalidKey, match="Authorization: Bearer KEY, or as x-api-key"):
        Keys.load(path).find(secret)


def test_the_hash_is_the_sha256_of_the_whole_secret(path, alice):
    assert hashlib.sha256(alice.secret.encode()).hexdigest() in alice.table
    assert alice.secret.rpartition("-")[2] not in alice.table


def test_a_key_can_have_two_secrets_while_it_is_changed(path, alice):
    new = new_key("alice")
    first, second = (made.table.splitlines()[1] for made in (alice, new))
    both = first.removesuffix("]") + ", " + second.removeprefix("hashes = [")
    path.write_text(f"[keys.alice]\n{both}", "utf-8")
    keys = Keys.load(path)
    assert keys.find(alice.secret) is keys.find(new.secret)


def test_without_a_file_everyone_has_the_same_key():
    keys = Keys.load(None)
    assert not keys.are_needed
    assert keys.find(None) is keys.find("anything") is ANYONE
    assert keys.reload()


def test_neither_secret_nor_hash_is_in_a_repr(path, alice):
    keys = Keys.load(path)
    digest = hashlib.sha256(alice.secret.encode()).hexdigest()
    for text in (repr(keys), str(keys.find(alice.secret)), repr(keys.find(alice.secret)), repr(alice)):
        assert digest not in text
        assert alice.secret not in text


# --- The end of a key


def at(**later):
    return (datetime.now(UTC) + timedelta(**later)).isoformat()


@pytest.mark.parametrize(
    ("expires", "is_over"),
    [
        (at(days=1), False),
        (at(seconds=-1), True),
        (at(days=1).partition("+")[0], False),
        (at(seconds=-1).partition("+")[0], True),
        (at()[:10], True),
        (at(days=2)[:10], False),
    ],
    ids=["tomorrow", "a second ago", "tomorrow, no zone", "a second ago, no zone", "today", "the day after tomorrow"],
)
def test_a_key_ends_at_the_moment_that_is_set(path, alice, expires, is_over):
    path.write_text(f"{alice.table}expires = {expires}\n", "utf-8")
    keys = Keys.load(path)
    if is_over:
        with pytest.raises(InvalidKey, match="expired: ask the operator"):
            keys.find(alice.secret)
    else:
        assert keys.find(alice.secret)


def test_nobody_learns_from_a_wrong_secret_that_a_key_has_expired(path, alice):
    path.write_text(f"{alice.table}expires = 2020-01-01\n", "utf-8")
    with pytest.raises(InvalidKey, match="does not know"):
        Keys.load(path).find(wrong_secrets(alice.secret)["another secret"])


@pytest.mark.parametrize("text", ["2027-01-31", "2027-01-31T00:00:00", "2027-01-31T02:00:00+02:00"])
def test_dates_are_in_utc_wherever_the_gateway_runs(path, alice, monkeypatch, text):
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        path.write_text(f"{alice.table}expires = {text}\n", "utf-8")
        assert Keys.load(path).find(alice.secret).expires == datetime(2027, 1, 31, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


# --- Reading the file, and reading it again

FAULTS = {
    "": "keys: there is no table [keys.NAME]: fleet-worker keys new NAME prints one",
    "[keys]": "keys: there is no table [keys.NAME]",
    "keys = 1": "keys: must be a table",
    "[keys.alice]": "alice has no hashes: fleet-worker keys new alice",
    "[keys.alice]\nhashes = ['x']": "keys.alice.hashes.0: must be as fleet-worker keys new prints it",
    "[keys.alice]\nrpm = 'many'": "keys.alice.rpm: must be a whole number",
    "[keys.alice]\nrpm = 0": "keys.alice.rpm: must be greater than or equal to 1",
    "[keys.alice]\ntpm = -5": "keys.alice.tpm: ",
    "[keys.alice]\nmodel = 'x'": "keys.alice.model: unknown key, the nearest that exists is models",
    "[keys.alice]\nhighest_priority = 'urgent'": "keys.alice.highest_priority: must be 'critical', 'high'",
    "[keys.alice]\nexpires = '2027-01-31'": "keys.alice.expires: must be a date",
    "[keys.alice]\nmax_wait = nan": "keys.alice.max_wait: ",
    "[keys.alice]\naliases = { x = 5 }": "keys.alice.aliases.x: must be the name of a model, or a list of names",
    "[keys.'a b']\nhashes = []": "letters, digits",
    "[key.alice]": "key: unknown key, the nearest that exists is keys",
    "[keys.alice": "not valid TOML",
    "keys = " + "[" * 5000: "not valid TOML",
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: text[:40])
def test_the_error_names_the_file_and_the_fault(path, text):
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigurationError) as raised:
        Keys.load(path)
    assert str(path) in raised.value.message
    assert FAULTS[text] in raised.value.message


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"the file .*absent\.toml of gateway\.keys cannot be read"):
        Keys.load(tmp_path / "absent.toml")


def test_two_keys_with_one_id_are_refused(path, alice):
    path.write_text(alice.table + alice.table.replace("alice", "bob"), "utf-8")
    with pytest.raises(ConfigurationError, match="keys alice and bob have the same id"):
        Keys.load(path)


def test_a_fault_shows_no_hash(path, alice):
    path.write_text(alice.table.replace('"]\n', '0"]\n', 1), "utf-8")
    with pytest.raises(ConfigurationError, match="must be as") as raised:
        Keys.load(path)
    assert alice.table.split(":")[1][:10] not in raised.value.message


@pytest.mark.parametrize(
    "text", ["[keys.SECRET]\nhashes = []", "[keys]\nSECRET = 1", '[keys]\na = {SECRET = "b"}', "[SECRET]\n[SECRET]"]
)
def test_a_fault_shows_no_secret_that_stands_in_the_wrong_place(path, alice, text):
    path.write_text(text.replace("SECRET", alice.secret))
    with pytest.raises(ConfigurationError) as raised:
        Keys.load(path)
    assert alice.secret.removeprefix("sk-") not in raised.value.message
    assert str(path) in raised.value.message


def test_reloading_takes_new_keys_and_drops_old_ones(path, alice):
    keys, bob = Keys.load(path), new_key("bob")
    path.write_text(bob.table, "utf-8")
    assert keys.reload()
    assert keys.find(bob.secret).name == "bob"
    with pytest.raises(InvalidKey):
        keys.find(alice.secret)


@pytest.mark.parametrize("text", [*FAULTS, None], ids=lambda text: str(text)[:40])
def test_a_wrong_file_leaves_the_keys_as_they_are(path, alice, caplog, text):
    keys = Keys.load(path)
    path.unlink() if text is None else path.write_text(text, "utf-8")
    assert not keys.reload()
    assert keys.find(alice.secret)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "the keys stay as they were" in record.getMessage()


@pytest.mark.parametrize(("mode", "said"), [(0o644, "may read"), (0o666, "may change"), (0o620, "may change")])
def test_rights_that_are_too_wide_are_a_warning(path, alice, caplog, mode, said):
    path.chmod(mode)
    Keys.load(path)
    (record,) = caplog.records
    assert said in record.getMessage()
    assert "chmod 600" in record.getMessage()


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_narrow_rights_are_fine(path, alice, caplog, mode):
    path.chmod(mode)
    Keys.load(path)
    assert not caplog.records
