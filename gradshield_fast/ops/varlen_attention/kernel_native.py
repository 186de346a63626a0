"""Attention in C++ on the CPU's matrix units (csrc/varlen_attention), and torch's own on a GPU and in other types."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native
from gradshield_fast.ops.varlen_attention import kernel_cuda, kernel_rows

MAX_D = 512
"""Largest head: what one block of queries and keys needs still lies in L2."""

Heads = tuple[int, int, int]


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: q, k and v, and in the backward pass dout and out; or any tensor, for what depends on the device alone.

    Returns:
        None, or the reason.
    """
    if any(x.device.type != "cpu" for x in inputs):
        return kernel_cuda.why_not(*inputs)
    if _by_torch(*inputs):
        return kernel_rows.why_not(*inputs)
    if native.extension is None:
        return native.missing
    if (reason := native.unsuited(*inputs)) is not None:
        return reason
    if isa() == "":
        return "needs a CPU with AVX-512"
    wrong = next((x.dtype for x in inputs if x.ndim == 3 and x.dtype != torch.bfloat16), None)
    if wrong is not None:
        return f"needs bfloat16, got {wrong}"
    if any(x.ndim == 3 and x.shape[2] > MAX_D for x in inputs):
        return f"needs heads of at most {MAX_D}, got {inputs[0].shape[2]}"
    return None


def isa(limit: int = native.BEST) -> str:
    """Name the instruction set whose kernels run here.

    Args:
        limit: number of the highest one that may, a position in `native.ISAS`.

    Returns:
        "amx", "avx512", or "" where neither will do.
    """
    return "" if native.extension is None else native.extension.attention_isa(limit)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    threads: int | None = None,
    isa: int = native.BEST,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute out = softmax(z) v, row by row.

    Args:
        q: BFloat16[Tensor, "tokens heads d"].
        k: BFloat16[Tensor, "tokens kv_heads d"].
        v: BFloat16[Tensor, "tokens kv_heads d"].
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: bound on the scores, or None.
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        BFloat16[Tensor, "tokens heads d"], and Float32[Tensor, "heads tokens"], log sum exp z.
    """
    if q.device.type != "cpu":
        return kernel_cuda.forward(q, k, v, cu_seqlens, scale, window, softcap)
    if _by_torch(q):
        return kernel_rows.forward(q, k, v, cu_seqlens, scale, window, softcap)
    q, k, v = map(_rows, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    native.extension.attention_forward(
        [_heads(q), _heads(k), _heads(v)],
        _sizes(q, k, window),
        scale,
        softcap or 0.0,
        cu_seqlens.tolist(),
        out.data_ptr(),
        lse.data_ptr(),
        native.threads(threads),
        isa,
    )
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
    *,
    threads: int | None = None,
    isa: int = native.BEST,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients, from scores that are made again; the formulas are in reference.py.

    Args:
        dout: BFloat16[Tensor, "tokens heads d"], gradient of out.
        q: BFloat16[Tensor, "tokens heads d"].
        k: BFloat16[Tensor, "tokens kv_heads d"].
        v: BFloat16[Tensor, "tokens kv_heads d"].
        out: BFloat16[Tensor, "tokens heads d"], from `forward`.
        lse: Float32[Tensor, "heads tokens"], from `forward`.
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: bound on the scores, or None.
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        The gradients of q, k and v, contiguous.
    """
    if q.device.type != "cpu":
        return kernel_cuda.backward(dout, q, k, v, out, lse, cu_seqlens, scale, window, softcap)
    if _by_torch(q):
        return kernel_rows.backward(dout, q, k, v, out, lse, cu_seqlens, scale, window, softcap)
    q, k, v, out, dout = map(_rows, (q, k, v, out, dout))
    lse = lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    native.extension.attention_backward(
        [_heads(q), _heads(k), _heads(v)],
        _sizes(q, k, window),
        scale,
        softcap or 0.0,
        cu_seqlens.tolist(),
        _heads(out),
        _heads(dout),
        lse.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        native.threads(threads),
        isa,
    )
    return dq, dk, dv


def _by_torch(*inputs: torch.Tensor) -> bool:
    """Whether torch's own attention takes these: types that the C++ kernels have no form for."""
    return any(x.ndim == 3 and x.dtype in (torch.float32, torch.float16) for x in inputs)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Give a tensor unit stride along d: itself, nearly always."""
    return x if x.stride(2) == 1 else x.contiguous()


def _heads(x: torch.Tensor) -> Heads:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _sizes(q: torch.Tensor, k: torch.Tensor, window: int | None) -> tuple[int, int, int, int, int]:
    tokens, heads, d = q.shape
    # a window that hides nothing, not even from the zeros behind a row's end
    widest = tokens + 64
    return tokens, heads, k.shape[1], d, widest if window is None else min(window, widest)
