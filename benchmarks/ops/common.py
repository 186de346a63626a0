"""What the op benchmarks share: one parametrised pytest-benchmark test an op.

    python -m pytest benchmarks/ops -o python_files='bench_*.py' [-k smollm2] [--benchmark-json FILE]

Each row is one backend, or plain PyTorch ("unfused", which rounds float32 directions to the inputs' dtype), at the
layer of a real model; caches are overwritten between calls. `gradshield-fast bench` gives the same cases as one table
with rooflines, variants in turns: use that for ratios, this for a history.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from gradshield_fast.errors import BackendUnavailable
from gradshield_fast.op_bench import COLD_BYTES, UNFUSED
from gradshield_fast.op_cases import Case, make_case
from gradshield_fast.ops import available

MODELS = ("smollm2", "llama-3.2-1b")
DTYPES = ("float32", "bfloat16")
TOKENS = 1024
ROUNDS = 7


@cache
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _case(op: str, model: str, dtype: str) -> Case:
    return make_case(op, model, TOKENS, dtype, device())


def bench(op: str) -> Callable[..., None]:
    """Make the benchmark of an op.

    Args:
        op: its name.

    Returns:
        A test function.
    """

    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("variant", [*available()[op], UNFUSED])
    def run(benchmark: Any, variant: str, model: str, dtype: str) -> None:
        case = _case(op, model, dtype)
        call = partial(case.unfused if variant == UNFUSED else partial(case.run, backend=variant), **case.inputs)
        try:
            call()
        except BackendUnavailable as error:
            pytest.skip(str(error))
        scratch = torch.empty(COLD_BYTES.get(device().type, 64 << 20), dtype=torch.uint8, device=device())

        def cold() -> None:
            scratch.zero_()

        def timed() -> None:
            call()
            if device().type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{op} {model} {dtype}"
        benchmark.extra_info.update(
            shape=case.shape,
            bytes=case.bytes,
            flop=case.flop,
            error_over_bound=None if variant == UNFUSED else case.error_over_bound(variant),
            device=torch.cuda.get_device_name() if device().type == "cuda" else f"cpu x{torch.get_num_threads()}",
        )
        benchmark.pedantic(timed, setup=cold, rounds=ROUNDS, warmup_rounds=1)

    run.__name__ = f"test_{op}"
    return run
