"""One forward pass and one backward pass to the activations: what a batch costs."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from gradshield_fast import attention, products
from gradshield_fast.batches import PaddedBatch, packed_batch
from gradshield_fast.capture import Capture
from gradshield_fast.compiled import CompiledLayers
from gradshield_fast.losses import Call, row_losses
from gradshield_fast.matrix_rules import HeadRule
from gradshield_fast.plan import Plan
from gradshield_fast.tally import Tally


def run_step(
    plan: Plan,
    batch: PaddedBatch,
    call: Call,
    hooks: Capture,
    head: HeadRule | None,
    compiled: CompiledLayers | None = None,
    *,
    token_scores: bool,
    calibrated: bool = True,
    by_weight: bool = False,
) -> tuple[torch.Tensor, Tally]:
    """Run a batch through the model and back, and add up what its hooks bring.

    Args:
        plan: the plan whose sites the hooks listen to.
        batch: the rows.
        call: how the model is called.
        hooks: the capture in place on the model.
        head: the rule of the fused head's weight, or None.
        compiled: the compiled layers in place on the model, or None.
        token_scores: whether position terms are wanted.
        calibrated: hold layouts and uses against what calibration saw.
        by_weight: also keep the dot products of each weight.

    Returns:
        Float[Tensor, "rows"], the losses, and the batch's sums.
    """
    line = packed_batch(batch) if call.packed else None
    tally = Tally(
        batch.rows,
        batch.tokens,
        plan.direction.count,
        batch.input_ids.device,
        norms=plan.context.norms,
        token_scores=token_scores,
        backend=plan.context.backend,
        expected_uses=plan.expected_uses if calibrated else None,
        known_layouts=plan.known_layouts if calibrated else None,
        by_weight=by_weight,
        line=line,
    )
    terms = None if head is None else head.terms(batch, line)
    hooks.tally = tally
    try:
        with (
            attention.replaced(plan.model, call.attention) if call.attention else nullcontext(),
            products.replaced(plan.model) if call.products else nullcontext(),
            compiled.batch(batch, tally, packed=call.packed) if compiled is not None else nullcontext(),
            torch.enable_grad(),
        ):
            losses = row_losses(plan.model, batch, call, terms)
            if losses.requires_grad:
                losses.sum().backward()
        if head is not None and terms is not None:
            head.add(terms, batch, tally)
        tally.finish()
    finally:
        hooks.tally = None
    return losses.detach(), tally
