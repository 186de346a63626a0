"""Every Triton kernel compiled without a GPU: nothing spills, budgets hold, the matrix instructions are there.

Hopper gets every tiling with every set of types, the others every tiling with the first types of it;
`python -m tests.kernels.triton.aot` compiles all.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.triton import aot
from tests.kernels.triton.variants import VARIANTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter's functions cannot be compiled"),
]

KERNELS = sorted({variant.kernel.__name__ for variant in VARIANTS})


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Compile afresh, and leave no files in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_within_its_budget(kernel: str, target: str) -> None:
    faults, orders = [], {}
    for _, variant, group, tiling in aot.cases([target], first_only=target != "sm_90"):
        if variant.kernel.__name__ == kernel:
            report = aot.check(target, variant, tiling)
            faults += [f"{report.case}: {fault}" for fault in report.faults]
            # one group, one order of sums, or its members would not give the same bits
            order = orders.setdefault((variant.name, group), report.order)
            faults += [f"{report.case}: sums {report.order}, not {order}"] * (report.order != order)
    assert not faults, "\n".join(faults)


def test_another_order_of_sums_is_seen() -> None:
    """What `order_of_sums` tells apart, and what not."""
    variant = next(v for v in VARIANTS if v.kernel.__name__ == "ghost_dot_kernel")
    first = variant.tilings.first
    others = {
        "stages": (first.but(stages=2), True),
        "the order of programs": (first.but({"GROUP": 4}), True),
        "way of copying": (first.but(descriptors=True), True),
        "steps along the depth": (first.but({"BLOCK_I": 16}), False),
        "rows of the sum": (first.but({"BLOCK_O": 64}), False),
    }
    order = aot.check("sm_90", variant, first).order
    assert any("sum of 128" in line for line in order)
    assert any("in steps of 32" in line for line in order)
    for name, (tiling, same) in others.items():
        assert (aot.check("sm_90", variant, tiling).order == order) == same, name


def test_every_kernel_and_tiling_has_a_variant() -> None:
    root = Path(__file__).parents[3] / "gradshield_fast" / "ops"
    written = {
        line.split("def ")[1].split("(")[0]
        for path in root.glob("*/kernel_triton.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert written == set(KERNELS)
    rooms = {variant.kernel.fn.__globals__["__name__"]: variant.kernel.fn.__globals__ for variant in VARIANTS}
    tried = {id(variant.tilings) for variant in VARIANTS}
    for name, room in rooms.items():
        missing = [tilings for tilings in room["TILINGS"] if id(tilings) not in tried]
        assert not missing, f"{name}: {missing}"


def test_a_block_of_the_sum_is_added_apart() -> None:
    """Folded into the product's accumulator it would be rounded towards zero thousands of times, in one direction."""
    from triton.compiler import compile as compile_kernel

    for variant in VARIANTS:
        if variant.kernel.__name__ == "project_kernel":
            source = aot.source(variant, variant.tilings.first)
            options = {"num_warps": variant.tilings.first.warps, "num_stages": 1, "enable_fp_fusion": True}
            text = compile_kernel(source, target=aot.TARGETS["sm_90"], options=options).asm["ttgir"]
            assert "arith.addf" in text, variant.name
