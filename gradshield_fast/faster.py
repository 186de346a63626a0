"""Faster ways to run a model, each kept only if it gives autograd's answer on the trial rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradshield_fast import attention, attention_race, products
from gradshield_fast.calibrate import Calibration
from gradshield_fast.head_loss import find_head
from gradshield_fast.losses import Call
from gradshield_fast.plan import Plan


def faster_call(
    model: torch.nn.Module, plan: Plan, calibration: Calibration, *, compiled: bool = False
) -> tuple[Call, dict[str, str]]:
    """Find the fastest way to call a model that scores right.

    Args:
        model: the model, frozen and in evaluation mode.
        plan: its settled plan, which is changed where the head is fused.
        calibration: the trial that settled it.
        compiled: the layers will be compiled, with torch's own products.

    Returns:
        The call, and for "head", "attention" and "packing" what was taken, with the reason where it is the plain way;
        "products" where they are ours.
    """
    ways: dict[str, str] = {}
    if plan.context.dtype == torch.float64:
        # float64 is for checking: many models round to float32 inside, and only the same operations round the same
        why = "a float64 model is run as autograd runs it"
        return calibration.call, {"head": f"own logits: {why}", "attention": f"own: {why}", "packing": f"padded: {why}"}
    call, reason = _with_head(model, plan, calibration)
    ways["head"] = "fused" if reason is None else f"own logits: {reason}"
    call, ways["attention"] = _with_attention(model, calibration, call)
    reason = plan.needs_rows if call.attention == attention.NAME else "only our attention keeps packed rows apart"
    if reason is None:
        reason = calibration.why_not(replace(call, packed=True))
    ways["packing"] = "packed" if reason is None else f"padded: {reason}"
    call = replace(call, packed=reason is None)
    return (call if compiled else _with_products(model, plan, calibration, call, ways)), ways


def _with_products(
    model: torch.nn.Module, plan: Plan, calibration: Calibration, call: Call, ways: dict[str, str]
) -> Call:
    used = {use.split(" @ ")[0] for uses in plan.methods().values() for use in uses}
    if used - products.METHODS or not products.faster(model, plan.context.backend):
        return call
    ours = replace(call, products=True)
    reason = calibration.why_not(ours)
    ways["products"] = "ours: measured faster here, or preferred" if reason is None else f"own: {reason}"
    return ours if reason is None else call


def _with_head(model: torch.nn.Module, plan: Plan, calibration: Calibration) -> tuple[Call, str | None]:
    head = find_head(model, plan.context.backend)
    reason = head if isinstance(head, str) else plan.fuse_head(head.name)
    if reason is None and not isinstance(head, str):
        call = replace(calibration.call, head=head)
        reason = calibration.why_not(call)
        if reason is None:
            return call, None
        plan.unfuse_head()
    return calibration.call, reason


def _with_attention(model: torch.nn.Module, calibration: Calibration, call: Call) -> tuple[Call, str]:
    """Take the attention that was measured fastest here, or ours where that one does not agree, or the model's own."""
    if (reason := attention.why_not(model)) is not None:
        return call, f"own: {reason}"
    best = attention_race.fastest(model, calibration.first)
    for name in dict.fromkeys([best, attention.NAME]):
        faster = replace(call, attention=name)
        try:
            reason = calibration.why_not(faster)
        except Exception as error:
            if name == attention.NAME:
                raise
            reason = str(error)  # of one that models refuse in their own ways, as sdpa with a softcap
        if reason is None:
            return faster, "by rows" if name == attention.NAME else f"{name}: measured faster here, or preferred"
    return call, f"own: {reason}"
