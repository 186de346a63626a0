"""The truth that peers are held against: autograd in float64, one row at a time, on the same rounded weights.

transformers' own norms and rotary embeddings work in float32 inside whatever the model's type, so differences below
about 1e-7 of sum |grad loss * r| say nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.worker import read_work
from benchmarks.workload import linear_weights, open_model
from gradshield_fast import Direction

Truth = dict[str, list[float]]
"""Of a row, for "all" weights and for the "linear" ones: [<grad loss, r>, sum |grad loss * r|]."""


def truths(folder: Path, dtype: str, threads: int | None, deadline: float) -> list[Truth] | None:
    """Work the truths out, going on where an earlier call stopped.

    Args:
        folder: the work folder.
        dtype: type that the model's weights are rounded to.
        threads: threads of torch, or None for its own choice.
        deadline: `time.monotonic` after which to stop.

    Returns:
        One truth a row, or None if the time did not suffice.
    """
    path = folder / f"truth-{dtype}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    about, rows = read_work(folder)
    if len(done) == len(rows):
        return done
    model, _ = open_model(about["model"], dtype, threads)
    model = model.double()
    entries = Direction.load(folder / "direction.safetensors").parts[0]
    linear = set(linear_weights(model))
    weights = {name: weight.requires_grad_(True) for name, weight in model.named_parameters() if name in entries}
    with path.open("a", encoding="utf-8") as file:
        for row in rows[len(done) :]:
            if time.monotonic() > deadline:
                return None
            truth = _row(model, weights, entries, linear, row)
            file.write(json.dumps(truth) + "\n")
            file.flush()
            done.append(truth)
    return done


def _row(model: Any, weights: dict[str, Any], entries: dict[str, Any], linear: set[str], row: Any) -> Truth:
    where = next(model.parameters()).device
    ids, labels = (torch.tensor([x], device=where) for x in (row.input_ids, row.labels))
    logits = model(input_ids=ids, use_cache=False).logits
    targets = labels[:, 1:].flatten()
    # in float64, as row_losses of the benchmarks is not
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], targets, ignore_index=-100)
    sums = {"all": torch.zeros(2, dtype=torch.float64), "linear": torch.zeros(2, dtype=torch.float64)}
    for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True):
        if g is None:
            continue
        product = g * entries[name].to(g)
        both = torch.stack([product.sum(), product.abs_().sum()]).cpu()
        sums["all"] += both
        if name in linear:
            sums["linear"] += both
    return {key: value.tolist() for key, value in sums.items()}
