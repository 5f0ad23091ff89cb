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
