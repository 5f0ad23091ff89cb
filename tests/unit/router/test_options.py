"""The typed options are those that the router takes: not more, not fewer, and of the same types."""

import inspect
from typing import get_type_hints

import pytest

from fleet_worker.protocol.openai import ChatParams, ChatTemplateKwargs, EmbedParams
from fleet_worker.router.options import ChatOptions, ChatTemplateOptions, EmbedOptions, RequestOptions
from fleet_worker.router.submission import Submission

ARGUMENTS = {"messages", "input"}
"""Fields of a body that are arguments of their own."""
WIDER = {"stop": str | list[str] | None, "chat_template_kwargs": ChatTemplateOptions | None}
"""Options that take more than their fields do: one text for a list of one, a dict for a model."""


@pytest.mark.parametrize(
    ("options", "model"),
    [(ChatOptions, ChatParams), (EmbedOptions, EmbedParams), (ChatTemplateOptions, ChatTemplateKwargs)],
    ids=lambda kind: kind.__name__,
)
def test_every_field_of_a_body_is_an_option_of_the_same_type(options, model):
    fields = {name: hint for name, hint in get_type_hints(model).items() if name in model.model_fields}
    own = get_type_hints(RequestOptions)
    given = {name: hint for name, hint in get_type_hints(options).items() if name not in own}
    assert given == {name: WIDER.get(name, hint) for name, hint in fields.items() if name not in ARGUMENTS}


def test_the_other_options_are_those_of_a_request():
    parameters = inspect.signature(Submission._checked, eval_str=True).parameters.values()
    taken = {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert get_type_hints(RequestOptions) == taken


def test_no_option_is_required():
    assert not ChatOptions.__required_keys__ | EmbedOptions.__required_keys__ | ChatTemplateOptions.__required_keys__
