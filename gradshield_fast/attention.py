"""An attention of our own for models of transformers: rows kept apart by `cu_seqlens`, so that they need no padding.

Models that look their attention function up by name (`config._attn_implementation`) are given ours for the scope of a
scorer; it takes rows packed in one line, or padded ones, and calls `ops.varlen_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradshield_fast.errors import ScoringError
from gradshield_fast.ops.varlen_attention import varlen_attention

NAME = "gradshield_fast"
_REFUSED = ("position_bias", "s_aux", "sinks")


def lengths(cu_seqlens: torch.Tensor, longest: int) -> dict[str, Any]:
    """Say where rows begin and end, under the names that models of transformers pass on to their attention.

    Args:
        cu_seqlens: Int32[Tensor, "rows+1"].
        longest: tokens of the longest row.

    Returns:
        Keyword arguments for the model.
    """
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def why_not(model: torch.nn.Module) -> str | None:
    """Say why a model cannot be given another attention.

    Args:
        model: a model of transformers, or a PEFT model around one.

    Returns:
        The reason, or None where it can be tried; whether the scores stay the same is for calibration to see.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    if not getattr(base, "_supports_attention_backend", False):
        return "its attention cannot be replaced (it does not look it up by name)"
    try:
        _register()
    except ImportError:
        return "this version of transformers cannot take another attention; 4.53 and later can"
    return None


@contextmanager
def replaced(model: torch.nn.Module, name: str = NAME) -> Iterator[None]:
    """Run a model with our attention, or another one that it knows by name, and give its own back.

    Args:
        model: a model for which `why_not` had nothing to say.
        name: `NAME`, or a name of transformers' own, as "sdpa".

    Yields:
        Nothing.
    """
    _register()
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config in configs.values():
            # not set_attn_implementation, which asks a hub for names that it does not know
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Rows are kept apart, and what comes later hidden, by the attention itself."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row; the signature is that of transformers' attention functions.

    Args:
        module: the attention layer.
        query: Float[Tensor, "rows heads tokens d"].
        key: Float[Tensor, "rows kv_heads tokens d"].
        value: Float[Tensor, "rows kv_heads tokens d"].
        attention_mask: must be None.
        scaling: factor on the scores; None: 1 / sqrt(d).
        dropout: must be 0: models are scored in evaluation mode.
        sliding_window: positions that a query sees, itself included; None: all before it.
        softcap: bound on the scores.
        is_causal: must not be False.
        kwargs: `cu_seq_lens_q` where rows are packed; whatever else the model passes is not looked at, unless it
            would change the result.

    Returns:
        Float[Tensor, "rows tokens heads d"], and None for the weights.

    Raises:
        ScoringError: the layer asks for something that this attention does not do.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    odd = [name for name in _REFUSED if kwargs.get(name) is not None]
    if attention_mask is not None or not causal or dropout or odd or value.shape[-1] != query.shape[-1]:
        raise ScoringError(f"{type(module).__name__} asks for more than causal attention: {odd or 'mask or shapes'}")
    rows, heads, tokens, d = query.shape
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=query.device)
    # views where the layer made heads out of one product's columns, as they all do
    q, k, v = (x.transpose(1, 2).reshape(rows * tokens, -1, d) for x in (query, key, value))
    out = varlen_attention(q, k, v, cu_seqlens, scale=scaling, window=sliding_window, softcap=softcap)
    return out.view(rows, tokens, heads, d), None
