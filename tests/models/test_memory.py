"""Scoring holds no per-example gradient: its peak is near that of a plain forward and backward pass, weights frozen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from gradshield_fast import Direction, Scorer

ROWS, TOKENS = 16, 40


def peak_bytes(run: Callable[[], object], trace: Path) -> int:
    """Highest number of bytes that torch's CPU allocator held during a call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    recorded.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    held = [e["args"]["Total Allocated"] for e in events]
    return max(held) - (held[0] - events[0]["args"]["Bytes"])


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # the profiler's own
def test_peak_memory_is_within_half_again_of_a_frozen_forward_and_backward(rank: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    direction = Direction({name: torch.randn(w.shape) for name, w in model.named_parameters()})
    ids = torch.randint(3, 512, (ROWS, TOKENS))
    batch = {"input_ids": ids, "labels": ids.clone()}

    def plain() -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    with Scorer(model, direction if rank is None else direction.low_rank(rank)) as scorer:
        scorer.score(batch)  # calibration is paid before
        scoring = peak_bytes(lambda: scorer.score(batch), tmp_path / "scoring.json")
    base = peak_bytes(plain, tmp_path / "plain.json")
    per_example = ROWS * 4 * sum(w.numel() for w in model.parameters())
    print(f"scoring {scoring / base:.2f} times a plain pass")
    assert scoring <= 1.5 * base
    assert scoring < per_example  # the bound means something: the gradients alone would be more
