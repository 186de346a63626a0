"""The choice among tilings: measured once, kept, and never one whose last bits another run could lack."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gradshield_fast.doctor import measured_backends, prefer_backends
from gradshield_fast.ops import measured
from gradshield_fast.ops.embedding_dot import kernel_triton as embedding
from gradshield_fast.ops.ghost_dot import kernel_triton as dense
from gradshield_fast.ops.ghost_dot_lowrank import kernel_triton as lowrank
from gradshield_fast.ops.ghost_norm_sq import kernel_triton as norm
from gradshield_fast.ops.ghost_project import kernel_triton as project
from gradshield_fast.ops.linear_cross_entropy import kernel_triton as head
from gradshield_fast.ops.scale_dot import kernel_triton as scale
from gradshield_fast.ops.triton_support import Tiling
from gradshield_fast.ops.triton_tuning import Device, choose, described, pick, runnable, tilings

H100 = Device("a Hopper", 227 * 1024, descriptors=True)
ADA = Device("an Ada", 99 * 1024, descriptors=False)
AMD = Device("an MI300", 64 * 1024, descriptors=False, amd=True)

RULE = Tiling({"BLOCK_T": 64}, warps=4, stages=3, shared=50 * 1024, registers=128)
DEEP = RULE.but(stages=4, shared=120 * 1024)
COPIED = RULE.but(descriptors=True)
OTHER = RULE.but({"BLOCK_T": 128})
GIVEN = tilings((RULE, DEEP, COPIED), (OTHER,))
INPUTS = [torch.zeros(100, 64)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_LOADED", {})
    return tmp_path / "gradshield_fast" / "backends.json"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as another process."""
    monkeypatch.setattr(measured, "_LOADED", {})


def race(
    speeds: dict[str, float], device: Device = H100, *, descriptors: bool = True, inputs: Any = INPUTS
) -> tuple[Tiling, list[str]]:
    """Which tiling is chosen with these times, 1.0 for others, and which were run, in order."""
    ran: list[str] = []

    def call(tiling: Tiling) -> str:
        ran.append(tiling.label)
        return tiling.label

    def clock(run: Callable[[], Any]) -> float:
        return speeds.get(run(), 1.0)

    return pick("a_kernel", GIVEN, inputs, call, device, clock, descriptors=descriptors), ran


def test_the_fastest_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, ran = race({OTHER.label: 0.5})
    assert chosen is OTHER
    assert len(ran) == 4 * (measured.ROUNDS + 1)
    forget(monkeypatch)
    assert race({DEEP.label: 0.1}) == (OTHER, [])
    assert race({DEEP.label: 0.1}, inputs=[torch.zeros(200, 64)])[0] is DEEP
    entry = json.loads(cache.read_text())["entries"]["a_kernel, aligned | a Hopper | float32[128,64]"]
    assert entry["backend"] == "T128 w4 s3"
    assert entry["milliseconds"] == {RULE.label: 1.0, DEEP.label: 1.0, COPIED.label: 1.0, OTHER.label: 0.5}


def test_a_small_gain_is_noise() -> None:
    assert race({OTHER.label: 0.98})[0] is RULE


def test_inputs_that_cannot_be_described_are_a_class_of_their_own() -> None:
    assert race({COPIED.label: 0.5})[0] is COPIED
    chosen, ran = race({COPIED.label: 0.5}, descriptors=False)
    assert chosen is RULE
    assert COPIED.label not in ran


def test_without_a_place_to_keep_it_no_choice_changes_bits(cache: Path) -> None:
    cache.parent.write_text("a file in the way")
    assert race({OTHER.label: 0.1, DEEP.label: 0.5})[0] is DEEP
    assert race({OTHER.label: 0.1}) == (DEEP, [])


def test_what_another_process_kept_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    mine: dict[Path, Any] = {}
    monkeypatch.setattr(measured, "_LOADED", mine)
    measured.measurements()  # read before the other one writes
    forget(monkeypatch)
    assert race({OTHER.label: 0.5})[0] is OTHER
    monkeypatch.setattr(measured, "_LOADED", mine)
    chosen, ran = race({DEEP.label: 0.5})
    assert ran
    assert chosen is OTHER


def test_two_processes_keep_both_entries(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine: dict[Path, Any] = {}
    monkeypatch.setattr(measured, "_LOADED", mine)
    measured.measurements()
    forget(monkeypatch)
    race({}, H100)
    monkeypatch.setattr(measured, "_LOADED", mine)
    race({}, ADA)
    assert len(json.loads(cache.read_text())["entries"]) == 2


def test_nothing_is_timed_while_a_graph_is_captured() -> None:
    def call(tiling: Tiling) -> None:
        raise AssertionError(tiling)

    assert pick("a_kernel", GIVEN, INPUTS, call, H100, None, descriptors=True) is RULE
    race({OTHER.label: 0.5})
    assert pick("a_kernel", GIVEN, INPUTS, call, H100, None, descriptors=True) is OTHER


def test_nothing_is_timed_on_a_cpu_or_without_work() -> None:
    def call(tiling: Tiling) -> None:
        raise AssertionError(tiling)

    assert choose("a_kernel", GIVEN, INPUTS, call) is RULE
    assert race({OTHER.label: 0.5}, inputs=[torch.zeros(0, 64)]) == (RULE, [])


def test_a_tiling_that_breaks_is_out_of_the_race() -> None:
    def call(tiling: Tiling) -> None:
        if tiling is not DEEP:
            raise RuntimeError("out of resources")

    def clock(run: Callable[[], Any]) -> float:
        run()
        return 1.0

    assert pick("a_kernel", GIVEN, INPUTS, call, H100, clock, descriptors=True) is DEEP


def test_what_a_device_cannot_take_is_left_out_by_rule() -> None:
    assert runnable(GIVEN, H100, descriptors=True) == GIVEN.groups
    assert runnable(GIVEN, ADA, descriptors=True) == ((RULE,), (OTHER,))
    # two stages are all that AMD's compiler takes: DEEP would be the same kernel again
    assert runnable(GIVEN, AMD, descriptors=True) == ((RULE,), (OTHER,))
    small = Device("small", 16 * 1024, descriptors=True)
    assert runnable(GIVEN, small, descriptors=True) == ((RULE,),)
    only_deep = tilings((replace(RULE, shared=200 * 1024), DEEP), (OTHER,))
    assert runnable(only_deep, ADA, descriptors=True) == ((OTHER,),)


def test_doctor_shows_and_clears_the_choice() -> None:
    race({OTHER.label: 0.5})
    ((key, said),) = measured_backends()
    assert key == "a_kernel, aligned | a Hopper | float32[128,64]"
    assert said.startswith("T128 w4 s3 (T64 w4 s3 1.000 ms, ")
    prefer_backends((), clear=True)
    assert measured_backends() == []
    assert race({})[0] is RULE


def test_which_matrices_can_be_described() -> None:
    x = torch.zeros(12, 72, dtype=torch.bfloat16)
    assert described(x, torch.zeros(2, 8, 4))
    assert not described(x, x[:, 1:])  # begins beside a multiple of 16 bytes
    assert described(x[:, 8:64])
    assert not described(torch.zeros(12, 70, dtype=torch.bfloat16))
    assert not described(x.T)
    assert not described(x[:1].expand(12, -1))
    assert not described(x[:0])


def test_labels_tell_tilings_apart() -> None:
    for room in (dense, lowrank, embedding, scale, norm, project, head):
        for given in room.TILINGS:
            assert len({tiling.label for tiling in given.all}) == len(given.all)
