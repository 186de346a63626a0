"""Broken corpora through whole runs of a tiny model: no crash, no hang, each row in exactly one output.

python benchmarks/fuzz_corpora.py --rows 10000 --files 2000 --seed 0 [--record]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import record

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

ROWS = 500
"""Rows of a corpus."""

SECONDS = 120.0
"""A corpus that takes longer counts as a hang."""


def options_in(home: Path) -> Any:
    """Make a tiny model and a direction; give the options of a run."""
    import torch
    from tiny import save_tiny

    from gradshield_fast import Direction
    from gradshield_fast.loading import load_model
    from gradshield_fast.pipeline.options import (
        CorpusOptions,
        DirectionOptions,
        ModelOptions,
        RunOptions,
        ScoringOptions,
    )

    save_tiny(home / "model")
    model, _ = load_model(str(home / "model"), device="cpu")
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}
    Direction(tensors).save(home / "d.safetensors")
    return RunOptions(
        corpus=CorpusOptions(home / "x", max_row_bytes=4000),
        model=ModelOptions(str(home / "model"), device="cpu"),
        out=home / "run",
        direction=DirectionOptions(files=(home / "d.safetensors",)),
        scoring=ScoringOptions(part_rows=128),
    )


def main() -> None:
    """Make the corpora, run them, and hold what comes out against what went in."""
    from fuzzed import damaged, line, packed

    from gradshield_fast.corpus import read_corpus
    from gradshield_fast.errors import InputError
    from gradshield_fast.pipeline.run import run
    from tests.pipeline.folder_files import check_outputs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="broken rows that go through whole runs")
    parser.add_argument("--files", type=int, default=2_000, help="damaged files that are read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="add a line to benchmarks/results/fuzz.jsonl")
    options = parser.parse_args()
    chance, statuses, slowest, made = random.Random(options.seed), Counter[str](), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        asked = options_in(home)
        while made < options.rows:
            lines = [entry for entry in (line(chance, n) for n in range(ROWS)) if entry.strip()]
            corpus = home / f"{made}.jsonl"
            corpus.write_bytes(b"\n".join(lines))
            out = home / f"run-{made}"
            begun = time.perf_counter()
            run(replace(asked, out=out, corpus=replace(asked.corpus, path=corpus)))
            slowest = max(slowest, time.perf_counter() - begun)
            check_outputs(out, lines, asked.corpus.max_row_bytes)
            counts = json.loads((out / "run.json").read_text())["counts"]
            statuses.update({"kept": counts["kept"], "dropped": counts["dropped"], **counts["statuses"]})
            made += len(lines)
        refused: list[str] = []
        for number in range(options.files):
            suffix = chance.choice(("", ".gz"))
            path = home / f"file-{number}.jsonl{suffix}"
            path.write_bytes(damaged(chance, packed([line(chance, n) for n in range(8)], suffix)))
            try:
                rows = [row.index for row in read_corpus(path)]
                assert rows == list(range(len(rows)))
            except InputError as error:
                refused.append(str(error))
            path.unlink()
    told = {
        "rows": made,
        "statuses": dict(statuses.most_common()),
        "files": options.files,
        "files_refused": len(refused),
        "slowest_corpus_seconds": round(slowest, 1),
    }
    assert slowest < SECONDS
    assert not any("\n" in message for message in refused)
    print(json.dumps(told, indent=1))
    if options.record:
        record.append("fuzz", {**record.surroundings(vars(options)), **told})


if __name__ == "__main__":
    main()
