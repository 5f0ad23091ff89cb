"""Requests and answers as bytes: bounds, bodies, streams, and clients that leave. It knows no dialect.

In reading order: `http_protocol` with `http_refusals`, `browsers`, `request`, `departure`, `event_stream`, `response`.
"""
