"""The documents, held against the code: links, file names, settings, commands, snippets and tables."""

import ast
import importlib
import importlib.util
import re
import tomllib

import click
import pytest
from celery.bin.celery import celery as celery_command
from flower.options import options as flower_options

from fleet_worker import Router, Settings, errors, exit_codes
from fleet_worker.cli import cli
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.host.variables import READ_ELSEWHERE
from fleet_worker.ops.snapshot import LaneStatus, Snapshot
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.status import STATUSES, InstanceStatus
from fleet_worker.registry.offered import Offered
from fleet_worker.registry.view import Registry
from fleet_worker.router.options import RequestOptions
from fleet_worker.settings import Instance
from fleet_worker.version import VERSION
from tests import documents
from tests.documents import PATHS, ROOT

EACH = pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
FOREIGN = ("https://keepachangelog.com/", "https://semver.org/")
"""All that is linked outside of this project, which has no address of its own yet."""
PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PROJECT_FILE["project"]


def text_of(name):
    return (ROOT / name).read_text("utf-8")


# --- Links and names of files


@EACH
def test_every_link_leads_to_a_file_or_a_heading(path):
    for link in documents.links(path.read_text("utf-8")):
        if link.startswith(FOREIGN):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target.read_text("utf-8")), link


@EACH
def test_every_file_that_is_named_exists(path):
    bases = (path.parent, ROOT, ROOT / "fleet_worker", ROOT / "config")
    for code in documents.inline_code(path.read_text("utf-8")):
        if re.fullmatch(r"[\w./-]+\.(py|toml|md|yaml|yml)|(\.?\w[\w.-]*/)+", code):
            assert any((base / code).exists() for base in bases), code


