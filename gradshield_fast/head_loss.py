"""The output head and the loss in one op, at response positions only: the logits and their gradient are never stored.

    hidden [.., d] --(positions whose next token has a label)--> h [labelled, d] --> loss, dL/dh, the head's own terms

The model runs as it is, but its head is handed no positions at all; what the head and the model do behind it is done
by `ops.linear_cross_entropy` instead. Whether that is what this model does is not assumed: calibration compares the
losses and the gradient with the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradshield_fast.errors import ScoringError
from gradshield_fast.head_columns import Lookups
from gradshield_fast.head_norm import HeadNorm, head_norm
from gradshield_fast.ops.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True, eq=False)
class Head:
    """An output head that the fused loss stands for: logits z' = softcap * tanh(scale * (W h) / softcap).

    Attributes:
        name: the head's name in the model.
        module: the head, a linear layer without a bias.
        scale: factor on the logits.
        softcap: bound on the logits, or None.
        backend: backend that the op runs on.
    """

    name: str
    module: nn.Linear
    scale: float
    softcap: float | None
    backend: str


@dataclass(eq=False)
class HeadTerms:
    """What is asked of the head's weight, and what the last pass gave.

    Attributes:
        r: Float[Tensor, "directions vocabulary d"] or None.
        p: Float[Tensor, "vocabulary ranks"] or None.
        q: Float[Tensor, "d ranks"] or None.
        ranks: columns of each low-rank direction, or None.
        norms: whether the rows' squared norms are wanted.
        lookups: the words that the embedding looks up, where it has the same weight and norms are wanted.
        dot: Float[Tensor, "labelled directions"], g[t] . (r_k h[t]), row after row; None before the pass.
        norm: the squared norms; None before the pass, and where they are not wanted.
    """

    r: torch.Tensor | None = None
    p: torch.Tensor | None = None
    q: torch.Tensor | None = None
    ranks: Sequence[int] | None = None
    norms: bool = False
    lookups: Lookups | None = None
    dot: torch.Tensor | None = None
    norm: HeadNorm | None = None


def find_head(model: nn.Module, backend: str) -> Head | str:
    """Look for a head that the fused loss can stand for.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        backend: backend that the op is to run on.

    Returns:
        The head, which calibration still has to confirm, or the reason why there is none.
    """
    getter: Any = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if module is None:
        return "the model does not say which module its output head is"
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return f"its output head is a {type(module).__name__}, not a plain linear layer"
    if module.bias is not None:
        return "its output head has a bias"
    name = next((name for name, other in model.named_modules() if other is module), None)
    if name is None:
        return "its output head is not a module of the model"
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(name, module, float(scale), None if softcap is None else float(softcap), backend)


@contextmanager
def hidden_states(head: Head) -> Iterator[list[torch.Tensor]]:
    """Take what enters the head out of a forward pass, and hand the head no positions.

    Args:
        head: the head.

    Yields:
        A list, which holds Float[Tensor, "... tokens d"] after the pass: one entry for each call of the head.
    """
    taken: list[torch.Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(args[0])
        return (args[0].narrow(-2, 0, 0), *args[1:])

    handle = head.module.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


def head_losses(
    head: Head,
    hidden: Sequence[torch.Tensor],
    place: torch.Tensor,
    targets: torch.Tensor,
    counts: torch.Tensor,
    reduction: str,
    terms: HeadTerms | None,
) -> torch.Tensor:
    """Loss of every row, with a graph that gives dL/dh to the positions of the hidden states.

        loss[n] = sum over the labelled positions t of row n of -log softmax(z'[t])[target[t]]    (/ count[n]: "mean")

    Args:
        head: the head.
        hidden: what `hidden_states` took: one Float[Tensor, "... d"].
        place: Int64[Tensor, "labelled"], flat positions whose next token has a label, row after row.
        targets: Int64[Tensor, "labelled"], that token.
        counts: Int64[Tensor, "rows"], labelled positions of each row.
        reduction: "mean" or "sum".
        terms: directions on the head's weight; its `dot` and `norm` are set. None: there are none.

    Returns:
        Float32[Tensor, "rows"] in nats (float64 for a float64 model); 0 for a row without a label.

    Raises:
        ScoringError: the head was not called just once, or not with one hidden state for each token.
    """
    if len(hidden) != 1 or int(place.max() if len(place) else 0) >= hidden[0][..., 0].numel():
        raise ScoringError("the model does not hand its head one hidden state for each token")
    device = hidden[0].device
    place, targets, counts = place.to(device), targets.to(device), counts.to(device)
    return _HeadLoss.apply(hidden[0], head, place, targets, counts, reduction, terms)  # pyright: ignore


class _HeadLoss(torch.autograd.Function):
    """The op gives loss and gradient at once, so the backward pass only scales the gradient by what comes in."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: torch.Tensor,
        head: Head,
        place: torch.Tensor,
        targets: torch.Tensor,
        counts: torch.Tensor,
        reduction: str,
        terms: HeadTerms | None,
    ) -> torch.Tensor:
        h = hidden.reshape(-1, hidden.shape[-1])[place]
        share = None
        if reduction == "mean":
            share = (1.0 / counts).to(torch.promote_types(h.dtype, torch.float32))
            share = share.repeat_interleave(counts, output_size=len(targets))
        given = {} if terms is None else {"r": terms.r, "p": terms.p, "q": terms.q, "ranks": terms.ranks}
        out = linear_cross_entropy(
            h,
            head.module.weight,
            targets,
            share,
            scale=head.scale,
            softcap=head.softcap,
            exact=False,  # dL/dh is rounded to the model's own type right after
            backend=head.backend,
            **given,
        )
        if terms is not None:
            terms.dot = out.dot
            if terms.norms:
                terms.norm = head_norm(
                    h,
                    head.module.weight,
                    targets,
                    out.loss,
                    share,
                    counts,
                    terms.lookups,
                    scale=head.scale,
                    softcap=head.softcap,
                    backend=head.backend,
                )
        ctx.dh, ctx.shape, ctx.dtype = out.dh, hidden.shape, hidden.dtype
        ctx.save_for_backward(place, counts)
        losses = torch.segment_reduce(out.loss, "sum", lengths=counts, axis=0, initial=0, unsafe=True)
        return losses / counts.clamp_min(1) if reduction == "mean" else losses

    @staticmethod
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        place, counts = ctx.saved_tensors
        dh = ctx.dh * dlosses.repeat_interleave(counts, output_size=len(place))[:, None].to(ctx.dh.dtype)
        whole = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dh.device)
        whole.view(-1, ctx.shape[-1])[place] = dh.to(ctx.dtype)
        return (whole, *[None] * 6)
