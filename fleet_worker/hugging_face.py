"""Where the cache of huggingface_hub is. That package need not be installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def hub_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in which huggingface_hub keeps models, in a process with these variables; it may not exist."""
    named = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE")
    cache = variables.get("XDG_CACHE_HOME") or f"{variables.get('HOME') or '~'}/.cache"
    home = variables.get("HF_HOME") or f"{cache}/huggingface"
    # Path.expanduser would raise RuntimeError for the home of an unknown user, which huggingface_hub leaves as it is.
    return Path(os.path.expanduser(named or f"{home}/hub"))
