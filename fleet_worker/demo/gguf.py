"""Converts a Llama model in a GGUF file to the folder that `mlx_lm` loads: weights, configuration and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GROUP_SIZE = 32
BITS = 4
EMBEDDING_BITS = 8
CONTROL_TOKEN = 3


def convert(gguf: Path, folder: Path, *, quantised: bool) -> None:
    """Write the model in `gguf` as a folder of safetensors, configuration and tokenizer."""
    import mlx.core as mx

    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = loaded
    weights = _widened(_weights(tensors, metadata))
    if not quantised:
        weights = _dequantised(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    special = {key: int(metadata[f"tokenizer.ggml.{key}_token_id"]) for key in ("bos", "eos", "padding", "unknown")}
    ids = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
    _write_json(folder / "config.json", _llama_config(metadata, quantised=quantised) | ids)
    _write_json(folder / "generation_config.json", ids)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, special))
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))


def _weights(tensors: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors under the names and in the row order that MLX expects."""
    heads = {
        "attn_q": int(metadata["llama.attention.head_count"]),
        "attn_k": int(metadata["llama.attention.head_count_kv"]),
    }
    weights = {}
    for name, tensor in tensors.items():
        *layer, part, kind = name.split(".")  # blk.0.attn_q.weight, output_norm.weight
        prefix = f"model.layers.{layer[1]}." if layer else ""
        rows = _unpermuted(tensor, heads[part]) if part in heads else tensor
        weights[f"{prefix}{TENSOR_NAMES[part]}.{kind}"] = rows
    return weights


def _unpermuted(tensor: Any, heads: int) -> Any:
    """Undo GGUF's order of rotary rows: it interleaves the two halves of each head, MLX keeps them apart."""
    rows, *rest = tensor.shape
    return tensor.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _widened(weights: dict[str, Any]) -> dict[str, Any]:
    """Return float16 as float32: hidden states of this model reach 25,000, for which float16 is too coarse."""
    import mlx.core as mx

    return {name: t.astype(mx.float32) if t.dtype == mx.float16 else t for name, t in weights.items()}


def _dequantised(weights: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx

    def plain(path: str) -> Any:
        weight, scales, biases = f"{path}.weight", f"{path}.scales", f"{path}.biases"
        if scales not in weights:  # a norm
            return weights[weight]
        return mx.dequantize(weights[weight], weights[scales], weights[biases], group_size=GROUP_SIZE, bits=_bits(path))

    return {name: plain(name.removesuffix(".weight")) for name in weights if name.endswith(".weight")}


def _bits(path: str) -> int:
    return EMBEDDING_BITS if path == TENSOR_NAMES["token_embd"] else BITS


def _llama_config(metadata: dict[str, Any], *, quantised: bool) -> dict[str, Any]:
    embedding = TENSOR_NAMES["token_embd"]
    quantisation = {
        "group_size": GROUP_SIZE,
        "bits": BITS,
        embedding: {"group_size": GROUP_SIZE, "bits": _bits(embedding)},
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": int(metadata["llama.embedding_length"]),
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": int(metadata["llama.attention.head_count"]),
        "num_key_value_heads": int(metadata["llama.attention.head_count_kv"]),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "rms_norm_eps": 1e-5,  # in the metadata it is rounded to float32
        "tie_word_embeddings": True,
        "vocab_size": int(metadata["llama.vocab_size"]),
        **({"quantization": quantisation} if quantised else {"torch_dtype": "float32"}),
    }


def _tokenizer_config(metadata: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[special["bos"]],
        "eos_token": tokens[special["eos"]],
        "pad_token": tokens[special["padding"]],
        "unk_token": tokens[special["unknown"]],
        "model_max_length": int(metadata["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _tokenizer(metadata: dict[str, Any]) -> Any:
    """Return the byte-level BPE that the metadata describes; as SmolLM2's own, it splits numbers into digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