def test_what_the_architecture_names_is_in_the_files_that_it_links_there():
    """Classes and functions, as in `ReplyWriter.put` or `lane()`, for each item of a list and each row of a table."""
    document = ROOT / "fleet_worker" / "README.md"
    for item in re.split(r"\n(?=\d\. |\| |\n)", documents.prose(document.read_text("utf-8"))):
        linked = "".join((document.parent / name).read_text("utf-8") for name in re.findall(r"\(([\w/]+\.py)\)", item))
        for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?|\w+\(\))`", item) if linked else ():
            for word in name.removesuffix("()").split("."):
                assert re.search(rf"^ *(?:(?:async )?def|class) {word}\b|^{word}\b.* = ", linked, re.MULTILINE), (
                    f"{name}: {item}"
                )


# --- Snippets


@EACH
def test_python_snippets_use_what_there_is(path):
    for code in documents.snippets(path.read_text("utf-8"), "python"):
        compile(code, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for line in ast.parse(code).body:
            if isinstance(line, ast.ImportFrom):
                module = importlib.import_module(line.module)
                assert all(hasattr(module, name.name) for name in line.names)
        assert all(hasattr(Registry, name) for name in re.findall(r"\brouter\.registry\.(\w+)", code))
        assert all(hasattr(Router, name) for name in re.findall(r"\brouter\.(\w+)", code))


@EACH
def test_toml_snippets_are_configurations(path, tmp_path, monkeypatch):
    file = tmp_path / "snippet.toml"
    monkeypatch.setenv("FLEET_CONFIG", str(file))
    for code in documents.snippets(path.read_text("utf-8"), "toml"):
        file.write_text(code, "utf-8")
        Settings()


# --- Commands


@EACH
def test_every_command_can_be_called_so(path):
    for (program, *words), whole in documents.commands(path.read_text("utf-8")):
        if program == "fleet-worker":
            check(cli, words, whole=whole)
        elif program == "celery" and "flower" in words:
            known = {option.replace("_", "-") for option in flower_options._options}
            for option in words[words.index("flower") + 1 :]:
                assert option.removeprefix("--").partition("=")[0].replace("_", "-") in known, option
        elif program == "celery":
            check(celery_command, words, whole=False)
        elif program == "pip":
            extras = {extra for names in re.findall(r"\[([\w,]+)\]", " ".join(words)) for extra in names.split(",")}
            assert extras <= PROJECT["optional-dependencies"].keys(), words
        elif program == "python" and words[:1] == ["-m"]:
            assert importlib.util.find_spec(words[1]), words
        elif program in ("cp", "docker", "pytest"):
            named = [word for word in words if re.match(r"(config|docker|tests)/", word) and not word.endswith("/.env")]
            assert all((ROOT / word).exists() for word in named), words


def check(command, words, *, whole):
    """Parse words as this command would. If they are not the whole command, arguments may be missing."""
    if words in (["--version"], ["--help"]):
        return
    while words and isinstance(command, click.Group):
        context = command.make_context(command.name, list(words))
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    if whole:
        command.make_context(command.name, list(words))
    else:
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} - {"-"} <= options, words


# --- Settings


def test_the_manual_of_settings_shows_each_with_its_default():
    """`python -m tests.documents` prints the tables as they have to be."""
    text = text_of("config/README.md")
    for heading, rows in documents.settings_tables().items():
        section = re.split(r"^## ", text.split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
        assert rows in section, heading


def test_the_manual_of_settings_shows_what_each_server_does_with_a_parameter():
    section = text_of("config/README.md").split("\n## Parameters of a chat\n")[1]
    assert documents.parameters_table() in section


@EACH
def test_a_setting_that_is_named_exists_and_its_default_is_right(path):
    """As in `router.lost_after` (5 s), and in FLEET_ROUTER__TIMEOUT."""
    text = re.sub(r"`(worker|router)\.toml`|`registry\.publish_\w+`", "", path.read_text("utf-8"))
    for group, name, value in re.findall(
        r"`(router|worker|registry|gateway)\.(\w+)`(?:(?: \(|, )([\d.]+)(?: s\b|\)))?", text
    ):
        settings = getattr(Settings(), group)
        assert name in type(settings).model_fields, f"{group}.{name}"
        assert not value or float(value) == getattr(settings, name), f"{group}.{name}"
    for variable in re.findall(r"FLEET_[A-Z]\w+", text):
        if variable not in READ_ELSEWHERE:
            fields, model = variable.lower().removeprefix("fleet_").split("__"), Settings
            if fields[0] == "instances":
                fields, model = fields[2:], Instance
            for field in fields:
                assert field in model.model_fields, variable
                model = model.model_fields[field].annotation


# --- Tables and lists


def test_the_manual_of_the_operator_knows_every_exit_code():
    text = text_of("config/operating.md")
    codes = {row[0] for row in documents.tables(text, "Exit codes")[0]} | {"3"}
    assert codes == {str(code) for name, code in vars(exit_codes).items() if name.isupper()} | {"0", "2"}
    assert "exits with 0 if it runs, 3 if not" in text


def test_the_manual_of_the_operator_knows_every_key_and_status_of_the_status():
    instance = InstanceStatus(host="mini-7", name="local", node="local@mini-7", status="available")
    offered = Offered(model="m", capabilities=(), features=(), limits={}, ready=True, instance=instance)
    lane = LaneStatus("llm.fleet.chat.m", depth=0, oldest_age=None, nodes=1, unserved=False)
    printed = Snapshot([instance], [offered], [lane], taken_at=0.0).as_json()
    keys, statuses = documents.tables(text_of("config/operating.md"), "status")
    assert {codes(row[0])[0]: codes(row[1]) for row in keys} == {name: list(rows[0]) for name, rows in printed.items()}
    assert [codes(row[0])[0] for row in statuses] == list(STATUSES)


def test_the_manual_of_the_operator_quotes_the_advice_of_doctor_as_it_is():
    rooms = [ROOT / "fleet_worker" / room for room in ("ops", "broker")]
    code = "".join(path.read_text("utf-8") for room in rooms for path in room.glob("*.py"))
    advice = re.findall(r"^ {4}(?:error|warning) .* -> (.*)$", text_of("config/operating.md"), re.MULTILINE)
    assert len(advice) == 5
    assert all(each in code for each in advice)


def test_the_manual_of_the_router_s_author_knows_every_error():
    named = {
        name
        for row in documents.tables(text_of("fleet_worker/router/README.md"), "Errors")[0]
        for name in codes(row[0])
    }
    assert named == set(errors.__all__) - {"FleetError"}


def test_the_manual_of_the_router_s_author_knows_every_option():
    rows = documents.tables(text_of("fleet_worker/router/README.md"), "Options")[0]
    assert {name for row in rows for name in codes(row[0])} == RequestOptions.__annotations__.keys()


def test_the_manual_of_the_router_s_author_names_every_field_of_a_body():
    listed = re.search(r"Body fields of a chat: (.*?)\.\s", text_of("fleet_worker/router/README.md"), re.DOTALL)
    assert set(codes(listed[1])) == ChatParams.model_fields.keys() - {"messages"}


def test_the_manual_of_prometheus_knows_every_metric():
    declared = set(re.findall(r"\"(fleet_\w+)\"", text_of("fleet_worker/registry/prometheus.py")))
    rows = documents.tables(text_of("docker/README.md"), "Prometheus")[0]
    named = {name.removesuffix("_total") for row in rows for name in codes(row[0])}
    assert named - {"fleet_info"} == declared


def test_the_manual_of_the_gateway_knows_every_metric():
    declared = set(re.findall(r"\"(fleet_gateway_\w+)\"", text_of("fleet_worker/gateway/metrics.py")))
    rows = documents.tables(text_of("fleet_worker/gateway/README.md"), "Metrics")[0]
    assert {codes(row[0])[0].removesuffix("_total") for row in rows} == declared


def test_the_manual_of_the_gateway_knows_every_setting_of_a_key():
    rows = documents.tables(text_of("fleet_worker/gateway/README.md"), "Keys")[0]
    assert {name for row in rows for name in codes(row[0])} == Key.model_fields.keys() - {"name"}


def test_the_architecture_shows_the_rows_of_the_import_contract():
    contract = PROJECT_FILE["tool"]["importlinter"]["contracts"][0]["layers"]
    (rows,) = documents.snippets(text_of("fleet_worker/README.md"), "text")
    assert rows.splitlines() == contract


def test_the_architecture_shows_every_room():
    rooms = {path.parent.name + "/" for path in (ROOT / "fleet_worker").glob("*/__init__.py")}
    rows = documents.tables(text_of("fleet_worker/README.md"), "Rooms, and which may import which")[0]
    assert {re.match(r"\[(.*)\]\(", row[0])[1] for row in rows} == rooms


def codes(cell):
    return re.findall(r"`([^`]+)`", cell)


# --- README.md, CHANGELOG.md


def test_the_readme_introduces_and_no_more():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 200
    demo, tests = re.findall(r"^ {4}(python3 -m venv .*)$", text, re.MULTILINE)  # .ci/run reads the second
    assert demo.endswith(".venv/bin/fleet-worker demo")
    assert ".venv/bin/pytest" in tests
    assert len(re.findall(r"^\s*python3 -m venv", text, re.MULTILINE)) == 2


def test_the_command_that_runs_the_tests_is_the_same_everywhere():
    """`.ci/run` reads that of README.md."""
    found = {
        line.strip()
        for name in ("README.md", "tests/README.md", ".github/CONTRIBUTING.md")
        for line in re.findall(r"^ *python3 -m venv .*pytest.*$", text_of(name), re.MULTILINE)
    }
    assert len(found) == 1


def test_the_changelog_has_this_version():
    assert f"## [{VERSION}]" in text_of(".github/CHANGELOG.md")
