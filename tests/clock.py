"""A clock that only moves when a test sets it."""


class Clock:
    """Call it for its time: seconds."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now
