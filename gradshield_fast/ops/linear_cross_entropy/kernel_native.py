"""The fused head and loss on the CPU's matrix units: one pass over the vocabulary, in C++ (csrc/linear_cross_entropy).

    z[v, t] = W[v] . h[t],   P[v, t] = exp(z'[v, t] - top[t]),   acc[t] = sum_{v /= label} P[v, t] dz'/dz W[v]

`top` is a running reference that follows the largest logit, so that losses and gradients come from one pass; p's
columns are taken along as further columns of W. The logits exist 32 words by 32 tokens at a time.
"""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

UPTO = 3
"""Best instruction set to use where the CPU has it: 1 AVX-512, 2 with BF16, 3 with AMX; for tests."""


def why_not(*inputs: torch.Tensor | None) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: the op's tensors: h, weight, and r or p and q; None where one is not given.

    Returns:
        None, or a reason.
    """
    if native.extension is None:
        return native.missing
    if not hasattr(native.extension, "head_level"):
        return "the native extension was built without it (it needs an x86-64 compiler that knows AMX, such as g++ 11)"
    given = [x for x in inputs if x is not None]
    device = next((x.device.type for x in given if x.device.type != "cpu"), None)
    if device is not None:
        return f"needs a CPU, the inputs are on {device}"
    reason = native.unsuited(*given)
    if reason is not None:
        return reason
    weight = inputs[1] if len(inputs) > 1 else None
    if weight is not None and weight.shape[0] >= 2**31:
        return f"needs a vocabulary below 2^31, got {weight.shape[0]}"
    return None if level() > 0 else "needs a CPU with AVX-512 (F, BW, DQ, VL) and FMA"


def not_for_auto(*inputs: torch.Tensor | None) -> str | None:
    """Say why `auto` should pass this backend by although it can run.

    Args:
        inputs: as of `why_not`.

    Returns:
        None, or a reason.
    """
    # six bf16 products instead of one are worth it only where bf16 is faster than float32
    if level() < 2 and any(x is not None and x.dtype == torch.float32 for x in inputs[:2]):
        return "float32 without BF16 instructions was measured slower than the reference"
    return None


def level() -> int:
    """Tell which instruction sets this CPU offers.

    Returns:
        As `UPTO`; 0 where none will do or the extension is not built.
    """
    return int(native.extension.head_level()) if hasattr(native.extension, "head_level") else 0


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weight: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    r: torch.Tensor | None,
    p: torch.Tensor | None,
    q: torch.Tensor | None,
    member: torch.Tensor | None,
    exact: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses, dh and the head's position terms; the formulas are in api.py.

    Args:
        h: Float[Tensor, "tokens d"].
        weight: Float[Tensor, "vocabulary d"].
        labels: Int64[Tensor, "tokens"], -100 where there is no loss.
        token_weight: Float[Tensor, "tokens"] or None.
        scale: factor on the logits.
        softcap: bound on the logits, or None.
        r: Float[Tensor, "directions vocabulary d"] or None.
        p: Float[Tensor, "vocabulary ranks"] or None.
        q: Float[Tensor, "d ranks"] or None.
        member: Float[Tensor, "ranks directions"], 1 where column j belongs to direction k, else 0; or None.
        exact: whether P keeps its float32 digits in the products with W and p.

    Returns:
        Float32[Tensor, "tokens"], Float32[Tensor, "tokens d"], and Float32[Tensor, "tokens directions"] or None.
    """
    tokens = h.shape[0]
    index = (labels >= 0).nonzero()[:, 0]
    live_labels = labels[index].contiguous()
    live_weight = None if token_weight is None else token_weight.detach()[index].float().contiguous()
    loss = torch.zeros(tokens, dtype=torch.float32)
    dh = torch.zeros(h.shape, dtype=torch.float32)
    dot = None if r is None else torch.zeros(tokens, r.shape[0], dtype=torch.float32)
    pulled = None if p is None else torch.zeros(tokens, p.shape[1], dtype=torch.float32)
    native.extension.linear_cross_entropy(
        native.matrix(h),
        native.matrix(weight),
        [] if p is None else [native.matrix(p)],
        [] if r is None else [native.matrix(x) for x in r],
        index.data_ptr(),
        live_labels.data_ptr(),
        0 if live_weight is None else live_weight.data_ptr(),
        index.shape[0],
        scale,
        softcap or 0.0,
        loss.data_ptr(),
        dh.data_ptr(),
        0 if pulled is None else pulled.data_ptr(),
        0 if dot is None else dot.data_ptr(),
        exact,
        torch.get_num_threads(),
        UPTO,
    )
    if pulled is not None and q is not None and member is not None:
        # float64, since torch may be told to multiply float32 with less than its digits
        dot = ((pulled.double() * (h.detach().double() @ q.detach().double())) @ member.double()).float()
    return loss, dh, dot
