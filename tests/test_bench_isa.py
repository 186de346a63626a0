"""`bench --isa`: native kernels held below an instruction set, and let go again."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast.bench_isa import limited
from gradshield_fast.errors import BackendUnavailable, InputError
from gradshield_fast.ops import dispatch, ghost_dot, linear_cross_entropy, native
from gradshield_fast.ops.ghost_dot import kernel_native
from gradshield_fast.ops.linear_cross_entropy import kernel_native as head

CPU = torch.device("cpu")
BUILT = pytest.mark.skipif(native.isa() is None, reason=native.missing)


def limits(monkeypatch: pytest.MonkeyPatch, isa: str | None) -> int:
    """The limit that reaches the extension, which stands still meanwhile."""
    seen: list[int] = []

    class Extension:
        def ghost_dot(self, *arguments: object) -> None:
            seen.append(int(str(arguments[-1])))

        def isa(self, limit: int) -> str:
            return native.ISAS[limit]

    monkeypatch.setattr(native, "extension", Extension())
    with limited(isa, CPU):
        ghost_dot(torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3), backend="native")
    return seen[0]


@pytest.mark.parametrize("isa", native.ISAS)
def test_the_limit_reaches_the_kernels_and_ends_with_the_scope(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(monkeypatch, isa) == native.ISAS.index(isa)
    assert limits(monkeypatch, None) == native.BEST
    assert dispatch.room("ghost_dot")["native"] is kernel_native


@BUILT
def test_what_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa", lambda limit=native.BEST: "avx2")
    with pytest.raises(InputError, match="--isa amx does not run here: this processor and this build end at avx2"):
        limited("amx", CPU).__enter__()
    with pytest.raises(InputError, match="--isa limits the native CPU kernels, but the device is cuda"):
        limited("avx2", torch.device("cuda")).__enter__()
    with pytest.raises(InputError, match="--isa must be one of portable"):
        limited("sse", CPU).__enter__()


def test_an_extension_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", None)
    with pytest.raises(InputError, match="--isa limits the native CPU kernels: "):
        limited("portable", CPU).__enter__()


@pytest.mark.skipif(head.level() == 0, reason="the fused head does not run here")
def test_the_head_has_levels_of_its_own() -> None:
    h, weight, labels = torch.randn(4, 32), torch.randn(64, 32), torch.tensor([1, 2, 3, 4])
    with limited("portable", CPU), pytest.raises(BackendUnavailable, match="has no kernel for portable"):
        linear_cross_entropy(h, weight, labels, backend="native")
    best = linear_cross_entropy(h, weight, labels, backend="native").loss
    if native.at_least("avx512"):
        with limited("avx512", CPU):
            assert torch.allclose(linear_cross_entropy(h, weight, labels, backend="native").loss, best)
    assert head.UPTO == 3
