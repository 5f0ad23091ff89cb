"""The settings of a server that `fleet-worker up` runs: `serve`, `environment`, `serve_timeout`, `max_memory`."""

import pytest

from fleet_worker import Settings
from fleet_worker.errors import ConfigurationError
from fleet_worker.node.node import can_follow

SECRET = "sk-do-not-show-this"


def instances(**found):
    return Settings(instances=found).instances


def one(**instance):
    return instances(local=instance)["local"]


def refused(**found):
    with pytest.raises(ConfigurationError) as caught:
        instances(**found)
    assert SECRET not in caught.value.message
    return caught.value.message


# --- Ports


def test_servers_get_ports_from_8080_in_the_order_of_the_file():
    found = instances(
        a={"serve": "x {port}"},
        b={"serve": "x {port}"},
        c={"base_url": "http://localhost:8081"},
        d={"serve": "y {port}"},
    )
    assert [each.base_url for each in found.values()] == [
        "http://127.0.0.1:8080",
        "http://127.0.0.1:8082",
        "http://localhost:8081",
        "http://127.0.0.1:8083",
    ]


def test_ports_of_other_hosts_are_free_here():
    found = instances(a={"base_url": "http://10.0.0.2:8080"}, b={"serve": "x {port}"})
    assert found["b"].base_url == "http://127.0.0.1:8080"


def test_a_port_on_which_an_instance_without_base_url_may_be_found_is_not_given_away():
    assert instances(a={}, b={"serve": "x {port}"})["b"].base_url == "http://127.0.0.1:8081"


def test_an_instance_without_serve_does_not_change():
    assert one(base_url="http://10.0.0.2:8080").base_url == "http://10.0.0.2:8080"
    assert one().base_url is None


def test_the_order_of_the_file_counts_whatever_variables_add(tmp_path, monkeypatch):
    path = tmp_path / "fleet.toml"
    path.write_text("[instances.b]\nserve = 'x {port}'\n[instances.a]\nserve = 'x {port}'\n")
    monkeypatch.setenv("FLEET_CONFIG", str(path))
    monkeypatch.setenv("FLEET_INSTANCES__A__LIMITS__CONCURRENCY", "2")
    monkeypatch.setenv("FLEET_INSTANCES__C__SERVE", "x {port}")
    assert {name: each.base_url[-4:] for name, each in Settings().instances.items()} == {
        "b": "8080",
        "a": "8081",
        "c": "8082",
    }


# --- Sources


def test_all_of_them_can_be_set_by_variables(monkeypatch):
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__SERVE", """mlx_lm.server --port {port} --args '{"a": 1}'""")
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__ENVIRONMENT__HF_TOKEN", SECRET)
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__ENVIRONMENT__https_proxy", "http://proxy")
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__MAX_MEMORY", "12 GB")
    local = Settings().instances["local"]
    assert local.serve == ("mlx_lm.server", "--port", "{port}", "--args", '{"a": 1}')
    assert {name: text.get_secret_value() for name, text in local.environment.items()} == {
        "HF_TOKEN": SECRET,
        "https_proxy": "http://proxy",
    }
    assert local.max_memory == 12_000_000_000


def test_a_list_of_words_and_numbers_as_variables_are_taken():
    local = one(serve=["a b", "{port}"], environment={"HF_HUB_OFFLINE": 1})
    assert local.serve == ("a b", "{port}")
    assert local.environment["HF_HUB_OFFLINE"].get_secret_value() == "1"


# --- What is refused


@pytest.mark.parametrize(
    ("instance", "reason"),
    [
        ({"serve": "x"}, "serve must contain {port}, or base_url must name the port"),
        ({"serve": "x '"}, "local.serve: has a quote that is not closed"),
        ({"serve": ""}, "must begin with the name of a program"),
        ({"serve": []}, "must begin with the name of a program"),
        ({"serve": [" "]}, "must begin with the name of a program"),
        ({"serve": 5}, "local.serve: must be a text, or a list of texts"),
        ({"serve": ["x", 5]}, "local.serve: must be a text, or a list of texts"),
        ({"serve": ["x", "a\0"]}, "must be one line"),
        ({"serve": "x {port}", "base_url": "http://10.0.0.2:8080"}, "base_url must be of this host"),
        ({"environment": {"A": SECRET}}, "environment is set, but serve is not"),
        ({"max_memory": "12 GB"}, "max_memory is set, but serve is not"),
        ({"serve": "x {port}", "max_memory": 12}, "local.max_memory: must be greater than or equal to 100000000"),
        ({"serve": "x {port}", "max_memory": "much"}, "local.max_memory"),
        ({"serve": "x {port}", "serve_timeout": 0}, "local.serve_timeout"),
        ({"serve": "x {port}", "environment": SECRET}, "local.environment: must be a table"),
        ({"serve": "x {port}", "environment": {"A": [SECRET]}}, "local.environment.A: must be a text"),
        ({"serve": "x {port}", "environment": {"A": True}}, "local.environment.A: must be a text"),
        ({"serve": "x {port}", "environment": {"A": f"{SECRET}\0"}}, "the value of A holds a character"),
        ({"serve": "x {port}", "environment": {"A=B": SECRET}}, "named with letters, digits and '_'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(instance, reason):
    assert reason in refused(local=instance)


def test_two_servers_cannot_have_one_port():
    reason = refused(
        a={"serve": "x", "base_url": "http://127.0.0.1:8080"}, b={"serve": "x", "base_url": "http://localhost:8080/v1"}
    )
    assert "b has the port of a in its base_url" in reason


# --- What is not shown, and what changes nothing


def test_variables_of_a_server_are_never_shown():
    settings = Settings(instances={"local": {"serve": "x {port}", "environment": {"HF_TOKEN": SECRET}}})
    assert SECRET not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()


def test_a_running_node_follows_a_change_that_only_its_server_needs_to_know():
    def settings(**more):
        fleet = {"enabled": True, "respond_to_requests": True}
        return Settings(instances={"local": {"serve": "x {port}", "fleet": fleet, **more}})

    changed = settings(environment={"A": "1"}, max_memory="9 GB", serve_timeout=5)
    assert can_follow(changed, settings(), "local")
    assert not can_follow(settings(base_url="http://127.0.0.1:9"), settings(), "local")


def test_a_running_node_follows_a_change_that_no_node_needs_to_know():
    fleet = {"enabled": True, "respond_to_requests": True}
    old = Settings(instances={"local": {"fleet": fleet}})
    changes = {"gateway": {"drain_grace": 7}, "up": {"gateway": True}, "availability": {"idle_user": 300}}
    for group, change in changes.items():
        assert can_follow(Settings(instances={"local": {"fleet": fleet}}, **{group: change}), old, "local"), group
