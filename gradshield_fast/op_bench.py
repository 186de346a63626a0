"""Timing the ops on this machine: every backend and rival in turns, against the roofs measured in the same run."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table

from gradshield_fast.errors import BackendUnavailable
from gradshield_fast.op_cases import Case
from gradshield_fast.ops import dispatch

COLD_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""What is overwritten between two timed calls, so that none finds its inputs in a cache."""

UNFUSED = "unfused"
COMPILED = "compiled reference"


@dataclass(frozen=True)
class Roofs:
    """What the device was measured to reach.

    Attributes:
        bytes: a second, in a copy: read and written.
        flop: a second, in a square matrix product of the case's dtype.
    """

    bytes: float
    flop: float


@dataclass(frozen=True)
class Timing:
    """One variant of one op at one shape, timed.

    Attributes:
        op: its name.
        backend: a backend's name, "unfused" (PyTorch in the inputs' own dtype) or "compiled reference".
        shape: tokens x d_in x d_out, and the number of examples.
        dtype: of activations and output gradients.
        p50: median milliseconds.
        p90: milliseconds that nine of ten calls stay under.
        calls: how many were timed.
        bytes: least bytes of the formula.
        flop: operations of the formula.
        bound: "memory" or "compute": which roof is the lower one for these bytes and operations.
        of_roof: share of that roof that the median reaches.
        extra_mib: memory taken beyond inputs, in MiB, at its peak; None where the device does not count it.
        error: worst error over what is allowed; None for a rival that rounds, or None where it was not looked at.
        note: why there is no time, else "".
    """

    op: str
    backend: str
    shape: str
    dtype: str
    p50: float
    p90: float
    calls: int
    bytes: float
    flop: float
    bound: str
    of_roof: float
    extra_mib: float | None
    error: float | None
    note: str = ""


def roofs(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Roofs:
    """Measure what the device reaches in a copy and in a matrix product.

    Args:
        device: where.
        dtype: of the product.
        seconds: how long each is repeated.

    Returns:
        The best of the repeated calls each.
    """
    n = 4096 if device.type == "cuda" else 2048
    source = torch.ones(COLD_BYTES.get(device.type, 64 << 20) // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / min(_times([lambda: target.copy_(source)], seconds, device)[0])
    x = torch.ones(n, n, device=device, dtype=dtype)
    return Roofs(copied, 2 * n**3 / min(_times([lambda: x @ x], seconds, device)[0]))


def time_case(
    case: Case,
    device: torch.device,
    roof: Roofs,
    *,
    backends: Sequence[str] = (),
    compiled: bool = False,
    seconds: float = 0.5,
) -> list[Timing]:
    """Time an op's backends and rivals in turns.

    Args:
        case: the op, its inputs and formulas.
        device: where they lie.
        roof: of this device and dtype.
        backends: which; empty: all that the op has.
        compiled: also torch.compile of the reference's formula, where it has no loop over rows.
        seconds: how long each is repeated, at least five calls.

    Returns:
        One timing a variant; one that cannot run has its reason.

    Raises:
        InputError: a backend's name is not known.
        BackendUnavailable: a backend in `backends` cannot run here.
    """
    for name in backends:
        dispatch.check_name(name)
    out: list[Timing] = []
    calls: dict[str, Callable[[], object]] = {}
    for name in backends or dispatch.available()[case.op]:
        call = partial(case.run, **case.inputs, backend=name)
        try:
            call()
            calls[name] = call
        except BackendUnavailable as error:
            if backends:
                raise
            out.append(_absent(case, name, str(error).removeprefix(f"{case.op}: ")))
    ours = tuple(calls)
    calls[UNFUSED] = partial(case.unfused, **case.inputs)
    if compiled and case.plain is not None:
        calls[COMPILED] = partial(torch.compile(case.plain), **case.inputs)
    times = _times(list(calls.values()), seconds, device, cold=True)
    for (name, call), spent in zip(calls.items(), times, strict=True):
        error = case.error_over_bound(name) if name in ours else None
        out.append(_timing(case, name, spent, roof, _extra(call, device), error))
    return out


def bench_table(timings: Sequence[Timing], title: str) -> Table:
    """Lay out timings.

    Args:
        timings: from `time_case`.
        title: what they were measured on.

    Returns:
        A table.
    """
    table = Table(title=title, title_justify="left")
    left = ("op", "backend", "tokens x in x out, rows", "roof")
    right = ("ms p50", "p90", "MB min", "GB/s", "GFLOP", "GFLOP/s")
    for name in (*left[:3], *right, left[3], "% of it", "MiB", "err/bound"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for t in timings:
        if t.note:  # its reason stands below the table
            table.add_row(t.op, t.backend, t.shape, "-")
            continue
        seconds = t.p50 / 1e3
        table.add_row(
            t.op,
            t.backend,
            t.shape,
            f"{t.p50:.3f}",
            f"{t.p90:.3f}",
            f"{t.bytes / 1e6:.1f}",
            f"{t.bytes / 1e9 / seconds:.1f}",
            f"{t.flop / 1e9:.3f}",
            f"{t.flop / 1e9 / seconds:.0f}",
            t.bound,
            f"{100 * t.of_roof:.0f}",
            "-" if t.extra_mib is None else f"{t.extra_mib:.0f}",
            "rounds" if t.error is None else f"{t.error:.2g}",
        )
    return table


def as_json(timing: Timing) -> dict[str, object]:
    """Give a timing as JSON values.

    Args:
        timing: from `time_case`.

    Returns:
        Its attributes; numbers that do not exist are null.
    """
    values = dataclasses.asdict(timing)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _absent(case: Case, name: str, reason: str) -> Timing:
    nan = math.nan
    return Timing(
        case.op, name, case.shape, case.dtype, nan, nan, 0, case.bytes, case.flop, "", nan, None, None, note=reason
    )


def _timing(
    case: Case, name: str, times: Sequence[float], roof: Roofs, extra: float | None, error: float | None
) -> Timing:
    floor_bytes, floor_flop = case.bytes / roof.bytes, case.flop / roof.flop
    median = statistics.median(times)
    return Timing(
        op=case.op,
        backend=name,
        shape=case.shape,
        dtype=case.dtype,
        p50=1e3 * median,
        p90=1e3 * sorted(times)[min(len(times) - 1, math.ceil(0.9 * len(times)) - 1)],
        calls=len(times),
        bytes=case.bytes,
        flop=case.flop,
        bound="memory" if floor_bytes >= floor_flop else "compute",
        of_roof=max(floor_bytes, floor_flop) / median,
        extra_mib=extra,
        error=error,
    )


def _times(
    calls: Sequence[Callable[[], object]], seconds: float, device: torch.device, *, cold: bool = False
) -> list[list[float]]:
    """Time calls in turns, at least five of each, after one that is not counted."""
    scratch = torch.empty(COLD_BYTES.get(device.type, 64 << 20) if cold else 1, dtype=torch.uint8, device=device)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    while any(len(t) < 5 or sum(t) < seconds for t in times):
        for call, spent in zip(calls, times, strict=True):
            scratch.zero_()
            _wait(device)
            begun = time.perf_counter()
            call()
            _wait(device)
            spent.append(time.perf_counter() - begun)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _extra(call: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
