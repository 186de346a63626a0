"""Rank-16 scoring against the loop that it replaces: one backward pass with weight gradients for each row.

    python benchmarks/batch_of_one.py --data DATA [--model MODEL] [--rows 32] [--dtype float32] [--rounds 3]

Two of the peers of benchmarks/peers in one process, without an environment of their own: both score the same real
rows with the same direction in the same precision and threads, in turns, so that a slow moment of the machine falls on
both. Each is given by its best round; the ratio of every round is printed too. One JSON line goes to
benchmarks/results/batch_of_one.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers.autograd_loop import AutogradLoop
from benchmarks.record import append, surroundings
from benchmarks.workload import (
    add_options,
    batches_of,
    data_folder,
    open_model,
    padded,
    probe_direction,
    read_rows,
    synchronize,
    tokens_of,
)
from gradshield_fast import Scorer


def main() -> None:
    """Run the benchmark and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rows=32, batch_tokens=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    data = data_folder(parser, options)
    model, tokenizer = open_model(options.model, options.dtype, options.threads)
    dense = probe_direction(model, tokenizer, options.probes)
    low = dense.low_rank(rank=options.rank)
    rows = read_rows(data, tokenizer, options.rows, options.max_length)
    batches, (tokens, _) = batches_of(rows, options.batch_tokens), tokens_of(rows)
    loop = AutogradLoop(model, dense)
    alone = loop.prepare(batches)
    times: dict[str, list[float]] = {"rank": [], "one_by_one": []}
    scores: dict[str, dict[int, float]] = {}
    for _ in range(options.rounds):
        with Scorer(model, low) as scorer:
            scorer.score(padded(batches[-1]))  # warm up; calibration is once a corpus, not once a batch
            start = time.perf_counter()
            outs = [scorer.score(padded(batch)).dot[:, 0].tolist() for batch in batches]
            times["rank"].append(time.perf_counter() - start)
        positions = [position for batch in batches for position in batch.positions.tolist()]
        scores["rank"] = dict(zip(positions, (x for out in outs for x in out), strict=True))
        start = time.perf_counter()
        scores["one_by_one"] = loop.score(alone)
        synchronize()
        times["one_by_one"].append(time.perf_counter() - start)
    table = torch.tensor([[scores[name][n] for n in sorted(positions)] for name in times], dtype=torch.float64)
    agreement = torch.corrcoef(table)[-1]
    speed = {name: tokens / min(seconds) for name, seconds in times.items()}
    ratios = [slow / fast for slow, fast in zip(times["one_by_one"], times["rank"], strict=True)]
    print(f"{len(rows)} rows, {tokens} tokens, {options.dtype}, residual of rank {options.rank}: {low.residual:.3g}")
    for name, correlation in zip(times, agreement.tolist(), strict=True):
        print(f"{name:12s} {speed[name]:8.1f} tokens/s   correlation with the loop {correlation:.7f}")
    print(
        f"rank-{options.rank} over one_by_one: best {speed['rank'] / speed['one_by_one']:.2f}, rounds "
        + ", ".join(f"{ratio:.2f}" for ratio in ratios)
    )
    result = {
        "tokens_per_s": speed,
        "ratio": speed["rank"] / speed["one_by_one"],
        "ratios": ratios,
        "correlation": dict(zip(times, agreement.tolist(), strict=True)),
        "rows": len(rows),
        "tokens": tokens,
        "residual": low.residual,
    }
    append("batch_of_one", {**surroundings(vars(options)), **result})


if __name__ == "__main__":
    main()
