"""What `gradshield-fast bench` prints: a table, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from gradshield_fast.bench_isa import limited
from gradshield_fast.loading import pick_device
from gradshield_fast.op_bench import as_json, bench_table, roofs, time_case
from gradshield_fast.op_cases import DTYPES, OPS, make_case
from gradshield_fast.pipeline.progress import Reporter

WIDTH = 150
"""Columns that the table takes at least."""


def print_timings(
    ops: Sequence[str],
    model: str,
    tokens: int,
    rank: int,
    dtype: str,
    device: str,
    backends: Sequence[str],
    compiled: bool,
    isa: str | None,
    seconds: float,
    as_lines: bool,
    console: Console,
    reporter: Reporter,
) -> None:
    """Time ops and print what came out.

    Args:
        ops: which; empty: all that have a case.
        model: whose layer.
        tokens: rows of a and g.
        rank: of the low-rank direction.
        dtype: of activations and output gradients.
        device: a torch device, or "auto".
        backends: which; empty: all that the op has.
        compiled: also torch.compile of the reference.
        isa: the highest instruction set that native CPU kernels may use; None: no limit.
        seconds: how long each is repeated.
        as_lines: JSON instead of a table.
        console: where the table goes.
        reporter: where progress goes.

    Raises:
        InputError: an option is not known, or the device or the instruction set cannot be used.
    """
    where = pick_device(device)
    about: dict[str, Any] = {"device": _device_name(where), "torch": torch.__version__}
    if isa is not None:
        about["isa"] = isa
    timings = []
    roof = None
    for op in ops or OPS:
        case = make_case(op, model, tokens, dtype, where, rank=rank)
        roof = roof or roofs(where, DTYPES[dtype])
        reporter.stage(f"timing {op}")
        with limited(isa, where):
            timings += time_case(case, where, roof, backends=backends, compiled=compiled, seconds=seconds)
    if roof is None:
        return
    if as_lines:
        measured = {"copy_gb_s": round(roof.bytes / 1e9, 2), "matmul_gflop_s": round(roof.flop / 1e9, 1)}
        for timing in timings:
            print(json.dumps({**as_json(timing), "model": model, **measured, **about}))
        return
    title = (
        f"{about['device']}, torch {about['torch']}; copy {roof.bytes / 1e9:.0f} GB/s, "
        f"{dtype} matrix product {roof.flop / 1e9:.0f} GFLOP/s; layer of {model}"
    )
    if isa is not None:
        title += f", native kernels up to {isa}"
    # a table cut to 80 columns says nothing; a narrow terminal wraps its lines instead
    Console(file=console.file, width=max(console.width, WIDTH)).print(bench_table(timings, title))
    for timing in timings:
        if timing.note:
            console.print(f"{timing.op}, {timing.backend}: {timing.note}", soft_wrap=True, highlight=False)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
