"""The ops at the shapes of real layers: inputs, operations and bytes by formula, rivals, and the float64 truth.

Operations and bytes are the least that the formula asks for: every input read once, every output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from gradshield_fast import ops
from gradshield_fast.errors import InputError
from gradshield_fast.ops.embedding_dot import reference as embedding
from gradshield_fast.ops.ghost_dot import reference as dense
from gradshield_fast.ops.ghost_dot_lowrank import reference as lowrank
from gradshield_fast.ops.linear_cross_entropy import reference as head
from gradshield_fast.ops.scale_dot import reference as scale
from gradshield_fast.ops.segments import segment_sum

MODELS: Mapping[str, tuple[int, int, int]] = {
    "smollm2": (576, 1536, 49152),
    "llama-3.2-1b": (2048, 8192, 128256),
    "qwen3-4b": (2560, 9728, 151936),
    "llama-3-8b": (4096, 14336, 128256),
}
"""Model -> hidden size d, feed-forward size, vocabulary: the layer goes from d to the second, the head to the third."""

HEADS: Mapping[str, tuple[int, int, int]] = {
    "smollm2": (9, 3, 64),
    "llama-3.2-1b": (32, 8, 64),
    "qwen3-4b": (32, 8, 128),
    "llama-3-8b": (32, 8, 128),
}
"""Model -> heads of q, heads of k and v, size of a head."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

RANK = 16

SAMPLE = 48
"""Tokens that the float64 truth is worked out on."""

PATTERN = (97, 31, 200, 64, 5, 120, 256, 17)
"""Lengths of packed examples, repeated: about 100 tokens, as in instruction corpora."""

