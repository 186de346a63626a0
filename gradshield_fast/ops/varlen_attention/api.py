"""Signature, checks, dispatch and autograd of attention over packed rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.varlen_attention import kernel_native, reference

OP = "varlen_attention"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "reference": reference})

OPTIONS = "float? scale, int? window, float? softcap, str backend"


def _factor(q: torch.Tensor, scale: float | None) -> float:
    # here and not in the op's caller: with symbolic shapes it would be a number that torch.compile cannot pass on
    return float(q.shape[2] ** -0.5) if scale is None else scale


def _choice(q: torch.Tensor, softcap: float | None, backend: str) -> str:
    # a backend's why_not sees tensors alone, and torch's attention on a GPU has no softcap
    return "reference" if backend == "auto" and softcap is not None and q.device.type == "cuda" else backend


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    checks.need_boundaries(OP, cu_seqlens, q.shape[0])
    args = (q, k, v, cu_seqlens, _factor(q, scale), window, softcap)
    return dispatch.run(OP, _choice(q, softcap, backend), "forward", (q, k, v), *args)


def _forward_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    del k, v, cu_seqlens, scale, window, softcap, backend
    tokens, heads, d = q.shape
    return q.new_empty(tokens, heads, d), q.new_empty(heads, tokens, dtype=checks.accumulate_dtype(q))


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args = (dout, q, k, v, out, lse, cu_seqlens, _factor(q, scale), window, softcap)
    return dispatch.run(OP, _choice(q, softcap, backend), "backward", (q, k, v, dout, out), *args)


def _backward_shape(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del dout, out, lse, cu_seqlens, scale, window, softcap, backend
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


library.define(
    OP, f"(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, {OPTIONS}) -> (Tensor, Tensor)", _forward, _forward_shape
)
library.define(
    f"{OP}_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_shape,
)
_OPS: Any = getattr(torch.ops, library.NAMESPACE)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    del dlse
    gradients = _OPS.varlen_attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None, None, None


torch.library.register_autograd(f"{library.NAMESPACE}::{OP}", _differentiate, setup_context=_keep)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention inside each packed row; differentiable by q, k and v.

        s[t, u] = scale q[t] . k[u],    z = softcap * tanh(s / softcap)        (z = s without a softcap)
        out[t]  = sum_u softmax_u(z[t, u]) v[u]                                u <= t, t - u < window, u in the row of t

    Each head of q looks at the head of k and v that its group shares. Scores are never kept: the backward pass makes
    them again, and their softmax from its log-sum-exp.

    Args:
        q: Float[Tensor, "tokens heads d"], any strides.
        k: Float[Tensor, "tokens kv_heads d"]; head h of q goes with head h // (heads / kv_heads).
        v: Float[Tensor, "tokens kv_heads d"].
        cu_seqlens: Int32[Tensor, "rows+1"], starts at 0, ends at tokens; a repeat is an empty row.
        scale: factor on the scores; None: d ** -0.5.
        window: how many last positions a query sees, itself included; None: all.
        softcap: soft bound on the scaled scores; None: none.
        backend: "auto" or a backend's name, for both passes.

    Returns:
        Float[Tensor, "tokens heads d"], contiguous, in the dtype of q.

    Raises:
        InputError: a shape, dtype or device disagrees, or an option is out of its range.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: arXiv:2307.08691 (attention and its gradients without stored scores).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.need_float(OP, name, x)
        if x.ndim != 3:
            raise InputError(f"{OP}: {name} must be [tokens, heads, d], got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise InputError(f"{OP}: q, k and v must have one dtype, got {q.dtype} and {x.dtype} ({name})")
    checks.need_same_tokens(OP, q=q, k=k, v=v)
    if k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % max(k.shape[1], 1) or not all(q.shape[1:]):
        raise InputError(
            f"{OP}: k and v must be [tokens, kv_heads, d={q.shape[2]}] with kv_heads a divisor of the {q.shape[1]} "
            f"heads of q, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    checks.need_cu_seqlens(OP, cu_seqlens, q)
    # not isfinite, at which torch.compile would break its graph
    if scale is not None and not abs(scale) < math.inf:
        raise InputError(f"{OP}: scale must be finite, got {scale}")
    if window is not None and window < 1:
        raise InputError(f"{OP}: window must be at least 1 (a query sees itself), or None, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"{OP}: softcap must be positive and finite, or None, got {softcap}")
    dispatch.check_name(backend, OP)
    return _OPS.varlen_attention(q, k, v, cu_seqlens, scale, window, softcap, backend)[0]
