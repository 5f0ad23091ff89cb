"""Finds models for MLX servers in the local Hugging Face cache, without mlx and huggingface_hub."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fleet_worker.hugging_face import hub_folder
from fleet_worker.mlx.model_folder import cached_folder_of, text_of
from fleet_worker.mlx.offering import embeds

SHARE_OF_MEMORY = 2 / 3
"""Of the memory of a Mac, its GPU may use that much, or three quarters from 64 GB on."""
BESIDE_WEIGHTS = 1.15
"""Memory of a server, prompt cache included, for each byte of weights; and `LEAST_BESIDE` besides."""
LEAST_BESIDE = 1_000_000_000
_FOREIGN = {"gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "hqq", "aqlm"}
"""Quantisations of other software, which MLX servers do not load."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose files are all here. `size` is the bytes of its weights, which is about the memory that it takes."""

    name: str
    """As in mlx-community/Qwen3-14B-4bit."""
    kind: Literal["chat", "embedding"]
    size: int

    @property
    def memory(self) -> int:
        """Bytes that a server needs for it, about."""
        return int(self.size * BESIDE_WEIGHTS) + LEAST_BESIDE


def local_models(hub: Path | None = None) -> list[LocalModel]:
    """Return the models in the cache (default: the one that HF_HOME or HF_HUB_CACHE names), the largest first.

    Only complete ones that MLX servers can load: a `config.json`, a tokenizer and all files of weights.
    """
    hub = hub or hub_folder()
    names = [each.name.removeprefix("models--").replace("--", "/") for each in _folders(hub)]
    found = [model for name in names if (model := _model(name, cached_folder_of(name, hub)))]
    return sorted(found, key=lambda model: (-model.size, model.name))


def that_fits(models: Sequence[LocalModel], memory: int) -> LocalModel | None:
    """Return the largest chat model that a host with so many bytes of memory can serve; None if there is none."""
    fitting = [each for each in models if each.kind == "chat" and each.memory <= memory * SHARE_OF_MEMORY]
    return max(fitting, key=lambda model: model.size, default=None)


def _folders(hub: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(hub.glob("models--*"))
    return []


def _model(name: str, folder: Path) -> LocalModel | None:
    config = _json(folder / "config.json")
    size = _size(folder)
    if not config or not size or not _loadable(config):
        return None
    kind = _kind(name, folder, config)
    return LocalModel(name, kind, size) if kind else None


def _json(file: Path) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(text_of(file) or "{}")
        return found if isinstance(found, dict) else {}
    return {}


def _size(folder: Path) -> int:
    """Return the bytes of the weights; 0 if a file of them is missing. A download makes each link when it is done."""
    with suppress(OSError):
        files = set(_weights(folder))
        return sum(file.stat().st_size for file in files)
    return 0


def _weights(folder: Path) -> Iterator[Path]:
    index = _json(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict):
        yield from (folder / Path(str(name)).name for name in index.values())
        return
    for file in folder.glob("model*.safetensors"):
        yield file
        if shard := _SHARD.search(file.name):  # its index is not here yet
            number, total = shard.groups()
            for each in range(1, min(int(total), 1000) + 1):
                last = f"-{each:0{len(number)}}-of-{total}.safetensors"
                yield folder / _SHARD.sub(last, file.name)


def _loadable(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method not in _FOREIGN


def _kind(name: str, folder: Path, config: dict[str, Any]) -> Literal["chat", "embedding"] | None:
    """Return what it is for: nothing for a draft without a tokenizer, a base model, speech, pictures, a reranker."""
    tokenizers = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt")
    if "rerank" in name.lower() or not any((folder / each).is_file() for each in tokenizers):
        return None
    if embeds(name) or (folder / "modules.json").is_file() or (folder / "1_Pooling").is_dir():
        return "embedding"
    architectures = config.get("architectures")
    last = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    is_text = last.endswith("ForCausalLM") or (last.endswith("ForConditionalGeneration") and _is_known(config))
    return "chat" if is_text and _has_chat_template(folder) else None


def _has_chat_template(folder: Path) -> bool:
    files = ("chat_template.jinja", "chat_template.json")
    return any((folder / each).is_file() for each in files) or bool(
        _json(folder / "tokenizer_config.json").get("chat_template")
    )


def _is_known(config: dict[str, Any]) -> bool:
    """Tell whether the mlx_lm of this Python has this kind of model: of those with pictures it loads some."""
    spec = importlib.util.find_spec("mlx_lm")
    kind = str(config.get("model_type"))
    places = spec.submodule_search_locations if spec else None
    return bool(kind.isidentifier() and places and (Path(next(iter(places))) / "models" / f"{kind}.py").is_file())
