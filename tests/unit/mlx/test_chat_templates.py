"""How the chat template of a model is found, and changed so that it leaves the last turn open."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleet_worker.mlx.chat_templates import find_chat_template, with_open_last_turn
from fleet_worker.settings import Model

jinja = pytest.importorskip("jinja2.sandbox", reason="it comes with mlx-lm")

HELLO = [{"role": "user", "content": "Hello"}]
CHATML = (
    "{%- macro turn(message) %}<|{{ message.role }}|>{{ message.content | trim }}{% endmacro %}\n"
    "{%- if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}\n"
    "{% set space = namespace(last=messages | length) %}\n"
    "{% for message in messages %}\n{{ turn(message) }} {{ loop.index }} of {{ space.last }}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


# --- Open


ENVIRONMENT = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
"""As transformers has it for mlx_lm.server."""


def rendered(template, messages):
    return ENVIRONMENT.from_string(template).render(messages=messages, add_generation_prompt=True)


edges = st.lists(st.sampled_from(["\n", " ", "x", "{% if 1 %}", "{%- if 1 %}", "{# #}"]), max_size=5).map("".join)


def closed(text):
    return text + "{% endif %}" * text.count("if 1")


@given(before=edges, after=edges, partial=st.text(), system=st.booleans())
@example(before="\n", after="\n\n", partial=" {{ x }}\n", system=True)
@example(before="  {% if 1 %}\n", after=" \n", partial="set on", system=False)
def test_the_partial_text_stands_where_the_answer_begins(before, after, partial, system):
    template = closed(before) + CHATML + closed(after)
    messages = [{"role": "system", "content": "Be brief."}, *HELLO] if system else HELLO
    turn = {"role": "assistant", "content": partial}
    prompt = rendered(template, messages)
    assert rendered(with_open_last_turn(template), [*messages, turn]) == prompt + partial
    opened = with_open_last_turn(template, before_text="\n</think>\n\n")
    assert rendered(opened, [*messages, turn]) == prompt + "\n</think>\n\n" + partial


# --- Found


def of(backend, *, reported=(), tools=False, **model):
    found = find_chat_template(Model(**model), backend, reported)
    return found and (found.tool_use if tools else found.default)


def folder_with(folder, template="the template", **files):
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **files}), "utf-8")
    return folder


def test_the_settings_name_it(tmp_path):
    named = tmp_path / "named.jinja"
    named.write_text("named", "utf-8")
    folder = folder_with(tmp_path / "model")
    assert of(str(folder), chat_template=str(named)) == "named"
    assert of(str(folder), chat_template=str(tmp_path / "missing")) is None
    assert of("default_model", chat_template=str(folder)) == "the template"
    assert of("default_model", chat_template=str(tmp_path)) is None


def test_it_lies_in_the_folder_of_the_model(tmp_path):
    folder = folder_with(tmp_path / "model")
    assert of(str(folder)) == "the template"
    (folder / "chat_template.jinja").write_text("a file of its own", "utf-8")
    assert of(str(folder)) == "a file of its own"


def test_a_model_may_have_another_one_for_tools(tmp_path):
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    folder = folder_with(tmp_path / "model", both)
    assert (of(str(folder)), of(str(folder), tools=True)) == ("plain", "with tools")
    assert of(str(folder_with(tmp_path / "other", both[:1])), tools=True) == "plain"
    third = folder_with(tmp_path / "third", "plain")
    (third / "additional_chat_templates").mkdir()
    (third / "additional_chat_templates" / "tool_use.jinja").write_text("with tools", "utf-8")
    assert (of(str(third)), of(str(third), tools=True)) == ("plain", "with tools")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "HOME"])
def test_it_lies_in_the_hugging_face_cache(tmp_path, monkeypatch, variable):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    hub = tmp_path / {"HF_HUB_CACHE": "", "HF_HOME": "hub", "HOME": ".cache/huggingface/hub"}[variable]
    model = hub / "models--somebody--some-model"
    folder_with(model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc", "utf-8")
    assert of("somebody/some-model") == "the template"
    assert of("default_model", chat_template="somebody/some-model") == "the template"
    assert of("somebody/another-model") is None


def test_the_default_model_is_the_folder_that_its_server_reports(tmp_path):
    """mlx_lm.server lists cached models by name, and the model of its command line by its path."""
    folder = folder_with(tmp_path / "model")
    assert of("default_model", reported=["somebody/some-model", str(folder)]) == "the template"
    assert of("default_model", reported=["somebody/some-model"]) is None
    assert of("default_model") is None


@pytest.mark.parametrize(
    "config", ["", "[]", "{", "{}", '{"chat_template": 5}', '{"chat_template": [5]}', '{"chat_template": null}']
)
def test_a_model_may_have_none(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_text(config, "utf-8")
    assert of(str(tmp_path)) is None


def test_templates_that_are_code_are_none(tmp_path):
    assert of(str(folder_with(tmp_path / "model", chat_template_type="deepseek_v32"))) is None


def test_no_file_is_read_because_a_server_names_it(tmp_path):
    """It would be sent to that server as a template. And /dev/zero never ends."""
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    for name in (str(secret), "/dev/zero", "/dev/stdin"):
        assert of(name) is None
        assert of("default_model", reported=[name]) is None
    assert of("mine", chat_template=str(secret)) == "secret"


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 256, "/" + "a" * 300, "a\0b", "/", ".."])
def test_a_name_that_cannot_be_a_path_has_no_template(name):
    assert of(name) is None
    assert of("default_model", reported=[name]) is None
    assert of("mine", chat_template=name) is None
