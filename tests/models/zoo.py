"""Tiny random models of many architectures, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from gradshield_fast import Direction

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_GROUPS = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_WITHOUT_FFN = {k: v for k, v in _NO_GROUPS.items() if k not in ("intermediate_size", "max_position_embeddings")}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "conv_kernel": 4, "pad_token_id": 0}


def _config(name: str, **values: object) -> Callable[[], PretrainedConfig] | None:
    """A configuration of an architecture, or None where the installed transformers is too old for it."""
    known = getattr(transformers, name, None)
    return None if known is None else lambda: known(**values)


_ALL: Mapping[str, Callable[[], PretrainedConfig] | None] = {
    "llama": _config("LlamaConfig", **_COMMON, attention_bias=True, mlp_bias=True),
    "llama-tied": _config("LlamaConfig", **_COMMON, tie_word_embeddings=True),
    "qwen2": _config("Qwen2Config", **_COMMON),
    "qwen3": _config("Qwen3Config", **_COMMON, head_dim=8),
    "gemma2": _config("Gemma2Config", **_COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
    "gemma3": _config("Gemma3TextConfig", **_COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
    "mistral": _config("MistralConfig", **_COMMON, sliding_window=8),
    "phi3": _config("Phi3Config", **_COMMON),
    "gpt2": _config("GPT2Config", **_GPT2),
    "gpt-neox": _config("GPTNeoXConfig", **_NO_GROUPS),
    "opt": _config("OPTConfig", **_WITHOUT_FFN, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16),
    "falcon": _config("FalconConfig", **_WITHOUT_FFN),
    "bloom": _config("BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "mixtral": _config("MixtralConfig", **_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _config(
        "Qwen3MoeConfig", **_COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mamba": _config("MambaConfig", **_MAMBA, state_size=4),
    "mamba2": _config(
        "Mamba2Config",
        **_MAMBA,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
        bos_token_id=1,
        eos_token_id=2,
    ),
}

ZOO = {name: config for name, config in _ALL.items() if config is not None}


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model with weights large enough that every one of them matters."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(ZOO[name]()).to(dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64, so autograd could not answer
    for key, weight in model.named_parameters():
        scale_of_one = weight.ndim == 1 and "norm" in key and key.endswith("weight")
        weight.data.normal_(0, 0.3 if weight.ndim > 1 else 0.2).add_(float(scale_of_one))
    return model


def direction_over(model: torch.nn.Module, seed: int = 0, *, pattern: str = "") -> Direction:
    """A random dense direction on every weight whose name holds a pattern."""
    generator = torch.Generator().manual_seed(seed)
    return Direction(
        {
            name: torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
            for name, weight in model.named_parameters()
            if pattern in name
        }
    )


def rows_of(
    lengths: list[int], *, seed: int = 0, side: str = "right", width: int | None = None
) -> dict[str, torch.Tensor]:
    """Padded rows of random tokens, with a loss on all but the first few tokens of each."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    batch = {
        "input_ids": torch.zeros(len(lengths), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "labels": torch.full((len(lengths), width), -100),
    }
    for row, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        at = slice(0, length) if side == "right" else slice(width - length, width)
        batch["input_ids"][row, at] = ids
        batch["attention_mask"][row, at] = 1
        prompt = min(length - 1, 1 + row % 4)
        batch["labels"][row, at] = torch.cat([torch.full((prompt,), -100), ids[prompt:]])
    return batch


def row(batch: Mapping[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """One row of a batch on its own, without its padding."""
    real = batch["attention_mask"][n].bool()
    return {key: value[n : n + 1, real] for key, value in batch.items()}
