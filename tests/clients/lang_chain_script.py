"""LangChain against a gateway."""

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from script import KEY, MODELS, URL, run

asked = []


class Place(BaseModel):
    city: str


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    asked.append(city)
    return "rain"


def model(role="text", **options):
    return ChatOpenAI(model=MODELS[role], base_url=URL, api_key=KEY, max_retries=0, **options)


def chat():
    return _answer(model())


def chat_stream():
    return _streamed(model(stream_usage=True))


def chat_object():
    return _object(model("json"))


def chat_tools():
    return _with_tools(model("langchain"))


def responses():
    return _answer(model(use_responses_api=True))


def responses_stream():
    return _streamed(model(use_responses_api=True))


def responses_object():
    return (
        model("json", use_responses_api=True).with_structured_output(Place, method="json_schema").invoke("Where?").city
    )


def responses_tools():
    return _with_tools(model("langchain", use_responses_api=True))


def responses_stream_and_tools():
    return _with_tools(model("langchain", use_responses_api=True, output_version="v1"), streamed=True)


def _answer(chat):
    message = chat.invoke("Say hello.", max_tokens=20)
    assert message.usage_metadata["output_tokens"] > 0
    return message.text


def _object(chat):
    return chat.with_structured_output(Place, method="json_schema").invoke("Where?").city


def _streamed(chat):
    whole = None
    for chunk in chat.stream("Say hello."):
        whole = chunk if whole is None else whole + chunk
    assert whole.text
    assert whole.usage_metadata["output_tokens"] > 0
    return whole.text


def _with_tools(chat, streamed=False):
    asked.clear()
    agent = create_agent(chat, [weather])
    question = {"messages": [("user", "Weather?")]}
    if streamed:
        last = [piece for piece, _ in agent.stream(question, stream_mode="messages")][-1]
        said = "the end of a stream" if last else ""
    else:
        said = agent.invoke(question)["messages"][-1].text
    assert asked, "the tool was not called"
    assert said
    return f"weather of {asked}: {said}"


tool_checks = [chat_tools, responses_tools, responses_stream_and_tools] if "langchain" in MODELS else []
json_checks = [chat_object, responses_object] if "json" in MODELS else []
run(chat, chat_stream, responses, responses_stream, *json_checks, *tool_checks)
