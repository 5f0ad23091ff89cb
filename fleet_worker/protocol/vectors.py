"""The vectors of an embedding, checked, and as they travel: base64 of little-endian float32."""

from __future__ import annotations

import base64
import sys
from array import array


def pack_vector(vector: array[float]) -> str:
    """Return the float32 of this array (which may be changed by it) as they travel."""
    if sys.byteorder == "big":
        vector.byteswap()
    return base64.b64encode(vector).decode("ascii")


def unpack_vector(text: str) -> array[float]:
    """Raises `ValueError` for what is not base64 of whole float32."""
    vector = array("f", base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        vector.byteswap()
    return vector
