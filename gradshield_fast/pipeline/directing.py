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

    if options.files:
        loaded = [Direction.load(path, model) for path in options.files]
        return _compressed(_stacked(loaded), options.rank, options.energy, reporter)
    return _stacked([_build(model, tokenizer, score, options, reporter) for score in options.scores])


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


def _stacked(directions: list[Direction]) -> Direction:
    from gradshield_fast.direction import Direction

    return directions[0] if len(directions) == 1 else Direction.stack(directions)


def _compressed(direction: Direction, rank: int | None, energy: float | None, reporter: Reporter) -> Direction:
    if not rank and energy is None:
        return direction
    reporter.stage("compressing the direction")
    return direction.low_rank(rank=rank or None, energy=energy)


def _build(model: Any, tokenizer: Any, score: str, options: DirectionOptions, reporter: Reporter) -> Direction:
    from gradshield_fast.direction import Direction
    from gradshield_fast.safety import SafetyProbes

    probes = SafetyProbes.load(options.probes) if options.probes else SafetyProbes.default()
    identity = score == "identity_margin"
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
        SafetyProbes.identity() if identity else probes,
        score="refusal_margin" if identity else score,
        weights=options.weights,
        batch_tokens=options.batch_tokens,
        allow_unaligned=options.allow_unaligned,
        passes=options.passes,
        rank=None if options.passes == 1 else options.rank or DEFAULT_RANK,
        progress=advance,
    )
    direction.meta["options"]["score"] = score
    if options.second_moment:
        direction = direction.precondition(options.second_moment)
    if options.passes > 1:
        return direction
    rank = DEFAULT_RANK if options.rank is None and options.energy is None else options.rank
    return _compressed(direction, rank, options.energy, reporter)