Tensors = Mapping[str, torch.Tensor]
Run = Callable[..., torch.Tensor]


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        shape: tokens x d_in x d_out, and the number of examples.
        dtype: of activations and output gradients; directions are float32.
        inputs: the op's tensors by name.
        flop: floating-point operations of the formula.
        bytes: bytes of inputs and output, each once.
        run: the op, called with the inputs, then `backend`.
        unfused: the same by PyTorch in the inputs' own dtype, which rounds a float32 direction to it.
        plain: the reference's formula outside of the op, for torch.compile to fuse; None where it is a loop over rows.
        sample: the inputs cut to few tokens, for the truth.
    """

    op: str
    shape: str
    dtype: str
    inputs: Tensors
    flop: float
    bytes: float
    run: Run
    unfused: Run
    plain: Run | None = None
    sample: Tensors = field(default_factory=dict)

    def error_over_bound(self, backend: str) -> float:
        """Give the worst error of a few outputs over what is allowed, 8 eps(float32) sum |terms|.

        Args:
            backend: the backend's name.

        Returns:
            At most 1 where the promise holds. For the fused head the terms are those of the gradient's size, since a
            logit's own rounding moves its probability; see its tests for the bound term by term. Attention answers in
            the inputs' dtype: there it is 8 eps of that, of the largest entry.
        """
        out = self.run(**self.sample, backend=backend).double()
        wide = {name: x.double() if x.is_floating_point() else x for name, x in self.sample.items()}
        truth = self.run(**wide, backend="reference")
        if self.op == "varlen_attention":
            return float((out - truth).abs().max() / (8 * torch.finfo(DTYPES[self.dtype]).eps * truth.abs().max()))
        size = {name: x.abs() if x.is_floating_point() else x for name, x in wide.items()}
        terms = self.run(**size, backend="reference").abs() if self.op != "linear_cross_entropy" else truth.abs().amax()
        return float(((out - truth).abs() / (8 * torch.finfo(torch.float32).eps * terms).clamp_min(1e-30)).max())


def make_case(
    op: str, model: str, tokens: int, dtype: str, device: torch.device, *, rank: int = RANK, seed: int = 0
) -> Case:
    """Make an op's case at one model's layer.

    Args:
        op: the op's name.
        model: one of `MODELS`.
        tokens: rows of a and g.
        dtype: one of `DTYPES`.
        device: where the tensors lie.
        rank: of the low-rank direction, and columns of each side of a projection.
        seed: of the random values.

    Returns:
        The case.

    Raises:
        InputError: the op, the model or the dtype is not known.
    """
    for what, value, known in (("op", op, _MAKERS), ("model", model, MODELS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"--{what} must be one of {', '.join(known)}: got {value!r}")
    if tokens < 1:
        raise InputError(f"--tokens must be at least 1, got {tokens}")
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random(*shape: int, kind: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
        if device.type == "meta":  # shapes alone, for the formulas
            return torch.empty(*shape, dtype=kind, device=device)
        return (torch.randn(*shape, generator=generator) * size).to(device=device, dtype=kind)

    return _MAKERS[op](_Layer(*MODELS[model], HEADS[model], tokens, rank, dtype, device, random))


_BY_TOKEN = ("a", "g", "ids", "x_hat", "h", "labels", "q_heads", "k_heads", "v_heads", "dout")


@dataclass
class _Layer:
    d: int
    ff: int
    vocabulary: int
    heads: tuple[int, int, int]
    tokens: int
    rank: int
    dtype: str
    device: torch.device
    random: Any

    def __post_init__(self) -> None:
        self.kind = DTYPES[self.dtype]
        self.width = self.kind.itemsize
        lens: list[int] = []
        while sum(lens) < self.tokens:
            lens.append(min(PATTERN[len(lens) % len(PATTERN)], self.tokens - sum(lens)))
        self.lens = lens
        self.cu = self.boundaries(lens)

    def boundaries(self, lens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *lens]).cumsum(0).to(device=self.device, dtype=torch.int32)

    def case(
        self,
        op: str,
        wide: int,
        inputs: dict[str, torch.Tensor],
        flop: float,
        size: float,
        run: Run,
        unfused: Run,
        plain: Run | None = None,
    ) -> Case:
        shape = f"{self.tokens}x{self.d}x{wide}, {len(self.lens)}"
        few = min(SAMPLE, self.tokens)
        sample = {n: x[:few] if n in _BY_TOKEN else x for n, x in inputs.items()}
        if "cu_seqlens" in inputs:
            sample["cu_seqlens"] = self.boundaries([few // 3, few - few // 3])
        return Case(op, shape, self.dtype, inputs, flop, size, run, unfused, plain, sample)

    def ag(self) -> dict[str, torch.Tensor]:
        a, g = (self.random(self.tokens, n, kind=self.kind) for n in (self.d, self.ff))
        return {"a": a, "g": g, "cu_seqlens": self.cu}


def _sum(u: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    return segment_sum(u, cu)


def _ghost_dot(x: _Layer) -> Case:
    inputs = {**x.ag(), "r": x.random(x.ff, x.d)}
    flop = 2 * x.tokens * x.ff * (x.d + 1)
    size = x.width * x.tokens * (x.d + x.ff) + 4 * x.ff * x.d

    def unfused(a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return _sum(((a @ r.to(a.dtype).T) * g).sum(1, dtype=torch.float32), cu_seqlens)

    def plain(a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return _sum(dense.ghost_dot(a, g, r[None])[:, 0], cu_seqlens)

    return x.case("ghost_dot", x.ff, inputs, flop, size, ops.ghost_dot, unfused, plain)


def _ghost_dot_lowrank(x: _Layer) -> Case:
    inputs = {**x.ag(), "p": x.random(x.ff, x.rank), "q": x.random(x.d, x.rank)}
    flop = 2 * x.tokens * x.rank * (x.d + x.ff + 1)
    size = x.width * x.tokens * (x.d + x.ff) + 4 * x.rank * (x.ff + x.d)

    def unfused(
        a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor, p: torch.Tensor, q: torch.Tensor
    ) -> torch.Tensor:
        return _sum(((a @ q.to(a.dtype)) * (g @ p.to(g.dtype))).sum(1, dtype=torch.float32), cu_seqlens)

    one = torch.ones(x.rank, 1, device=x.device)

    def plain(
        a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor, p: torch.Tensor, q: torch.Tensor
    ) -> torch.Tensor:
        return _sum(lowrank.lowrank_contract(lowrank.lowrank_project(a, q), g, p, one)[:, 0], cu_seqlens)

    return x.case("ghost_dot_lowrank", x.ff, inputs, flop, size, ops.ghost_dot_lowrank, unfused, plain)


def _ghost_norm_sq(x: _Layer) -> Case:
    flop = sum(min(2 * n * n * (x.d + x.ff), 2 * n * x.d * x.ff) for n in x.lens)

    def unfused(a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        bounds = cu_seqlens.tolist()
        parts = [((a[i:j] @ a[i:j].T) * (g[i:j] @ g[i:j].T)).sum(dtype=torch.float32) for i, j in pairwise(bounds)]
        return torch.stack(parts)

    return x.case("ghost_norm_sq", x.ff, x.ag(), flop, x.width * x.tokens * (x.d + x.ff), ops.ghost_norm_sq, unfused)


def _ghost_gram(x: _Layer) -> Case:
    one = x.ag()
    flop = 2 * x.tokens**2 * (x.d + x.ff)

    def run(a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor, *, backend: str) -> torch.Tensor:
        return ops.ghost_gram(a, g, cu_seqlens, a, g, cu_seqlens, backend=backend)

    def unfused(a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        u = _sum(((a @ a.T) * (g @ g.T)).float(), cu_seqlens)
        return _sum(u.T.contiguous(), cu_seqlens).T

    return x.case("ghost_gram", x.ff, one, flop, x.width * x.tokens * (x.d + x.ff), run, unfused)


def _ghost_project(x: _Layer) -> Case:
    inputs = {**x.ag(), "p_in": x.random(x.d, x.rank), "p_out": x.random(x.ff, x.rank)}
    flop = 2 * x.tokens * x.rank * (x.d + x.ff + x.rank)
    size = x.width * x.tokens * (x.d + x.ff) + 4 * x.rank * (x.d + x.ff + len(x.lens) * x.rank)

    def unfused(
        a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor, p_in: torch.Tensor, p_out: torch.Tensor
    ) -> torch.Tensor:
        right, left = a @ p_in.to(a.dtype), g @ p_out.to(g.dtype)
        return torch.stack([(left[i:j].T @ right[i:j]).float() for i, j in pairwise(cu_seqlens.tolist())])

    return x.case("ghost_project", x.ff, inputs, flop, size, ops.ghost_project, unfused)


def _embedding_dot(x: _Layer) -> Case:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, x.vocabulary, (x.tokens,), generator=generator).to(x.device)
    g = x.random(x.tokens, x.d, kind=x.kind)
    inputs = {"ids": ids, "g": g, "r": x.random(x.vocabulary, x.d), "cu_seqlens": x.cu}
    size = x.tokens * (8 + x.d * (x.width + 4))

    def unfused(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return _sum((r[ids] * g).sum(1, dtype=torch.float32), cu_seqlens)

    def plain(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return _sum(embedding.embedding_dot(ids, g, r[None])[:, 0], cu_seqlens)

    return x.case("embedding_dot", x.vocabulary, inputs, 2 * x.tokens * x.d, size, ops.embedding_dot, unfused, plain)


def _scale_dot(x: _Layer) -> Case:
    inputs = {
        "x_hat": x.random(x.tokens, x.d, kind=x.kind),
        "g": x.random(x.tokens, x.d, kind=x.kind),
        "r": x.random(x.d),
        "cu_seqlens": x.cu,
    }
    size = 2 * x.width * x.tokens * x.d + 4 * x.d

    def unfused(x_hat: torch.Tensor, g: torch.Tensor, r: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return _sum((x_hat * g * r).sum(1, dtype=torch.float32), cu_seqlens)

    def plain(x_hat: torch.Tensor, g: torch.Tensor, r: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return _sum(scale.scale_dot(x_hat, g, r[None])[:, 0], cu_seqlens)

    return x.case("scale_dot", x.d, inputs, 3 * x.tokens * x.d, size, ops.scale_dot, unfused, plain)


def _linear_cross_entropy(x: _Layer) -> Case:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, x.vocabulary, (x.tokens,), generator=generator).to(x.device)
    inputs = {
        "h": x.random(x.tokens, x.d, kind=x.kind),
        "weight": x.random(x.vocabulary, x.d, kind=x.kind, size=x.d**-0.5),
        "labels": labels,
    }
    flop = 4 * x.tokens * x.vocabulary * x.d
    size = x.width * x.d * (x.vocabulary + x.tokens) + 4 * x.tokens * x.d

    def run(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, backend: str) -> torch.Tensor:
        out = ops.linear_cross_entropy(h, weight, labels, backend=backend)
        return torch.cat([out.loss[:, None], out.dh], 1)

    def unfused(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            losses = torch.nn.functional.cross_entropy((h @ weight.T).float(), labels, reduction="none")
            (dh,) = torch.autograd.grad(losses.sum(), h)
        return torch.cat([losses.detach()[:, None], dh], 1)

    def plain(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss, dh, _ = head.linear_cross_entropy(h, weight, labels, None, 1.0, None, None, None, None, None)
        return torch.cat([loss[:, None], dh], 1)

    return x.case("linear_cross_entropy", x.vocabulary, inputs, flop, size, run, unfused, plain)


def _varlen_attention(x: _Layer) -> Case:
    heads, kv_heads, d = x.heads
    counts = {"q_heads": heads, "k_heads": kv_heads, "v_heads": kv_heads, "dout": heads}
    inputs = {name: x.random(x.tokens, count, d, kind=x.kind) for name, count in counts.items()}
    flop = 14 * heads * d * sum(n * (n + 1) // 2 for n in x.lens)  # two products forward, five backward
    size = 4 * x.width * x.tokens * (heads + kv_heads) * d

    def gradients(attend: Callable[..., torch.Tensor], *qkv_dout: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in qkv_dout[:3])
            out = attend(q, k, v)
            grads = torch.autograd.grad(out, (q, k, v), qkv_dout[3])
        return torch.cat([t.detach().flatten(1) for t in (out, *grads)], 1)

    def run(
        q_heads: torch.Tensor,
        k_heads: torch.Tensor,
        v_heads: torch.Tensor,
        dout: torch.Tensor,
        cu_seqlens: torch.Tensor,
        *,
        backend: str,
    ) -> torch.Tensor:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ops.varlen_attention(q, k, v, cu_seqlens, backend=backend)

        return gradients(attend, q_heads, k_heads, v_heads, dout)

    def unfused(
        q_heads: torch.Tensor,
        k_heads: torch.Tensor,
        v_heads: torch.Tensor,
        dout: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        def attend(*qkv: torch.Tensor) -> torch.Tensor:
            sdpa, outs = torch.nn.functional.scaled_dot_product_attention, []
            for i, j in pairwise(cu_seqlens.tolist()):
                q, k, v = (t[None, i:j].transpose(1, 2) for t in qkv)
                outs.append(sdpa(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
            return torch.cat(outs)

        return gradients(attend, q_heads, k_heads, v_heads, dout)

    case = x.case("varlen_attention", x.ff, {**inputs, "cu_seqlens": x.cu}, flop, size, run, unfused)
    case.shape = f"{x.tokens}x{heads}/{kv_heads}x{d}, {len(x.lens)}"
    return case


_MAKERS: Mapping[str, Callable[[_Layer], Case]] = {
    "ghost_dot_lowrank": _ghost_dot_lowrank,
    "ghost_dot": _ghost_dot,
    "ghost_norm_sq": _ghost_norm_sq,
    "ghost_gram": _ghost_gram,
    "ghost_project": _ghost_project,
    "embedding_dot": _embedding_dot,
    "scale_dot": _scale_dot,
    "linear_cross_entropy": _linear_cross_entropy,
    "varlen_attention": _varlen_attention,
}

OPS = tuple(_MAKERS)
"""Ops that have a case, in the order of the table."""
