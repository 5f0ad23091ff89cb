"""Requests and answers as bytes: bounds, bodies, streams, and clients that leave.

In reading order: `http_protocol` with `http_refusals` and `silent_clients`, `request`, `browsers`, `departure`,
`response`, `event_stream`.

Of dialects it knows the `Writer` of a stream. What is no valid HTTP is refused in the form of OpenAI: no path tells
which API the client speaks.
"""
