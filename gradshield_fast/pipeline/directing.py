"""Where a run's direction comes from: files, or the gradient of a safety score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradshield_fast.pipeline.options import DEFAULT_RANK, DirectionOptions
from gradshield_fast.pipeline.progress import Reporter

if TYPE_CHECKING:
    from gradshield_fast.direction import Direction


def make_direction(model: Any, tokenizer: Any, options: DirectionOptions, reporter: Reporter) -> Direction:
    """Load or build the direction, and compress it.

    Args:
        model: the model that will be scored.
        tokenizer: its tokenizer.
        options: which direction.
        reporter: told about the probes.

    Returns:
        The direction, with its origin in `meta`.
    """
    from gradshield_fast.direction import Direction

    rank = options.rank
    if options.files:
        loaded = [Direction.load(path, model) for path in options.files]
        direction = loaded[0] if len(loaded) == 1 else Direction.stack(loaded)
    else:
        direction = _build(model, tokenizer, options, reporter)
        if options.passes > 1:
            return direction
        if rank is None and options.energy is None:
            rank = DEFAULT_RANK
    if rank or options.energy is not None:
        reporter.stage("compressing the direction")
        direction = direction.low_rank(rank=rank or None, energy=options.energy)
    return direction


def describe(direction: Direction) -> dict[str, Any]:
    """Describe a direction for the record of a run.

    Args:
        direction: the direction.

    Returns:
        JSON values.
    """
    return {
        "summary": repr(direction),
        "count": direction.count,
        "weights": len(direction.names),
        "norm": direction.norm,
        "residual": direction.residual,
        "meta": direction.meta,
    }


def _build(model: Any, tokenizer: Any, options: DirectionOptions, reporter: Reporter) -> Direction:
    from gradshield_fast.direction import Direction
    from gradshield_fast.safety import SafetyProbes

    probes = SafetyProbes.load(options.probes) if options.probes else SafetyProbes.default()
    done = 0

    def advance(count: int, total: int) -> None:
        nonlocal done
        if done == 0:
            reporter.stage("direction", total, "answers")
        reporter.advance(count - done)
        done = count

    reporter.stage("direction")
    direction = Direction.from_probes(
        model,
        tokenizer,
        probes,
        score=options.score,
        weights=options.weights,
        batch_tokens=options.batch_tokens,
        allow_unaligned=options.allow_unaligned,
        passes=options.passes,
        rank=None if options.passes == 1 else options.rank or DEFAULT_RANK,
        progress=advance,
    )
    return direction.precondition(options.second_moment) if options.second_moment else direction
