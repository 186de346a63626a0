"""A first look at the ops' speed on this machine: one layer's shape, the median of repeated calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.table import Table

from gradshield_fast.errors import BackendUnavailable, InputError
from gradshield_fast.loading import pick_device

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Timing:
    """One op, timed.

    Attributes:
        op: its name.
        backend: what ran it.
        milliseconds: median.
        bytes: what its inputs take, read once.
        flop: floating-point operations of its formula.
    """

    op: str
    backend: str
    milliseconds: float
    bytes: int
    flop: int


def bench(
    tokens: int, d_in: int, d_out: int, rank: int, *, dtype: str = "float32", device: str = "auto", seconds: float = 1.0
) -> list[Timing]:
    """Time the ghost dot products, and before them the layer's own matrix product as a yardstick.

    Args:
        tokens: rows of a and g.
        d_in: columns of a.
        d_out: columns of g.
        rank: of the low-rank direction.
        dtype: of a and g; directions are float32.
        device: a torch device, or "auto".
        seconds: how long each is repeated.

    Returns:
        One timing an op and backend.

    Raises:
        InputError: the dtype is not one of the three, or the device cannot be used.
    """
    import torch

    from gradshield_fast.ops import dispatch, ghost_dot, ghost_dot_lowrank

    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}: got {dtype!r}")
    where, kind = pick_device(device), getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int, to: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device=where, dtype=to)

    a, g, r = random(tokens, d_in, kind), random(tokens, d_out, kind), random(d_out, d_in)
    p, q, weight = random(d_out, rank), random(d_in, rank), random(d_out, d_in, kind)
    rows = torch.tensor([0, tokens], dtype=torch.int32, device=where)
    dense, low = 2 * tokens * d_out * (d_in + 1), 2 * tokens * rank * (d_in + d_out + 1)

    def timed(op: str, backend: str, call: Callable[[], object], inputs: Sequence[torch.Tensor], flop: int) -> Timing:
        times = _repeat(call, seconds, torch.cuda.synchronize if where.type == "cuda" else None)
        size = sum(x.numel() * x.element_size() for x in inputs)
        return Timing(op, backend, 1e3 * statistics.median(times), size, flop)

    out = [timed("a @ weight.T", "torch", lambda: a @ weight.T, (a, weight), 2 * tokens * d_in * d_out)]
    built = dispatch.available()
    # a backend that cannot run these inputs here has no row
    for name in built["ghost_dot"]:
        call = partial(ghost_dot, a, g, r, rows, backend=name)
        with suppress(BackendUnavailable):
            out.append(timed("ghost_dot", name, call, (a, g, r), dense))
    for name in built["ghost_dot_lowrank"]:
        call = partial(ghost_dot_lowrank, a, g, p, q, rows, backend=name)
        with suppress(BackendUnavailable):
            out.append(timed(f"ghost_dot_lowrank {rank}", name, call, (a, g, p, q), low))
    return out


def bench_table(timings: Sequence[Timing], title: str) -> Table:
    """Lay out timings.

    Args:
        timings: from `bench`.
        title: shape, type and device.

    Returns:
        A table.
    """
    table = Table(title=title, title_justify="left")
    for name in ("op", "backend", "ms", "MB", "GB/s", "GFLOP", "GFLOP/s"):
        table.add_column(name, justify="left" if name in ("op", "backend") else "right")
    for t in timings:
        seconds = t.milliseconds / 1e3
        table.add_row(
            t.op,
            t.backend,
            f"{t.milliseconds:.3f}",
            f"{t.bytes / 1e6:.1f}",
            f"{t.bytes / 1e9 / seconds:.1f}",
            f"{t.flop / 1e9:.3f}",
            f"{t.flop / 1e9 / seconds:.1f}",
        )
    return table


def _repeat(call: Callable[[], object], seconds: float, wait: Callable[[], None] | None) -> list[float]:
    """Time calls, at least three, after one that is not counted."""
    times: list[float] = []
    call()
    while len(times) < 3 or sum(times) < seconds:
        if wait is not None:
            wait()
        begun = time.perf_counter()
        call()
        if wait is not None:
            wait()
        times.append(time.perf_counter() - begun)
    return times
