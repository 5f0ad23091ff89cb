"""How fast an MLX server is when it has one request to serve, measured from all that it serves."""

from __future__ import annotations

from fleet_worker.mlx.chat_stream import ChatAnswer

READ, READ_SECONDS = 256, 1.0
"""Tokens of a prompt that must be read for the time to tell a speed, or seconds that fewer must take: otherwise
everything else takes about as long."""
FEW = 16
"""Tokens that tell nothing."""
ANSWER_SECONDS = 0.5
"""From the first token of an answer to its last. Tokens that come together tell nothing."""
DECAY = 0.1
"""How much of the difference a slower request takes from the peak."""
MOST = 1e6
"""Tokens per second that are believed at most."""


class Speeds:
    """Of prefill and of decode, in tokens per second; None until they were measured."""

    def __init__(self) -> None:
        self._prefill, self._decode = PeakSpeed(), PeakSpeed()

    @property
    def prefill(self) -> float | None:
        return self._prefill.value

    @property
    def decode(self) -> float | None:
        """Of a stream that runs alone."""
        return self._decode.value

    def learn(self, answer: ChatAnswer, read: int, *, read_alone: bool, alone: bool) -> None:
        """Learn from an answer. `read` is how many tokens of its prompt were not cached; `read_alone` and `alone` tell
        whether no other request ran before its first token, and until its end."""
        takes_long = read_alone and (answer.ttft or 0.0) >= READ_SECONDS and read >= FEW
        if answer.ttft and (read >= READ or takes_long):
            self._prefill.measured(read, answer.ttft, alone=read_alone)
        speed, generated = answer.tokens_per_second, answer.usage.completion_tokens or 0
        if speed and generated >= max(FEW, ANSWER_SECONDS * speed):
            self._decode.measured(speed, 1.0, alone=alone)


class PeakSpeed:
    """The highest speed of late, in tokens per second. A request that shared the server proves only that it is at least
    as fast; slower ones that had it for themselves lower the peak step by step."""

    def __init__(self) -> None:
        self.value: float | None = None
        """None until something was measured."""

    def measured(self, tokens: float, seconds: float, *, alone: bool) -> None:
        speed = min(MOST, tokens / seconds)
        if self.value is None or speed > self.value:
            self.value = speed
        elif alone:
            self.value += DECAY * (speed - self.value)
