"""What further directions cost: K directions scored in one pass against one, in turns.

    python benchmarks/many_directions.py --data DATA --model MODEL --dtype bfloat16 [--directions 8] [--compile]

One direction is the probes', the others are random with its matrices' norms; all of them at one rank. The ratio is the
median over rounds of the two times next to each other. One JSON line goes to benchmarks/results/many_directions.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.end_to_end import stacked, timed
from benchmarks.record import append, surroundings
from benchmarks.workload import (
    add_options,
    as_taken,
    batches_of,
    data_folder,
    open_model,
    padded,
    probe_direction,
    read_rows,
    tokens_of,
)
from gradshield_fast import Direction, Scorer


def main() -> None:
    """Run the benchmark and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rows=32, batch_tokens=2048)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--direction", type=Path, default=None, help="a saved dense one, instead of one from probes")
    parser.add_argument("--norms", action=switch, default=False, help="also each row's gradient norm")
    parser.add_argument("--compile", action=switch, default=False, help="Scorer's option")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    data = data_folder(parser, options)
    model, tokenizer = open_model(options.model, options.dtype, options.threads)
    rows = read_rows(data, tokenizer, options.rows, options.max_length)
    if options.direction is None:
        dense = probe_direction(model, tokenizer, options.probes)
    else:
        dense = Direction.load(options.direction)
        dense.meta.pop("model", None)  # only its shapes matter here, and it may be of the model in another type
    seconds: dict[int, list[float]] = {1: [], options.directions: []}
    directions = {count: stacked(dense, count, options.rank) for count in seconds}
    with Scorer(model, directions[1], norms=options.norms) as scorer:
        batches = as_taken(scorer, batches_of(rows, options.batch_tokens))
    smallest = min(batches, key=lambda batch: int(batch.attention_mask.sum()))
    for number in range(options.rounds + 1):  # round 0 warms up
        for count, direction in directions.items():
            with Scorer(model, direction, norms=options.norms, compile=options.compile) as scorer:
                scorer.score(padded(smallest))  # calibration is once a corpus
                took = timed(lambda scorer=scorer: [scorer.score(padded(batch)) for batch in batches])
            if number:
                seconds[count].append(took)
    over = [many / one for one, many in zip(seconds[1], seconds[options.directions], strict=True)]
    tokens, _ = tokens_of(rows)
    told = {"tokens": tokens, "seconds": seconds, "over_one": statistics.median(over), "over_one_rounds": over}
    print(f"{options.directions} directions at rank {options.rank} take {told['over_one']:.2f} times one; {seconds}")
    append("many_directions", {**surroundings(vars(options)), **told})


if __name__ == "__main__":
    main()
