"""Scoring a real model on real rows: rows and tokens a second, memory, and how far from what the device can do.

    python benchmarks/end_to_end.py --data DATA [--model MODEL] [--dtype bfloat16] [--rank 16] [--profile]

Scoring, forward passes and the bare matrix products take turns, round by round, after a warm-up. "Share of the floor"
is the time of the bare products (`floor.py`) over scoring's, in the same round; "over the best forward" is scoring's
time over that of the fastest of several forward passes. Median over rounds; best in parentheses. One JSON line goes to
benchmarks/results/end_to_end.jsonl; with --ways one for each way to score: hooks and compiled, without and with norms.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import floor
from benchmarks.forwards import forwards
from benchmarks.peers.peer import entries_of
from benchmarks.record import append, surroundings
from benchmarks.workload import (
    RANDOM,
    TOKENIZER,
    PeakMemory,
    add_options,
    as_taken,
    batches_of,
    data_folder,
    open_model,
    padded,
    probe_direction,
    random_direction,
    read_rows,
    synchronize,
    tokens_of,
)
from gradshield_fast import Direction, Scorer
from gradshield_fast.packing import Batch

SCORING, FLOOR = "scoring", "matrix products alone"


def stacked(direction: Direction, count: int, rank: int) -> Direction:
    """Compress a direction, and put random ones of the same norms beside it where several are asked for.

    Args:
        direction: a dense direction.
        count: directions to score in one pass.
        rank: rank of the factors; 0: dense.

    Returns:
        The directions.
    """
    torch.manual_seed(0)
    entries = entries_of(direction)
    parts = [direction]
    for _ in range(count - 1):
        noise = {name: torch.randn_like(x) * (x.norm() / x.numel() ** 0.5) for name, x in entries.items()}
        parts.append(Direction(noise))
    parts = [part.low_rank(rank=rank) if rank else part for part in parts]
    return parts[0] if count == 1 else Direction.stack(parts)


def made(model: Any, tokenizer: Any, options: argparse.Namespace) -> Direction:
    """Make what to score against.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        options: the command line's.

    Returns:
        The directions.
    """
    if options.model in RANDOM:
        drawn = [random_direction(model, options.rank, seed) for seed in range(options.directions)]
        return drawn[0] if len(drawn) == 1 else Direction.stack(drawn)
    if options.direction is None:
        dense = probe_direction(model, tokenizer, options.probes)
    else:
        dense = Direction.load(options.direction)
        dense.meta.pop("model", None)  # only its shapes matter here, and it may be of the model in another type
    return stacked(dense, options.directions, options.rank)


def scorer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Pass on what this version's Scorer knows.

    Args:
        options: the command line's.

    Returns:
        Keyword arguments.
    """
    known = inspect.signature(Scorer.__init__).parameters
    wanted = {name: getattr(options, name) for name in ("compile", "checkpoint", "norms")}
    for name, value in wanted.items():
        if value and name not in known:
            print(f"Scorer has no option {name!r} in this version: scored without it", file=sys.stderr)
    return {name: value for name, value in wanted.items() if value and name in known}


