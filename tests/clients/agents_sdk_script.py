"""OpenAI's Agents SDK against a gateway."""

import asyncio

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from script import KEY, MODELS, URL, run

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
asked = []


class Place(BaseModel):
    city: str


@function_tool
def weather(city: str) -> str:
    """Tells the weather."""
    asked.append(city)
    return "rain"


def agent(kind, role="text", **options):
    return Agent(name="A", instructions="Be brief.", model=kind(model=MODELS[role], openai_client=client), **options)


def responses():
    return Runner.run_sync(agent(OpenAIResponsesModel), "Say hello.").final_output


def responses_object():
    return (
        Runner.run_sync(agent(OpenAIResponsesModel, "json", output_type=Place), "Where?")
        .final_output_as(Place, True)
        .city
    )


def two_turns():
    first = Runner.run_sync(agent(OpenAIResponsesModel), "Say hello.")
    then = [*first.to_input_list(), {"role": "user", "content": "And once more."}]
    return Runner.run_sync(agent(OpenAIResponsesModel), then).final_output


def responses_stream_and_tools():
    return asyncio.run(_streamed(OpenAIResponsesModel))


def chat_stream_and_tools():
    return asyncio.run(_streamed(OpenAIChatCompletionsModel))


async def _streamed(kind):
    asked.clear()
    async with AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as own:
        model = kind(model=MODELS["agents-sdk"], openai_client=own)
        result = Runner.run_streamed(Agent(name="A", model=model, tools=[weather]), "Weather?")
        kinds = {event.type async for event in result.stream_events()}
    assert asked, "the tool was not called"
    assert result.final_output
    return f"weather of {asked}, {len(kinds)} kinds of events: {result.final_output}"


tool_checks = [responses_stream_and_tools, chat_stream_and_tools] if "agents-sdk" in MODELS else []
json_checks = [responses_object] if "json" in MODELS else []
run(responses, two_turns, *json_checks, *tool_checks)
