"""Native CPU kernels against the reference, call by call in turn: `python benchmarks/ops/native_vs_reference.py`.

Prints one line a case: the median of each, their ratio (the median of the ratios of neighbouring calls, so that a busy
machine slows both sides of it), and the bytes that must move over the native time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from gradshield_fast.ops import native
from gradshield_fast.ops.embedding_dot import kernel_native as embedding_native
from gradshield_fast.ops.embedding_dot import reference as embedding_reference
from gradshield_fast.ops.ghost_dot import kernel_native as dense_native
from gradshield_fast.ops.ghost_dot import reference as dense_reference
from gradshield_fast.ops.ghost_dot_lowrank import kernel_native as lowrank_native
from gradshield_fast.ops.ghost_dot_lowrank import reference as lowrank_reference
from gradshield_fast.ops.ghost_norm_sq import kernel_native as norm_native
from gradshield_fast.ops.ghost_norm_sq import reference as norm_reference
from gradshield_fast.ops.ghost_project import kernel_native as project_native
from gradshield_fast.ops.ghost_project import reference as project_reference

SHAPES = [(576, 192), (576, 576), (576, 1536), (1536, 576), (2048, 8192), (8192, 2048)]
"""d_in, d_out of SmolLM2-135M's layers and of a one-billion-parameter model's feed-forward layers."""

Case = tuple[str, ModuleType, ModuleType, str, tuple[torch.Tensor, ...], Callable[[ModuleType], torch.Tensor]]


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        tokens: rows of a and g.
        d_in: columns of a.
        d_out: columns of g.
        rank: columns of a low-rank direction, and of each side of a projection.
        row: tokens of one example.
        dtype: of a and g.
    """

    tokens: int
    d_in: int
    d_out: int
    rank: int
    row: int
    dtype: torch.dtype


def cases(o: Options) -> Iterator[Case]:
    """The calls of one shape: op, its modules, function, the tensors that must move, the call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    a, g = random(o.tokens, o.d_in, dtype=o.dtype), random(o.tokens, o.d_out, dtype=o.dtype)
    p, q, member = random(o.d_out, o.rank), random(o.d_in, o.rank), torch.ones(o.rank, 1)
    z, r = random(o.tokens, o.rank), random(1, o.d_out, o.d_in)
    cu = torch.tensor([*range(0, o.tokens, o.row), o.tokens])
    vocabulary = 49152
    ids = torch.randint(vocabulary, (o.tokens,), generator=generator)

    low = (lowrank_native, lowrank_reference)
    yield "ghost_dot_lowrank", *low, "lowrank_project", (a, q), lambda m: m.lowrank_project(a, q)
    yield "ghost_dot_lowrank", *low, "lowrank_contract", (g, p, z), lambda m: m.lowrank_contract(z, g, p, member)
    dense = (dense_native, dense_reference)
    yield "ghost_dot", *dense, "ghost_dot", (a, g, r), lambda m: m.ghost_dot(a, g, r)
    two = (project_native, project_reference)
    yield "ghost_project", *two, "ghost_project", (a, g), lambda m: m.ghost_project(a, g, q, p, cu)
    norm = (norm_native, norm_reference)
    yield "ghost_norm_sq", *norm, f"rows of {o.row}", (a, g), lambda m: m.ghost_inner(g, a, g, a, cu)
    if o.d_in <= 2048:
        table = random(1, vocabulary, o.d_in)
        rows = (embedding_native, embedding_reference)
        yield "embedding_dot", *rows, "embedding_dot", (a, a.float()), lambda m: m.embedding_dot(ids, a, table)


class Limited(ModuleType):
    """A native module whose kernels stay at or below an instruction set."""

    def __init__(self, module: ModuleType, isa: int) -> None:
        super().__init__(module.__name__)
        self.module, self.isa = module, isa

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:
        return partial(getattr(self.module, name), isa=self.isa)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="*", help="all by default")
    parser.add_argument("--tokens", nargs="*", type=int, default=[256, 1024, 4096])
    parser.add_argument("--shapes", nargs="*", help="such as 576x1536; all by default")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--row", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--isa", choices=native.ISAS, default=native.ISAS[-1], help="run nothing above it")
    args = parser.parse_args()
    limit = native.ISAS.index(args.isa)
    shapes = [(int(i), int(o)) for i, _, o in (s.partition("x") for s in args.shapes or [])] or SHAPES
    print(f"{native.isa(limit)}, torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'op':18} {'call':17} {'tokens':>6} {'d_in':>5} {'d_out':>5} {'dtype':9} {'thr':>3} ", end="")
    print(f"{'native us':>10} {'reference us':>12} {'ratio':>6} {'GB/s':>6}")
    settings: list[tuple[tuple[int, int], tuple[int, str]]]
    settings = list(itertools.product(shapes, itertools.product(args.tokens, args.dtypes)))
    for (d_in, d_out), (tokens, dtype) in settings:
        options = Options(tokens, d_in, d_out, args.rank, args.row, getattr(torch, dtype))
        for op, fast, slow, name, moved, call in cases(options):
            if args.ops and op not in args.ops:
                continue
            fast = Limited(fast, limit)
            for threads in args.threads:
                torch.set_num_threads(threads)
                timed(lambda: (call(fast), call(slow)))  # noqa: B023
                pairs = [(timed(lambda: call(fast)), timed(lambda: call(slow))) for _ in range(args.repeats)]  # noqa: B023
                mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(y / x for x, y in pairs)
                rate = sum(x.numel() * x.element_size() for x in moved) / mine / 1e9
                print(f"{op:18} {name:17} {tokens:6} {d_in:5} {d_out:5} {dtype:9} {threads:3} ", end="")
                print(f"{1e6 * mine:10.0f} {1e6 * theirs:12.0f} {ratio:6.2f} {rate:6.1f}", flush=True)


if __name__ == "__main__":
    main()
