"""Whether 16 bits change what is dropped: the same real rows and direction scored in float32 and in bfloat16.

    python benchmarks/agreement.py --data DATA --model MODEL --work FOLDER [--rows 2000] [--max-length 256] [--record]

Two whole runs of the product's defaults (cosine, rank 16) with one direction, made in float32. "Same side" is the share
of rows that the threshold fitted to the float32 scores puts on the same side by either score; "own threshold" lets
bfloat16 be cut by the one fitted to its own. The folder keeps both runs: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import append, surroundings
from benchmarks.workload import FILES, add_options, data_folder, open_model
from gradshield_fast import Direction, fit_threshold
from gradshield_fast.pipeline.options import (
    CorpusOptions,
    DirectionOptions,
    EngineOptions,
    ModelOptions,
    RunOptions,
    ScoringOptions,
)
from gradshield_fast.pipeline.parts import read_part
from gradshield_fast.pipeline.run import run

HARMFUL = "advbench_520"
SHARE = 0.1
"""Share of the rows that are harmful ones, so that there is a line to draw."""


def corpus(data: Path, count: int) -> bytes:
    """Put a corpus together: as many rows of each benign file, and some harmful ones.

    Args:
        data: folder with the files.
        count: rows in all.

    Returns:
        JSON lines.
    """
    harmful = round(SHARE * count)
    share = [(k + 1) * (count - harmful) // len(FILES) - k * (count - harmful) // len(FILES) for k in range(len(FILES))]
    wanted = [*zip(FILES, share, strict=True), (HARMFUL, harmful)]
    return b"".join(
        line for name, n in wanted for line in (data / f"{name}.jsonl").read_bytes().splitlines(keepends=True)[:n]
    )


def scores(folder: Path) -> dict[int, float]:
    """Read a run's scores.

    Args:
        folder: of a finished run.

    Returns:
        Row -> score, of rows that were scored.
    """
    parts = [read_part(path) for path in sorted((folder / "scores").glob("part-*.parquet"))]
    pairs = [(int(row), float(value)) for part in parts for row, value in zip(part.row, part.fihs[:, 0], strict=True)]
    return {row: value for row, value in pairs if np.isfinite(value)}


def main() -> None:
    """Score twice, compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rows=2000)
    parser.add_argument("--work", type=Path, required=True, help="folder of the two runs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--record", action="store_true", help="add a line to benchmarks/results/agreement.jsonl")
    options = parser.parse_args()
    data, work = data_folder(parser, options), options.work
    work.mkdir(parents=True, exist_ok=True)
    rows, direction = work / "corpus.jsonl", work / "direction.safetensors"
    rows.write_bytes(corpus(data, options.rows))
    if not direction.is_file():
        model, tokenizer = open_model(options.model, "float32", options.threads)
        Direction.from_probes(model, tokenizer).low_rank(rank=options.rank).save(direction)
        del model
    found = []
    for dtype in ("bfloat16", "float32"):
        run(
            RunOptions(
                CorpusOptions(rows),
                ModelOptions(options.model, dtype=dtype),
                work / dtype,
                DirectionOptions((direction,)),
                ScoringOptions(max_length=options.max_length, part_rows=100),
                cut=None,
                engine=EngineOptions(threads=options.threads),
            )
        )
        found.append(scores(work / dtype))
    both = sorted(found[0].keys() & found[1].keys())
    narrow, wide = (np.array([values[row] for row in both]) for values in found)
    cuts = [fit_threshold(values).value for values in (narrow, wide)]
    same, own = (np.mean((narrow > cut) == (wide > cuts[1])) for cut in (cuts[1], cuts[0]))
    told = {
        "rows": len(both),
        "spearman": float(np.corrcoef(rankdata(narrow), rankdata(wide))[0, 1]),
        "same_side": float(same),
        "same_side_own_threshold": float(own),
        "above": int((wide > cuts[1]).sum()),
        "largest_difference": float(np.abs(narrow - wide).max()),
        "spread": float(wide.std()),
    }
    print(told)
    if options.record:
        append("agreement", {**surroundings(vars(options)), **told})


if __name__ == "__main__":
    main()
