"""Float32 linear layers by our own products: measured or preferred, right by autograd, and gone when the scope ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradshield_fast import Scorer, products
from gradshield_fast.ops import measured, native
from tests.models.test_ways import LENGTHS, assert_right
from tests.models.zoo import ZOO, direction_over, make, rows_of

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.missing)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_LOADED", {})
    monkeypatch.setattr(products, "SMALL", 1)


@pytest.mark.parametrize("name", ZOO)
def test_scores_and_norms_are_right(name: str) -> None:
    measured.prefer("linear", "native")
    model = make(name, torch.float32)
    direction = direction_over(model)
    with Scorer(model, direction) as it:
        out, ways = it.score(rows_of(LENGTHS)), it.ways
        used = {use.split(" @ ")[0] for uses in it.methods.values() for use in uses}
    assert_right(out, name, model, direction)
    if used <= products.METHODS and products.faster(model, "auto"):
        assert ways["products"] == "ours: measured faster here, or preferred"
    else:
        assert "products" not in ways
    assert not [module for module in model.modules() if "forward" in vars(module)]
    measured.prefer("linear", "torch")
    with Scorer(model, direction, norms=True) as it:
        plain = it.score(rows_of(LENGTHS)).norm
        assert "products" not in it.ways
    measured.prefer("linear", "native")
    with Scorer(model, direction, norms=True) as it:
        norm = it.score(rows_of(LENGTHS)).norm
    assert norm is not None
    assert plain is not None
    torch.testing.assert_close(norm, plain, rtol=1e-4, atol=0)


def test_checkpointed_layers_take_them() -> None:
    measured.prefer("linear", "native")
    model = make("llama", torch.float32)
    direction = direction_over(model)
    with Scorer(model, direction, checkpoint=True) as it:
        assert_right(it.score(rows_of(LENGTHS)), "llama", model, direction)
        assert it.ways["products"].startswith("ours")


@pytest.mark.parametrize(
    ("milliseconds", "taken"), [({"torch": 5.0, "native": 2.0}, True), ({"torch": 5.0, "native": 4.5}, False)]
)
def test_the_clock_decides(milliseconds: dict[str, float], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(call: Any) -> float:
        call()
        return milliseconds["torch" if call.func is torch.mm else "native"]

    monkeypatch.setattr(measured, "cpu_milliseconds", clock)
    assert products.faster(make("llama", torch.float32), "auto") is taken


def test_a_backend_asked_for_by_name_is_what_runs() -> None:
    measured.prefer("linear", "native")
    model = make("llama", torch.float32)
    with Scorer(model, direction_over(model), "reference") as it:
        it.score(rows_of(LENGTHS))
        assert "products" not in it.ways
        # attention by rows has no other kernel on a CPU
        assert {it.backends[op] for op in it.backends if op != "varlen_attention"} == {"reference"}


def test_other_types_and_small_layers_stay_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.prefer("linear", "native")
    assert not products.faster(make("llama", torch.bfloat16), "auto")
    monkeypatch.setattr(products, "SMALL", 1 << 17)
    assert not products.faster(make("llama", torch.float32), "auto")


def test_wrong_products_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.prefer("linear", "native")
    right = products.lowrank_project
    monkeypatch.setattr(products, "lowrank_project", lambda *args, **options: right(*args, **options) * 1.01)
    model = make("llama", torch.float32)
    direction = direction_over(model)
    with Scorer(model, direction) as it:
        assert_right(it.score(rows_of(LENGTHS)), "llama", model, direction)
        assert "differs" in it.ways["products"]
