"""Which attention is fastest on a device for rows as long as those at hand: timed once, kept on disk (measured.py).

Flash attention is ours on a GPU already, with its backward pass in one order. sdpa's sums by atomics there, so that two
runs would not give the same bits: it is left out. Flex attention does not run: on a CPU it has no backward pass, and on
a GPU it would be compiled anew for every batch that a run may never see again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gradshield_fast.attention import NAME
from gradshield_fast.batches import PaddedBatch
from gradshield_fast.ops import measured
from gradshield_fast.ops.varlen_attention import varlen_attention

OP = "attention"
"""The measurement's name, under which a preference may be kept too."""

NAMES = (NAME, "sdpa", "eager")
"""Who runs: ours, and two that every model of transformers knows which can be replaced at all."""

TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of the trial, about a batch's: fewer would time a GPU's launches. Rows that are longer make one row."""

SMALL = 1e6
"""Multiplications of one layer's scores below which no attention is worth a trial."""

EAGER_MOST = 2048
"""Tokens of a row beyond which eager attention, which keeps every score, is left out."""

GAIN = 0.2
"""Share of our attention's time that another must save: it would bring padding back."""


def fastest(model: torch.nn.Module, batch: PaddedBatch) -> str:
    """Time one layer's attention, forward and backward, for the model's heads and rows as long as a batch's are.

    Args:
        model: a model whose attention can be replaced.
        batch: the first batch to be scored.

    Returns:
        One of `NAMES`, as models of transformers know them: a person's preference, else the fastest; ours where the
        model's configuration does not tell its heads, or too little is to be done for it to matter.
    """
    if (choice := measured.preferred(OP)) in NAMES:
        return choice
    weight, shape, squares = next(model.parameters()), _heads(model), batch.attention_mask.sum(1).double().square()
    if shape is None or weight.device.type not in ("cpu", "cuda"):
        return NAME
    heads, kv_heads, d = shape
    if float(squares.sum()) * heads * d < SMALL:
        return NAME
    # the next power of two above the mean, weighted by tokens: what most tokens see
    length = 1 << max(4, math.ceil(math.log2(float(squares.sum() / batch.attention_mask.sum()))))
    rows, generator = max(1, TOKENS[weight.device.type] // length), torch.Generator().manual_seed(0)
    q, dout, k, v = (
        torch.randn(rows, n, length, d, generator=generator).to(weight.device, weight.dtype)
        for n in (heads, heads, kv_heads, kv_heads)
    )
    ways = dict(zip(NAMES, (_by_rows, _sdpa, _eager), strict=True))
    if length > EAGER_MOST:
        del ways["eager"]
    if weight.device.type == "cuda":
        del ways["sdpa"]
    calls = {name: partial(_both, way, [q, k, v], dout) for name, way in ways.items()}
    if weight.device.type == "cpu":
        clock = measured.cpu_milliseconds
        return measured.fastest(OP, measured.processor(), [q, k], calls, clock, alike=[NAME], gain=GAIN)
    with torch.cuda.device(weight.device):
        about = torch.cuda.get_device_name(weight.device)
        return measured.fastest(OP, about, [q, k], calls, measured.gpu_milliseconds, gain=GAIN)


def _heads(model: torch.nn.Module) -> tuple[int, int, int] | None:
    """Heads of q, heads of k and v, and their size."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        return None
    kv_heads, d = getattr(config, "num_key_value_heads", None) or heads, getattr(config, "head_dim", None)
    return (heads, kv_heads, d or hidden // heads) if isinstance(kv_heads, int) and heads % kv_heads == 0 else None


def _both(way: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dout: torch.Tensor) -> None:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(way(*leaves), leaves, dout)


def _by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows, heads, length, d = q.shape
    cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).reshape(rows * length, -1, d) for x in (q, k, v))
    out = varlen_attention(q, k, v, cu_seqlens)
    return out.view(rows, length, heads, d).transpose(1, 2)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(later, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v
