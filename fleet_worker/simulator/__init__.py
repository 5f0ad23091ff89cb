"""A simulated MLX server for tests: real sockets, paced tokens, text that a test can compute, scripted faults,
and exact counts of what it received and sent. It imports nothing of the package.

In this process, on a thread of its own:

    with SimulatedMLX(flavour="mlx_lm", models=["sim-chat"], ttft=0.02, token_interval=0.005) as server:
        httpx.post(f"{server.base_url}/v1/chat/completions", json={...})

or as a process, which prints its address as one line of JSON and ends on SIGTERM:

    python -m fleet_worker.simulator --flavour mlx_lm --model sim-chat --ttft 0.02

Its prompt cache is that of mlx_lm.server 0.32: ten sequences (`prompt_cache_size`), of which any beginning can be used
(or only whole ones, `trimmable=False`); `usage` tells how much of a prompt was cached, and with a `prefill_rate` only
the rest takes time. A token is a word or a marker of the chat template. `forget()` empties the cache.

With `leak` (`--leak 50000000`) every chat or embedding leaves so many bytes in its memory, for tests of `max_memory`.

In reading order: server, machine, chats, scripts, texts, prompts, prompt_cache, flavours, servers, refusals, replies,
manners, chunks, answers.
"""

from fleet_worker.simulator.flavours import Flavour
from fleet_worker.simulator.machine import Request
from fleet_worker.simulator.replies import Fault
from fleet_worker.simulator.server import SimulatedMLX
from fleet_worker.simulator.servers import FLAVOURS
from fleet_worker.simulator.texts import CHAT_TEMPLATE, embedding, reply_tokens

__all__ = ["CHAT_TEMPLATE", "FLAVOURS", "Fault", "Flavour", "Request", "SimulatedMLX", "embedding", "reply_tokens"]