def timed(call: Callable[[], Any]) -> float:
    """Time a call.

    Args:
        call: what to run.

    Returns:
        Seconds.
    """
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def ways_to_score(options: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """List the ways to score that take turns.

    Args:
        options: the command line's.

    Returns:
        Name -> options of the command line that would measure it alone.
    """
    if not options.ways:
        return {SCORING: options}
    pairs = [(compiled, norms) for compiled in (False, True) for norms in (False, True)]
    return {
        f"{'compiled' if compiled else 'hooks'}{', norms' if norms else ''}": argparse.Namespace(
            **{**vars(options), "compile": compiled, "norms": norms}
        )
        for compiled, norms in pairs
    }


def measure(
    model: Any,
    direction: Direction,
    batches: list[Batch],
    ways: dict[str, argparse.Namespace],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Take turns.

    Args:
        model: the model.
        direction: what to score against.
        batches: packed rows.
        ways: the ways to score.
        options: the command line's.

    Returns:
        For each way seconds of it and of what it is held against in each round, errors of what cannot run, and memory.
    """
    with Scorer(model, direction, norms=options.norms) as scorer:
        taken = as_taken(scorer, batches)
    smallest = min(taken, key=lambda batch: int(batch.attention_mask.sum()))
    calls: dict[str, Callable[[], Any]] = {FLOOR: lambda: floor.seconds(model, taken)}
    calls |= forwards(model, batches, compiled=options.compiled_forward)
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, *calls)}
    about: dict[str, dict[str, Any]] = {name: {} for name in ways}
    memory = PeakMemory()
    # each is settled once and re-entered: settling is once a corpus
    scorers = {way: Scorer(model, direction, **scorer_options(wanted)) for way, wanted in ways.items()}
    begun = time.perf_counter()
    for number in range(options.rounds + 1):  # round 0 warms up
        if number > 1 and options.budget is not None and time.perf_counter() - begun > options.budget:
            break
        for way in ways:
            with scorers[way] as scorer:
                scorer.score(padded(smallest))
                with memory:
                    took = timed(lambda scorer=scorer: [scorer.score(padded(batch)) for batch in taken])
                if number:
                    seconds[way].append(took)
                if options.profile and number == options.rounds:
                    profile(lambda scorer=scorer: [scorer.score(padded(batch)) for batch in taken])
                ran = {"backends": dict(scorer.backends), "ways": about[way].get("ways") or dict(scorer.ways)}
                about[way] = {**ran, "extra_mib": memory.extra, "peak_mib": memory.peak}
        for name, call in calls.items():
            if name in errors:
                continue
            try:
                took = timed(call)
            except Exception as error:  # a compiler that is not there, say: the other variants still count
                errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                continue
            if number:
                seconds[name].append(took)
    return {
        way: {
            "seconds": {name: x for name, x in seconds.items() if x and (name == way or name not in ways)},
            "errors": errors,
            **about[way],
        }
        for way in ways
    }


def profile(call: Callable[[], Any]) -> None:
    """Print where the time goes, by torch's profiler.

    Args:
        call: what to run.
    """
    with torch.profiler.profile() as found:
        call()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def summary(found: dict[str, Any], way: str, rows: int, tokens: int, response: int, operations: int) -> dict[str, Any]:
    """Turn seconds into rates and shares.

    Args:
        found: from `measure`, of one way.
        way: its name.
        rows: number of rows.
        tokens: all tokens.
        response: tokens with a loss.
        operations: of the floor.

    Returns:
        JSON values.
    """
    seconds = found["seconds"]
    passes = {name: values for name, values in seconds.items() if name not in (way, FLOOR)}
    best = min(passes, key=lambda name: statistics.median(passes[name]))
    scoring = seconds[way]
    over = [a / b for a, b in zip(scoring, passes[best], strict=True)]
    share = [b / a for a, b in zip(scoring, seconds[FLOOR], strict=True)]
    middle, least = statistics.median(scoring), min(scoring)
    return {
        "rows_per_s": {"median": rows / middle, "best": rows / least},
        "tokens_per_s": {"median": tokens / middle, "best": tokens / least},
        "response_tokens_per_s": {"median": response / middle, "best": response / least},
        "forward_tokens_per_s": {name: tokens / statistics.median(values) for name, values in passes.items()},
        "floor_flop": operations,
        "floor_flop_per_s": operations / statistics.median(seconds[FLOOR]),
        "share_of_floor": {"median": statistics.median(share), "best": max(share)},
        "best_forward": best,
        "over_best_forward": {"median": statistics.median(over), "best": min(over)},
    }


def parse() -> tuple[argparse.Namespace, Path]:
    """Read the command line.

    Returns:
        The options and the data folder.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rows=64, batch_tokens=2048)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--tokenizer", default=TOKENIZER, help="whose tokens a random model reads: a folder or a name")
    parser.add_argument("--rank", type=int, default=16, help="rank of the direction; 0: dense")
    parser.add_argument("--directions", type=int, default=1, help="directions scored in one pass")
    parser.add_argument("--direction", type=Path, default=None, help="a saved dense one, instead of one from probes")
    parser.add_argument("--norms", action=switch, default=False, help="also each row's gradient norm")
    parser.add_argument("--compile", action=switch, default=False, help="Scorer's option, where it has it")
    parser.add_argument("--ways", action="store_true", help="hooks and compiled, without and with norms, in turns")
    parser.add_argument("--checkpoint", action=switch, default=False, help="Scorer's option, where it has it")
    parser.add_argument("--compiled-forward", action=switch, default=True, help="a torch.compile'd forward pass too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further round begins")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's top operations of scoring")
    parser.add_argument("--results", default="end_to_end", help="name of the file in benchmarks/results, or a path")
    options = parser.parse_args()
    if min(options.rounds, options.directions) < 1 or options.rank < 0:
        parser.error("--rounds and --directions must be at least 1, --rank at least 0")
    if options.model in RANDOM and (options.rank == 0 or options.direction is not None):
        parser.error(f"{options.model} is scored against random directions of low rank")
    return options, data_folder(parser, options)


def main() -> None:
    """Run the benchmark and record it."""
    options, data = parse()
    model, tokenizer = open_model(options.model, options.dtype, options.threads, options.tokenizer)
    rows = read_rows(data, tokenizer, options.rows, options.max_length)
    tokens, response = tokens_of(rows)
    direction = made(model, tokenizer, options)
    batches = batches_of(rows, options.batch_tokens)
    ways = ways_to_score(options)
    print(f"{len(rows)} rows, {tokens} tokens, {response} with a loss, {len(batches)} batches, {options.dtype}")
    for way, found in measure(model, direction, batches, ways, options).items():
        result = summary(found, way, len(rows), tokens, response, floor.operations(model, tokens, response))
        tell(way, found, result)
        counts = {"rows": len(rows), "tokens": tokens, "response_tokens": response, "batches": len(batches)}
        about = {**surroundings(vars(ways[way])), **counts, "residual": direction.residual}
        append(options.results, {**about, **found, **result})


def tell(way: str, found: dict[str, Any], result: dict[str, Any]) -> None:
    """Print what one way to score came to.

    Args:
        way: its name.
        found: from `measure`.
        result: from `summary`.
    """
    print(f"== {way}")
    for name in ("rows_per_s", "tokens_per_s", "response_tokens_per_s"):
        print(f"{name:24s} {result[name]['median']:8.1f}  ({result[name]['best']:.1f})")
    for name, rate in result["forward_tokens_per_s"].items():
        print(f"forward, {name}: {rate:.0f} tokens/s")
    for name, error in found["errors"].items():
        print(f"{name} cannot run: {error}")
    print("scored by: " + "; ".join(f"{key} {value}" for key, value in found["ways"].items()))
    floored, over = result["share_of_floor"], result["over_best_forward"]
    print(f"share of the floor       {floored['median']:8.1%}  ({floored['best']:.1%})")
    print(f"over the best forward    {over['median']:8.2f}  ({over['best']:.2f}), which is: {result['best_forward']}")
    print(f"floor: {result['floor_flop'] / 1e9:.0f} GFLOP at {result['floor_flop_per_s'] / 1e9:.0f} GFLOP/s")
    if found["extra_mib"] is not None:
        print(f"memory above the loaded model and direction: {found['extra_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
