"""The memory of a model's scoring step and its rate, measured on this machine on rows of the corpus."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np

from gradshield_fast.chat import Encoded
from gradshield_fast.loading import load_model
from gradshield_fast.packing import pack
from gradshield_fast.pipeline.engine import beyond, given, vocabulary
from gradshield_fast.pipeline.options import DEFAULT_RANK, RunOptions
from gradshield_fast.pipeline.progress import Reporter

BATCHES = 4
"""About as many batches are timed, after one that warms up."""


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        rate: tokens a second.
        tokens: tokens that were timed.
        step: bytes of a step at its peak, above the weights; None where nothing records the device's memory.
        free: bytes that were free before the model was loaded, or None.
        device: the device's name.
    """

    rate: float
    tokens: int
    step: int | None
    free: int | None
    device: str


def measure(options: RunOptions, rows: Sequence[Encoded], reporter: Reporter) -> Measured:
    """Score a few batches against a random direction of the rank that was asked for: its values do not matter.

    Args:
        options: the run.
        rows: rows of the corpus that can be scored.
        reporter: told about the steps.

    Returns:
        What was measured.
    """
    import torch

    from gradshield_fast.direction import Direction
    from gradshield_fast.errors import ScoringError
    from gradshield_fast.loading import pick_device
    from gradshield_fast.memory import choose_batch_tokens, free_bytes, step_memory
    from gradshield_fast.scorer import Scorer

    scoring = options.scoring
    free = free_bytes(pick_device(options.model.device))
    reporter.stage("loading the model")
    model, _ = load_model(**asdict(options.model))
    if options.direction.files:
        loaded = [Direction.load(path, model) for path in options.direction.files]
        direction = loaded[0] if len(loaded) == 1 else Direction.stack(loaded)
    else:
        generator = torch.Generator().manual_seed(0)
        direction = Direction({name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()})
        if options.direction.rank != 0:
            direction = direction.low_rank(rank=options.direction.rank or DEFAULT_RANK)
    known = vocabulary(model)
    items = [(n, row) for n, row in enumerate(rows) if not beyond(row, known)]
    with ExitStack() as stack:
        scorer = stack.enter_context(
            Scorer(
                model,
                direction,
                scoring.backend,
                scoring.loss_reduction,
                norms=scoring.needs_norms,
                compile=scoring.compile,
                checkpoint=scoring.checkpoint,
            )
        )
        reporter.stage("measuring")
        scorer.settle(given(next(pack(items[:1], batch_tokens=1))))
        longest = max(len(row.input_ids) for _, row in items)
        budget = scoring.batch_tokens
        if budget == "auto":
            budget = choose_batch_tokens(scorer, longest).tokens
        try:
            memory = step_memory(scorer)
        except ScoringError:
            memory = None
        padded = scorer.ways.get("packing") != "packed"
        # rows of all lengths, as a part has them: batches begin with the longest
        ends = np.cumsum([len(row.input_ids) for _, row in items])
        items = items[: 1 + int(np.searchsorted(ends, BATCHES * budget))]
        batches = list(pack(items, batch_tokens=budget, window=len(items), padded=padded))
        scorer.score(given(batches[0]))
        begun = time.perf_counter()
        for batch in batches:
            scorer.score(given(batch)).dot.cpu()
        seconds = time.perf_counter() - begun
        tokens = sum(int(batch.cu_seqlens[-1]) for batch in batches)
        weight = next(model.parameters())
        device = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else platform.machine()
    largest = max(budget, longest)
    step = None if memory is None else memory.bytes(largest, largest, -(-largest // longest), longest)
    return Measured(tokens / seconds, tokens, step, free, device)
