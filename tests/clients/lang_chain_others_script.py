"""LangChain's models of Anthropic and of Ollama against a gateway."""

from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama
from pydantic import BaseModel
from script import KEY, MODELS, URL, run

HOST = URL.removesuffix("/v1")
CALLER = MODELS.get("langchain-others")
asked = []


class Place(BaseModel):
    city: str


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    asked.append(city)
    return "rain"


def anthropic(model=MODELS["text"], **options):
    return ChatAnthropic(model=model, base_url=HOST, api_key=KEY, max_retries=0, max_tokens=200, **options)


def ollama(model=MODELS["text"], **options):
    headers = {"Authorization": f"Bearer {KEY}"}
    return ChatOllama(model=model, base_url=HOST, client_kwargs={"headers": headers}, **options)


def messages():
    return _answer(anthropic())


def messages_stream():
    return _streamed(anthropic())


def messages_object():
    return anthropic().with_structured_output(Place, method="json_schema").invoke("Where?").city


def messages_counted():
    return anthropic().get_num_tokens_from_messages([HumanMessage("Say hello.")])


def ollama_chat():
    return _answer(ollama(validate_model_on_init=True))


def ollama_stream():
    return _streamed(ollama())


def ollama_object():
    return ollama().with_structured_output(Place).invoke("Where?").city


def messages_tools():
    return _with_tools(anthropic(CALLER, thinking={"type": "enabled", "budget_tokens": 1024}))


def messages_stream_and_tools():
    return _with_tools(anthropic(CALLER, streaming=True))


def ollama_tools():
    return _with_tools(ollama(CALLER, reasoning=True))


def _answer(chat):
    message = chat.invoke("Say hello.")
    assert message.usage_metadata["output_tokens"] > 0
    return message.text


def _streamed(chat):
    whole = None
    for chunk in chat.stream("Say hello."):
        whole = chunk if whole is None else whole + chunk
    assert whole.text
    assert whole.usage_metadata["output_tokens"] > 0
    return whole.text


def _with_tools(chat):
    asked.clear()
    said = create_agent(chat, [weather]).invoke({"messages": [("user", "Weather?")]})["messages"][-1].text
    assert asked, "the tool was not called"
    assert said
    return f"weather of {asked}: {said}"


of_anthropic = [messages, messages_stream, messages_object, messages_counted]
of_ollama = [ollama_chat, ollama_stream, ollama_object]
with_tools = [messages_tools, messages_stream_and_tools, ollama_tools] if CALLER else []
run(*of_anthropic, *of_ollama, *with_tools)
