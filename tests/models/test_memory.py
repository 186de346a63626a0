"""Scoring holds no per-example gradient, less with checkpoints, and a formula says how much a batch will take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from gradshield_fast import Direction, Scorer
from gradshield_fast.memory import (
    CPU_MOST,
    StepMemory,
    _cgroups_free,
    _machine_free,
    choose_batch_tokens,
    free_bytes,
    step_memory,
)

ROWS, TOKENS = 16, 40

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),  # the profiler's own
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # of torch.compile's imports
]


def peak_bytes(run: Callable[[], object], trace: Path) -> int:
    """Highest number of bytes that torch's CPU allocator held during a call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    recorded.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    held = [e["args"]["Total Allocated"] for e in events]
    return max(held) - (held[0] - events[0]["args"]["Bytes"])


def llama(hidden: int = 96, layers: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=96, n_layer=4, n_head=4, n_positions=1024)
    return AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)


def random_direction(model: Any, rank: int | None) -> Direction:
    dense = Direction({name: torch.randn(w.shape) for name, w in model.named_parameters()})
    return dense if rank is None else dense.low_rank(rank)


def random_batch(rows: int, tokens: int, response: int, *, ragged: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 512, (rows, tokens))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : tokens - response] = -100
    if ragged:
        mask[1::2, tokens // 2 :] = 0
        labels[mask == 0] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def plain_step(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A stock forward and backward pass through frozen weights."""

    def run() -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    return run


@pytest.mark.parametrize("rank", [None, 4])
def test_peak_memory_is_within_half_again_of_a_frozen_forward_and_backward(rank: int | None, tmp_path: Path) -> None:
    model = llama()
    batch = random_batch(ROWS, TOKENS, TOKENS)
    with Scorer(model, random_direction(model, rank)) as scorer:
        scorer.score(batch)  # calibration is paid before
        scoring = peak_bytes(lambda: scorer.score(batch), tmp_path / "scoring.json")
    base = peak_bytes(plain_step(model, batch["input_ids"]), tmp_path / "plain.json")
    per_example = ROWS * 4 * sum(w.numel() for w in model.parameters())
    print(f"scoring {scoring / base:.2f} times a plain pass")
    assert scoring <= 1.5 * base
    assert scoring < per_example  # the bound means something: the gradients alone would be more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_halve_the_memory_of_a_frozen_forward_and_backward(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(256, 8).to(dtype)
    batch = random_batch(8, 128, 128)
    base = peak_bytes(plain_step(model, batch["input_ids"]), tmp_path / "plain.json")
    direction, share = random_direction(model, 4), {}
    for checkpoint in (False, True):
        with Scorer(model, direction, checkpoint=checkpoint) as scorer:
            scorer.score(batch)
            peak = peak_bytes(lambda score=scorer.score: score(batch), tmp_path / "scoring.json")
            share[checkpoint] = peak / base
    print(f"{share[False]:.2f} times a plain pass, with checkpoints {share[True]:.2f}")
    assert share[True] < 0.5


WAYS: dict[str, tuple[Callable[[], Any], int | None, dict[str, Any]]] = {
    "llama": (llama, 4, {}),
    "wide llama in bfloat16": (lambda: llama(256, 6).to(torch.bfloat16), 4, {}),
    "dense direction": (llama, None, {}),
    "norms": (llama, 4, {"norms": True}),
    "checkpoint": (lambda: llama(192, 5), 4, {"checkpoint": True}),
    "gpt2": (gpt2, 4, {}),
    "padded rows, own attention": (lambda: gpt2(attn_implementation="eager"), 4, {"own": True}),
    "compile": (llama, 4, {"compile": True}),
}

SHAPES = [(24, 64, 63, False), (8, 192, 60, True), (2, 640, 639, False)]
"""Rows, tokens of a row, labelled tokens of a row, every other row half as long."""


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.slow) if w == "compile" else w for w in WAYS])
def test_the_formula_is_near_the_measured_peak(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, rank, options = WAYS[way]
    options = dict(options)
    if options.pop("own", False):
        monkeypatch.setattr("gradshield_fast.attention.why_not", lambda model: "not in this test")
    model = make()
    with Scorer(model, random_direction(model, rank), **options) as scorer:
        scorer.settle(random_batch(2, 16, 15))
        formula = step_memory(scorer)
        for rows, tokens, response, ragged in SHAPES:
            batch = random_batch(rows, tokens, response, ragged=ragged)
            measured = peak_bytes(lambda b=batch: scorer.score(b), tmp_path / "scoring.json")
            packed = scorer.ways["packing"] == "packed"
            given = int(batch["attention_mask"].sum()) if packed else rows * tokens
            labelled = int((batch["labels"][:, 1:] != -100).sum())
            ratio = formula.bytes(given, labelled, rows, tokens) / measured
            print(f"{way}, {rows} x {tokens}: {measured / 1e6:.1f} MB, the formula gives {ratio:.3f} of it")
            assert 0.87 < ratio < 1.15


def test_the_largest_batch_that_fits_is_a_power_of_two() -> None:
    memory = StepMemory(1000.0, 100.0, 5000.0, 900.0, 0.5, every_row=False)
    assert memory.largest(memory.bytes(4096, 4096, 8, 512), longest=512, most=None) == 4096
    assert memory.largest(memory.bytes(4096, 4096, 8, 512) - 1, longest=512, most=None) == 2048
    assert memory.largest(10**12, longest=512, most=2048) == 2048
    assert memory.largest(0, longest=512, most=2048) == 256
    square = StepMemory(0.0, 0.0, 0.0, 0.0, 1.0, every_row=True)
    assert square.largest(2048 * 512, longest=512, most=None) == 2048


@pytest.mark.parametrize(
    ("entry", "group", "names"),
    [
        ("0::/a/b", "a", ("memory.max", "memory.current", "inactive_file")),
        ("0::/not/mounted/here", "", ("memory.max", "memory.current", "inactive_file")),
        ("7:cpu,memory:/a", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_control_groups_limit_counts(entry: str, group: str, names: tuple[str, str, str], tmp_path: Path) -> None:
    (tmp_path / "own").write_text(f"3:cpuset:/x\n{entry}\n")
    root = tmp_path / "groups"
    (root / "a" / "b").mkdir(parents=True)
    folder = root / group
    folder.mkdir(parents=True, exist_ok=True)
    (root / "a" / "b" / "memory.max").write_text("max\n")
    (folder / names[0]).write_text("1000\n")
    (folder / names[1]).write_text("900\n")
    (folder / "memory.stat").write_text(f"anon 300\n{names[2]} 50\n")
    assert _cgroups_free(tmp_path / "own", root) == [150]


def test_free_memory_is_what_the_machine_says_at_the_most(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       3 kB\n")
    assert _machine_free(tmp_path / "meminfo") == 3072
    assert _machine_free(tmp_path / "nothing") is None
    assert _cgroups_free(tmp_path / "nothing", tmp_path) == []
    assert free_bytes(torch.device("meta")) is None


def test_a_batch_is_chosen_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    with Scorer(model, random_direction(model, 4)) as scorer:
        scorer.settle(random_batch(2, 16, 15))
        choice = choose_batch_tokens(scorer, 100)
        assert choice.memory is not None
        assert choice.tokens == CPU_MOST
        assert choice.why == "larger is not faster"
        tight = 2 * choice.memory.bytes(600, 600, 6, 100)
        monkeypatch.setattr("gradshield_fast.memory.free_bytes", lambda device: tight)
        assert choose_batch_tokens(scorer, 100).tokens == 512
        monkeypatch.setattr("gradshield_fast.memory.free_bytes", lambda device: None)
        assert choose_batch_tokens(scorer, 100).tokens == 2048
