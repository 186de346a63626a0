"""What of a run is not the model: reading, rendering, tokenising, packing, writing, fitting and splitting.

A whole run of real rows in this process, with a random low-rank direction. Time inside of `Scorer.score` is the
model's, as is loading it; settling its rules on the first row is listed apart.

    python benchmarks/pipeline_overhead.py --model MODEL --data DATA --rows 2000 --dtype bfloat16 [--record]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Clock:
    """Sums the time of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str) -> None:
        """Time every call of a function from here on."""
        call = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds += time.perf_counter() - begun

        setattr(owner, name, timed)


def main() -> None:
    """Run the pipeline with clocks around the model's calls; print and record the shares."""
    import torch

    from gradshield_fast import Direction
    from gradshield_fast.loading import load_model
    from gradshield_fast.pipeline import worker
    from gradshield_fast.pipeline.options import (
        CorpusOptions,
        DirectionOptions,
        EngineOptions,
        ModelOptions,
        RunOptions,
        ScoringOptions,
    )
    from gradshield_fast.pipeline.run import run
    from gradshield_fast.scorer import Scorer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared rows")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--record", action="store_true", help="add a line to benchmarks/results/pipeline_overhead.jsonl"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with open(options.data / "gsm8k_train_2k.jsonl", "rb") as source:
            (home / "corpus.jsonl").write_bytes(b"".join(islice(source, options.rows)))
        loaded, _ = load_model(options.model, dtype=options.dtype, device="cpu")
        generator = torch.Generator().manual_seed(0)
        made = Direction({name: torch.randn(w.shape, generator=generator) for name, w in loaded.named_parameters()})
        made.low_rank(rank=options.rank).save(home / "d.safetensors")
        del loaded, made
        scoring, loading, settling = Clock(), Clock(), Clock()
        scoring.around(Scorer, "score")
        loading.around(worker, "load_model")
        settling.around(Scorer, "settle")
        begun = time.perf_counter()
        run(
            RunOptions(
                CorpusOptions(home / "corpus.jsonl"),
                ModelOptions(options.model, dtype=options.dtype, device="cpu"),
                home / "run",
                DirectionOptions((home / "d.safetensors",)),
                ScoringOptions(),
                engine=EngineOptions(workers=options.workers),
            )
        )
        whole = time.perf_counter() - begun
        sessions = json.loads((home / "run" / "run.json").read_text())["sessions"]
    rest = whole - scoring.seconds - loading.seconds - settling.seconds
    told = {
        "rows": options.rows,
        "tokens": sum(session["tokens"] for session in sessions),
        "seconds": round(whole, 2),
        "scoring": round(scoring.seconds, 2),
        "loading": round(loading.seconds, 2),
        "settling": round(settling.seconds, 2),
        "rest": round(rest, 2),
        "rest_share": round(rest / whole, 4),
    }
    print(json.dumps(told, indent=1))
    if options.record:
        record.append("pipeline_overhead", {**record.surroundings(vars(options)), **told})


if __name__ == "__main__":
    main()
