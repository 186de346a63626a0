"""Models that trip hooks: checkpointed, reused, called by parts, changed in place, or with a forward of their own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gradshield_fast import Direction, Scorer
from tests.models.zoo import row
from tests.oracle import row_truth

LENGTHS = [9, 4, 7]
WIDTH = 8


class Tiny(nn.Module):
    """Embedding, one body, head: a causal model whose body a test chooses."""

    def __init__(self, body: nn.Module | Callable[[torch.Tensor], torch.Tensor], *, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH, padding_idx=padding)
        self.body = body
        self.head = nn.Linear(WIDTH, 97, bias=False)
        self.double()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        del use_cache
        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(torch.tanh(self.body(x))))


def agree(model: nn.Module, direction: Direction, batch: dict[str, torch.Tensor], *, norms: bool = False) -> Scorer:
    """Score, and hold every row against autograd."""
    with Scorer(model, direction, norms=norms) as scorer:
        out = scorer.score(batch)
    for n in range(len(out.dot)):
        truth = row_truth(model, direction, row(batch, n))
        assert (abs(out.dot[n] - truth.dot) <= 1e-9 * truth.size).all()
        assert truth.size.min() > 0
        if out.norm is not None:
            assert float(out.norm[n]) == pytest.approx(truth.norm, rel=1e-9)
    return scorer


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.one, self.two, self.reentrant = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = lambda y: self.two(torch.tanh(self.one(y)))  # noqa: E731
        return checkpoint(run, x, use_reentrant=self.reentrant)  # pyright: ignore[reportReturnType]


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(torch.tanh(self.layer(self.norm(x)))))


class Functional(nn.Module):
    """Uses its child's weight without calling the child, and the other child both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.unseen.weight, self.unseen.bias)
        return self.both(x) + x @ self.both.weight


class Scaled(nn.Linear):
    """A subclass that does more than its parent."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input) + input @ self.weight


class Grouped(nn.Linear):
    """A subclass whose output is wider than its weight is tall: no shape fits the parent's rule."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        groups = input.unflatten(-1, (2, WIDTH // 2))
        return torch.einsum("...gi,gio->...go", groups, self.weight.view(2, WIDTH // 2, WIDTH // 2)).flatten(-2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        y *= 2
        return y.relu_()


class Permuted(nn.Module):
    """Tokens of all rows sorted by a key and scored in that order, as experts see them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        order = flat[:, 0].detach().argsort()
        out = torch.empty_like(flat)
        out = out.index_copy(0, order, self.layer(flat[order]))
        return out.view_as(x)


class Routed(nn.Module):
    """Its router returns the logits and the weights that are made from them, and both are used."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            logits = x @ self.weight
            return logits, {"weights": logits.softmax(-1)}

    def __init__(self) -> None:
        super().__init__()
        self.router = self.Router()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, made = self.router(x)
        return x * made["weights"] + 0.1 * logits


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x.reshape(-1, x.shape[-1]))).view_as(x)


class Positions(nn.Module):
    """A position embedding broadcast over the batch: its gradient mixes rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(torch.arange(x.shape[1]))


class NoForwardMode(torch.autograd.Function):
    """y = x w, a custom function with a twice differentiable backward and no jvp."""

    @staticmethod
    def forward(ctx, x, w):  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, 1).T @ g.flatten(0, 1)


class OnceDifferentiable(NoForwardMode):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, 1).T @ g.flatten(0, 1)


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(WIDTH, WIDTH)), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.weight)  # pyright: ignore[reportReturnType]


class Convolution(nn.Module):
    """Causal depthwise convolution: channels before tokens, and padding that is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "reused": Reused,
    "functional": Functional,
    "subclass": lambda: Scaled(WIDTH, WIDTH),
    "grouped subclass": lambda: Grouped(WIDTH // 2, WIDTH, bias=False),
    "in place": InPlace,
    "permuted": Permuted,
    "routed": Routed,
    "flattened": Flattened,
    "positions": Positions,
    "no forward mode": lambda: Custom(NoForwardMode),
    "once differentiable": lambda: Custom(OnceDifferentiable),
    "convolution": Convolution,
    "square Conv1D": lambda: Conv1D(WIDTH, WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "GroupNorm over channels": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, bias=False)),
}
