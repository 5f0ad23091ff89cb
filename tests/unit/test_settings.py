import contextlib
import os
import re
import socket
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Instance, Model, RegistrySettings, RouterSettings, Settings, WorkerSettings

SECRET = "swordfish"
CONFIG = Path(__file__).parents[2] / "config"
FILES = sorted(CONFIG.glob("*.toml"))
OF_THE_EXAMPLE = {
    "instances.local.base_url",
    "instances.local.limits.concurrency",
    "instances.local.fleet.enabled",
    "instances.local.fleet.respond_to_requests",
    "instances.local.fleet.capabilities",
    "instances.local.models.qwen3-14b.backend",
    "instances.local.models.qwen3-14b.chat_template",
    "instances.local.models.qwen3-14b.context_window",
    "instances.local.models.qwen3-14b.features.tools",
    "instances.local.models.qwen3-14b.features.thinking",
    "instances.local.models.qwen3-14b.features.vision",
    "instances.embed.base_url",
    "instances.embed.limits.concurrency",
    "instances.embed.usage.inference",
    "instances.embed.fleet.enabled",
    "instances.embed.fleet.respond_to_requests",
    "instances.embed.fleet.capabilities",
    "instances.embed.models.all-minilm-l6-v2.dimensions",
}
"""What the shipped files say of one particular mini. Everything else in them is shown as the default."""


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Returns a function that makes a text the configuration file."""

    def write(text):
        path = tmp_path / "fleet.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        monkeypatch.setenv("FLEET_CONFIG", str(path))

    return write


def one(**instance):
    return Settings(instances={"local": instance}).instances["local"]


# --- Sources


def test_with_nothing_configured_there_are_defaults_and_no_instance():
    settings = Settings()
    assert settings.broker_url == "redis://127.0.0.1:6379/0"
    assert settings.router.timeout == 300
    assert settings.instances == {}
    assert settings.host == socket.gethostname().split(".")[0]


def test_an_argument_beats_a_variable_beats_the_file_beats_the_default(configure, monkeypatch):
    configure("host = 'file'\nmax_body_bytes = 2048\n[router]\ntimeout = 2\nmax_buffered = 2\nconnect_timeout = 2")
    monkeypatch.setenv("FLEET_HOST", "variable")
    monkeypatch.setenv("FLEET_ROUTER__TIMEOUT", "3")
    monkeypatch.setenv("FLEET_ROUTER__MAX_BUFFERED", "3")
    settings = Settings(router={"timeout": 4})
    assert (settings.router.timeout, settings.router.max_buffered, settings.router.connect_timeout) == (4, 3, 2)
    assert (settings.host, settings.max_body_bytes, settings.router.reply_expires) == ("variable", 2048, 120)


def test_a_variable_completes_an_instance_of_the_file(configure, monkeypatch):
    configure("[instances.local]\nbase_url = 'http://127.0.0.1:8080'\nlimits = { embed_batch = 8 }")
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__API_KEY", SECRET)
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__LIMITS__CONCURRENCY", "4")
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__FLEET__CAPABILITIES", '["chat"]')
    instance = Settings().instances["local"]
    assert instance.base_url == "http://127.0.0.1:8080"
    assert instance.api_key.get_secret_value() == SECRET
    assert (instance.limits.concurrency, instance.limits.embed_batch) == (4, 8)
    assert instance.fleet.capabilities == ("chat",)


@pytest.mark.parametrize("key", ["12345", "1e5", "true", "null", '{"a":1}', "[]", "007"])
def test_a_key_in_a_variable_is_text_whatever_it_looks_like(monkeypatch, key):
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__API_KEY", key)
    assert Settings().instances["local"].api_key.get_secret_value() == key


def test_the_state_is_kept_where_the_system_keeps_such_things_or_where_one_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert Settings().state_dir.is_relative_to(tmp_path)
    assert Settings().state_dir.name == "fleet-worker"
    assert Settings(state_dir="~/here").state_dir == tmp_path / "here"


def test_a_stopped_node_has_15_s_more_than_its_requests():
    assert Settings(worker={"drain_grace": 2}).worker.killed_after == 17


def test_settings_do_not_change():
    settings = Settings(instances={"local": {}})
    for group, name, value in [
        (settings, "host", "other"),
        (settings.router, "timeout", 1.0),
        (settings.instances["local"], "server", "omni"),
    ]:
        with pytest.raises(ValueError, match="frozen"):
            setattr(group, name, value)


# --- What is refused


def refused(**values):
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("foo = 1", "foo"),
        ("[router]\ntimout = 3", "router.timout"),
        ("instances = 3", "instances"),
        ("[instances.local]\nbase_uri = 'http://h'", "instances.local.base_uri"),
        ("[instances.local.limits]\nconcurrency = 0", "instances.local.limits.concurrency"),
        ("[instances.local.limits]\nconcurrency = 257", "instances.local.limits.concurrency"),
        ("[instances.local.models.m]\ntemperature = 3", "instances.local.models.m.temperature"),
        ("[instances.local.fleet]\ncapabilities = ['sing']", "instances.local.fleet.capabilities"),
        ("[instances.local]\nserver = 'ollama'", "instances.local.server"),
        ("max_body_bytes = 10", "max_body_bytes"),
        ("host = ''", "host"),
        ("[worker]\nstart_timeout = nan", "worker.start_timeout"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_by_its_place(configure, text, where):
    configure(text)
    assert where in refused()


def test_all_faults_are_told_at_once(configure):
    configure("foo = 1\n[router]\ntimeout = -1\n[worker]\nmax_pending = 0")
    message = refused()
    assert all(where in message for where in ("foo", "router.timeout", "worker.max_pending"))


@pytest.mark.parametrize("seconds", ["inf", "7200.0"])
def test_a_timeout_is_always_bounded(configure, seconds):
    """A default that no request may have would refuse every request that names none."""
    configure(f"[router]\ntimeout = {seconds}")
    assert "timeout" in refused()


@pytest.mark.parametrize("clock", ["connect", "first_content"])
def test_no_clock_may_run_for_ever(clock):
    assert "clocks" in refused(instances={"local": {"clocks": {clock: float("inf")}}})


def test_the_gap_is_no_longer_than_the_first_content():
    assert "clocks.gap" in refused(instances={"local": {"clocks": {"gap": 61, "first_content": 60}}})
    assert one(clocks={"gap": 60, "first_content": 60}).clocks.gap == 60


def test_the_name_of_the_registry_node_is_taken():
    assert "'registry' is the name of the registry node" in refused(instances={"registry": {}})


@pytest.mark.parametrize("name", ["a b", "a@b", "a.b", "a/b", ""])
def test_an_instance_has_a_name_that_fits_into_a_node_name(name):
    assert "instance is named" in refused(instances={name: {}})


@pytest.mark.parametrize("host", ["", ".", "..", "../../evil", "mini a", "a@b", "a*", "a/b", "-", "mini\n"])
def test_a_host_has_a_name_that_fits_into_node_names_and_file_names(host):
    assert "host: a host is named with letters, digits, '-', '.' and '_' only" in refused(host=host)


@pytest.mark.parametrize("host", ["mini-7", "mini_7.local", "7", "größe", "10.0.0.7"])
def test_letters_digits_dashes_dots_and_underscores_name_a_host(host):
    assert Settings(host=host).host == host


@pytest.mark.parametrize(
    ("own", "used"),
    {
        "Bob's mini.local": "Bob-s-mini",
        "a@b": "a-b",
        "": "host",
        ".local": "host",
        "**": "host",
        "mini": "mini",
    }.items(),
)
def test_what_the_machine_calls_itself_is_never_refused(own, used, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: own)
    assert Settings().host == used


@pytest.mark.parametrize("name", ["local", "embed-2", "gpu_1", "7"])
def test_letters_digits_dashes_and_underscores_name_an_instance(name):
    assert set(Settings(instances={name: {}}).instances) == {name}


@pytest.mark.parametrize(
    "name", ["FLEET_ROUTER", "FLEET_INSTANCES", "FLEET_FEATURES", "FLEET_INSTANCES__LOCAL__FEATURES"]
)
def test_a_variable_that_should_be_json_and_is_not_is_told_by_its_place(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    message = refused()
    assert name.split("_")[1].lower() in message.lower()
    assert SECRET not in message


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.times(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
"""What TOML can hold."""


@given(anything, st.data())
def test_whatever_a_value_is_it_is_used_or_refused_with_its_place(value, data):
    groups = (Settings, Instance, Model, RouterSettings, WorkerSettings, RegistrySettings)
    group = data.draw(st.sampled_from(groups))
    table = {data.draw(st.sampled_from(sorted(group.model_fields))): value}
    instance = {"models": {"m": table}} if group is Model else table
    section = group.__name__.removesuffix("Settings").lower()
    values = (
        table
        if group is Settings
        else {"instances": {"local": instance}}
        if section in ("instance", "model")
        else {section: table}
    )
    with contextlib.suppress(ConfigurationError):
        Settings(**values)


def test_a_list_of_features_holds_names():
    assert "features" in refused(features=[[True]])
    assert "instances.local.features" in refused(instances={"local": {"features": [{}]}})


# --- Secrets


@pytest.mark.parametrize(
    "text",
    [
        f"api_key = '{SECRET}'\nfoo = 1",
        f"api_key = ['{SECRET}']",
        f"api_key = {{ '{SECRET}' = 1 }}",
        f"base_url = '{SECRET}'",
        f"base_url = 'http://127.0.0.1:8080#{SECRET}'\nlimits = 3",
        f"server = '{SECRET}'",
        f"limits = '{SECRET}'",
        f"limits = {{ concurrency = '{SECRET}' }}",
        f"usage = {{ image = '{SECRET}' }}",
        f"features = {{ tools = '{SECRET}' }}",
        f"features = '{SECRET}'",
        f"models = '{SECRET}'",
        f"models = {{ m = '{SECRET}' }}",
        f"model_whitelist = '{SECRET}'",
        f"fleet = {{ capabilities = ['{SECRET}'] }}",
        f"clocks = {{ gap = '{SECRET}' }}",
        f"api_key = {SECRET}",
        f"api_key = '{SECRET}",
        f"api_key = '{SECRET}' x",
        f'api_key = "{SECRET}\\x"',
        f"api_key '{SECRET}'",
    ],
)
def test_no_error_shows_a_value_of_the_file(configure, text):
    configure("[instances.local]\n" + text)
    assert SECRET not in refused()


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@host/0",
        f"user:{SECRET}@host",
        f"redis://user:{SECRET}@[host/0",
        f"redis://user:{SECRET}\uff03@host/0",  # a full-width #, which urlsplit refuses in words of its own
        f"{SECRET}://host",
    ],
)
def test_no_error_shows_the_password_of_a_broker(monkeypatch, url):
    assert SECRET not in refused(broker_url=url)
    monkeypatch.setenv("FLEET_BROKER_URL", url)
    assert SECRET not in refused()


def test_no_error_shows_the_address_of_a_server():
    message = refused(instances={"local": {"base_url": f"http://user:{SECRET}\uff03@host"}})
    assert SECRET not in message


def test_settings_show_neither_keys_nor_the_broker_s_password():
    settings = Settings(broker_url=f"redis://user:{SECRET}@host/0", instances={"local": {"api_key": SECRET}})
    for shown in (repr(settings), str(settings), f"{settings.instances}", repr(settings.instances["local"].api_key)):
        assert SECRET not in shown


def test_a_password_in_the_address_of_a_server_is_refused_or_hidden():
    try:
        shown = repr(Settings(instances={"local": {"base_url": f"http://user:{SECRET}@127.0.0.1:8080"}}))
    except ConfigurationError as error:
        shown = str(error)
    assert SECRET not in shown


# --- Instances


@pytest.mark.parametrize("key", ["base_url", "api_base", "endpoint", "mlx_api_base"])
def test_the_url_of_an_instance_has_four_names(key):
    assert one(**{key: "http://127.0.0.1:8080"}).base_url == "http://127.0.0.1:8080"


def test_the_key_of_an_instance_has_two_names():
    assert one(mlx_api_key=SECRET).api_key.get_secret_value() == one(api_key=SECRET).api_key.get_secret_value()


@pytest.mark.parametrize(
    ("fleet", "expected"),
    [
        ({}, False),
        ({"enabled": True}, False),
        ({"respond_to_requests": True}, False),
        ({"enabled": True, "respond_to_requests": True}, True),
    ],
)
def test_a_host_opts_in_explicitly_and_completely(fleet, expected):
    assert one(fleet=fleet).opted_in is expected


@pytest.mark.parametrize(
    ("usage", "capabilities", "expected"),
    [
        ({}, ["chat", "stream_chat", "embed"], ("chat", "stream_chat", "embed")),
        ({}, ["embed"], ("embed",)),
        ({}, [], ()),
        ({"inference": False}, ["chat", "stream_chat", "embed"], ("embed",)),
        ({"embedding": False}, ["chat", "embed"], ("chat",)),
        ({"inference": False, "embedding": False}, ["chat", "stream_chat", "embed"], ()),
    ],
)
def test_an_instance_carries_what_both_its_fleet_and_its_usage_allow(usage, capabilities, expected):
    assert one(usage=usage, fleet={"capabilities": capabilities}).capabilities == expected


@pytest.mark.parametrize(
    ("whitelist", "blacklist", "expected"),
    [
        ([], [], True),
        (["qwen"], [], True),
        (["QWEN3"], [], True),
        (["llama"], [], False),
        (["llama", "qwen"], [], True),
        ([], ["4BIT"], False),
        ([], ["8bit"], True),
        (["qwen"], ["4bit"], False),
        (["llama"], ["8bit"], False),
    ],
)
def test_lists_of_substrings_let_a_model_pass_whatever_its_case(whitelist, blacklist, expected):
    instance = one(model_whitelist=whitelist, model_blacklist=blacklist)
    assert instance.allows("mlx-community/Qwen3-14B-4bit") is expected


def test_features_are_a_table_or_a_list_of_what_is_there():
    expected = {"tools": True, "vision": True}
    assert Settings(features=["tools", "vision"]).features == expected
    assert one(features=["tools", "vision"]).features == expected
    assert one(models={"m": {"features": {"tools": True, "vision": True}}}).models["m"].features == expected


def test_a_model_needs_no_words():
    assert one(models={"m": {}}).models == {"m": Model()}


def test_only_what_has_opted_in_is_served():
    fleet = {"enabled": True, "respond_to_requests": True}
    assert set(Settings(instances={"local": {"fleet": fleet}, "idle": {}}).serving()) == {"local"}
    with pytest.raises(ConfigurationError, match="no instance has opted in: set fleet = "):
        Settings(instances={"idle": {}}).serving()


# --- Descriptions


def groups(group=Settings):
    """All groups of settings, each with its fields."""
    yield group
    for field in group.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from groups(part)


FIELDS = {f"{group.__name__}.{name}": field for group in groups() for name, field in group.model_fields.items()}


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_described_in_one_line_of_its_own(name):
    line = FIELDS[name].description.split("\n")[0]
    assert line.endswith(".")
    assert [each.description for each in FIELDS.values()].count(FIELDS[name].description) == 1


@pytest.mark.parametrize("name", FIELDS)
def test_the_description_of_a_number_begins_with_its_unit(name):
    field = FIELDS[name]
    units = {float: ("Seconds",), int: ("Bytes", "Number", "Port", "Slots", "Tokens")}
    for kind in {field.annotation, *get_args(field.annotation)} & units.keys():
        assert field.description.startswith(units[kind]) or "without a unit" in field.description


# --- The shipped files


def leaves(table, path=()):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def default_of(place):
    """The built-in default of `instances.local.clocks.gap`, say."""
    value = Settings(instances={"local": {"models": {"m": {}}}})
    for part in place.split("."):
        value = next(iter(value.values())) if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_file_loads(path, monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", str(path))
    Settings()


def test_the_shipped_files_are_those_of_a_worker_and_a_router():
    assert {"router.toml", "worker.toml"} <= {path.name for path in FILES}


def test_the_shipped_worker_has_opted_in_with_two_instances(monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", str(CONFIG / "worker.toml"))
    instances = Settings().instances
    assert {name: instance.capabilities for name, instance in instances.items() if instance.opted_in} == {
        "local": ("chat", "stream_chat"),
        "embed": ("embed",),
    }
    assert Settings().serving() == instances


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_shipped_file_shows_is_the_built_in_default(path):
    shown = dict(leaves(tomllib.loads(path.read_text())))
    assert shown.keys() - OF_THE_EXAMPLE
    assert {place: value for place, value in shown.items() if place not in OF_THE_EXAMPLE} == {
        place: default_of(place) for place in shown if place not in OF_THE_EXAMPLE
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_shipped_file_has_in_comments_can_be_switched_on(path, configure):
    text, count = switched_on(path)
    configure(text)
    Settings()
    assert count or path.name != "worker.toml"


def switched_on(path):
    """The text of a file with the settings that are comments there, and how many these are."""
    return re.subn(r"^# (?=[a-z_]+ = )", "", path.read_text(), flags=re.MULTILINE)


def test_the_router_s_file_shows_every_setting_of_a_router():
    shown = dict(leaves(tomllib.loads(switched_on(CONFIG / "router.toml")[0])))
    assert {f"router.{name}" for name in type(Settings().router).model_fields} <= shown.keys()


def test_the_worker_s_file_speaks_of_every_setting_of_an_instance():
    text = (CONFIG / "worker.toml").read_text()
    unsaid = {name for name in Instance.model_fields if not re.search(rf"\b{name} =|\.{name}\.", text)}
    assert unsaid <= {"features"}  # those of a model are shown


def test_the_environment_of_the_machine_is_not_seen():
    assert not [name for name, value in os.environ.items() if name.startswith("FLEET_") and value]


@pytest.mark.parametrize("host", ["http://127.0.0.1", "127.0.0.1/v1", "https://localhost:4000"])
def test_a_gateway_listens_on_an_address_and_not_on_a_url(host):
    with pytest.raises(ConfigurationError, match=r"gateway\.host must be a name or an address, without http://"):
        Settings(gateway={"host": host})
