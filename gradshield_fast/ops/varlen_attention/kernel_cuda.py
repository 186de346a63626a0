"""Attention on a GPU: the packed flash attention that torch itself brings, forward and backward.

`lse` has the form [heads, tokens] in the torch versions that have torch.nn.attention.varlen; older ones pad it.
"""

from __future__ import annotations

import importlib.util

import torch

from gradshield_fast.errors import BackendUnavailable
from gradshield_fast.ops.boundaries import derived

MAX_D = 256


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why torch's packed attention cannot run.

    Args:
        inputs: q, k and v, and in the backward pass dout and out.

    Returns:
        None, or the reason.
    """
    away = next((x.device for x in inputs if x.device.type != "cuda"), None)
    if away is not None:
        return f"needs a CUDA device, an input is on {away}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no packed attention (torch.nn.attention.varlen)"
    if torch.version.hip is None and torch.cuda.get_device_capability(inputs[0].device) < (8, 0):
        return "needs compute capability 8.0"
    for x in (x for x in inputs if x.ndim == 3):
        if x.dtype not in (torch.float16, torch.bfloat16):
            return f"needs float16 or bfloat16, got {x.dtype}"
        if x.shape[2] > MAX_D or x.shape[2] % 8:
            return f"needs heads of at most {MAX_D}, a multiple of 8, got {x.shape[2]}"
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute out = softmax(z) v, row by row.

    Args:
        q: Float[Tensor, "tokens heads d"].
        k: Float[Tensor, "tokens kv_heads d"].
        v: Float[Tensor, "tokens kv_heads d"].
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: None; there is no softcap here.

    Returns:
        Float[Tensor, "tokens heads d"], and Float32[Tensor, "heads tokens"], log sum exp z.
    """
    bounds, longest, causal, left = _shape(cu_seqlens, window, softcap)
    if longest == 0:
        return torch.empty_like(q), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *map(_rows, (q, k, v)), bounds, bounds, longest, longest, 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients; the formulas are in reference.py.

    Args:
        dout: Float[Tensor, "tokens heads d"], gradient of out.
        q: Float[Tensor, "tokens heads d"].
        k: Float[Tensor, "tokens kv_heads d"].
        v: Float[Tensor, "tokens kv_heads d"].
        out: Float[Tensor, "tokens heads d"], from `forward`.
        lse: Float32[Tensor, "heads tokens"], from `forward`.
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: None; there is no softcap here.

    Returns:
        The gradients of q, k and v, contiguous.
    """
    bounds, longest, causal, left = _shape(cu_seqlens, window, softcap)
    if longest == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    unused = torch.empty(0, device=q.device)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # else dq is summed by atomics, in any order; the public function would turn the compiler's switch as well
    torch._C._set_deterministic_algorithms(True)
    try:
        gradients = torch.ops.aten._flash_attention_backward(
            *map(_rows, (dout, q, k, v, out)), lse, bounds, bounds, longest, longest, 0.0, causal, seed, unused,
            scale=scale, window_size_left=left, window_size_right=0,
        )  # fmt: skip
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
    dq, dk, dv = (x.contiguous() for x in gradients)
    return dq, dk, dv


def _shape(cu_seqlens: torch.Tensor, window: int | None, softcap: float | None) -> tuple[torch.Tensor, int, bool, int]:
    """Give int32 boundaries, the longest row, whether there is no window, and how far a query sees to the left."""
    if softcap is not None:
        raise BackendUnavailable("varlen_attention: torch's packed attention has no softcap; use backend='reference'")
    longest, bounds = derived(cu_seqlens, ("longest",), lambda: (_longest(cu_seqlens), cu_seqlens.int()))
    return bounds, longest, window is None, -1 if window is None else window - 1


def _longest(cu_seqlens: torch.Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Give a tensor unit stride along d."""
    return x if x.stride(2) == 1 else x.contiguous()
