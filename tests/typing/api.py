"""Never run: what a user's type checker sees of the public names."""

from typing import Any, assert_type

from fleet_worker import ChatResponse, ChatStream, Delta, EmbedResponse, FleetError, Router, Settings, Timings, Usage


def sync_use(messages: list[dict[str, Any]]) -> None:
    with Router(Settings(broker_url="redis://127.0.0.1:6379/0")) as router:
        assert_type(router, Router)
        reply = router.chat(model="m", messages=messages, max_tokens=64, timeout=60)
        assert_type(reply, ChatResponse)
        assert_type(reply.content, str | None)
        assert_type(reply.reasoning, str | None)
        assert_type(reply.tool_calls, list[dict[str, Any]])
        assert_type(reply.finish_reason, str)
        assert_type(reply.usage, Usage)
        assert_type(reply.timings, Timings)
        assert_type(reply.node, str)
        with router.stream_chat(model="m", messages=messages) as stream:
            assert_type(stream, ChatStream)
            for delta in stream:
                assert_type(delta, Delta)
            assert_type(stream.response, ChatResponse)
        embedding = router.embed(model="e", input=["a", "b"])
        assert_type(embedding, EmbedResponse)
        assert_type(embedding.vectors, list[list[float]])


async def async_use(router: Router, messages: list[dict[str, Any]]) -> None:
    async with router.stream_chat("m", messages) as stream:
        async for delta in stream:
            assert_type(delta, Delta)
    assert_type(await router.achat("m", messages), ChatResponse)
    assert_type(await router.aembed("e", "a"), EmbedResponse)


def errors(error: FleetError) -> None:
    assert_type(error.retryable, bool)
    assert_type(error.code, str)
    assert_type(error.message, str)


def options(router: Router, messages: list[dict[str, Any]]) -> None:
    """mypy accepts what is right and refuses what is wrong: an ignore that is not needed is an error."""
    router.chat(
        "m",
        messages,
        timeout=60,
        priority="high",
        instance="local",
        node="local@mini-7",
        caller={"team": "search"},
        message_context={},
        trace_context={},
        idempotency_key="k",
        on_interrupt="fail",
        max_tokens=64,
        temperature=0.5,
        stop="END",
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="auto",
        response_format={"type": "json_object"},
        logit_bias={"5": 1},
        chat_template_kwargs={"enable_thinking": False},
    )
    router.stream_chat("m", messages, stop=["a", "b"], timeout=None)
    router.embed("e", "a", user="u", timeout=5, priority="low")

    router.chat("m", messages, max_token=64)  # type: ignore[call-overload]
    router.chat("m", messages, max_tokens="64")  # type: ignore[call-overload]
    router.chat("m", messages, priority="urgent")  # type: ignore[call-overload]
    router.chat("m", messages, on_interrupt="retry")  # type: ignore[call-overload]
    router.chat("m", messages, tool_choice="any")  # type: ignore[call-overload]
    router.chat("m", messages, chat_template_kwargs={"return_tensors": True})  # type: ignore[call-overload]
    router.stream_chat("m", messages, node=7)  # type: ignore[call-overload]
    router.embed("e", "a", temperature=0.5)  # type: ignore[call-overload]
    router.embed("e", "a", timeout="5")  # type: ignore[call-overload]


def bodies(router: Router, body: dict[str, Any]) -> None:
    """A body of OpenAI as a mapping, beside the options of the router."""
    assert_type(router.chat(body=body, timeout=60, priority="high"), ChatResponse)
    assert_type(router.chat("m", body=body), ChatResponse)
    assert_type(router.stream_chat(body=body, node="local@mini-7"), ChatStream)
    assert_type(router.embed(body=body, idempotency_key="k"), EmbedResponse)

    router.chat("m", [], body=body)  # type: ignore[call-overload]
    router.chat(body=body, temperature=0.5)  # type: ignore[call-overload]
    router.stream_chat(body="{}")  # type: ignore[call-overload]
    router.embed("e", "a", body=body)  # type: ignore[call-overload]
    router.chat("m")  # type: ignore[call-overload]


async def async_bodies(router: Router, body: dict[str, Any]) -> None:
    assert_type(await router.achat(body=body, caller={}), ChatResponse)
    assert_type(await router.aembed(body=body, queue_timeout=5), EmbedResponse)
    await router.achat(body=body, max_tokens=5)  # type: ignore[call-overload]


async def async_options(router: Router, messages: list[dict[str, Any]]) -> None:
    await router.achat("m", messages, seed=5, idempotency_key=None)
    await router.aembed("e", ["a"], instance="embed")
    await router.achat("m", messages, seeds=5)  # type: ignore[call-overload]
    await router.aembed("e", ["a"], max_tokens=5)  # type: ignore[call-overload]
