"""How well FIHS tells harmful fine-tuning rows from benign ones, on a model that refuses.

    python benchmarks/replication/separation.py --model aligned --data DATA

Builds the reference direction of both safety scores from the probes, dense and at low rank, scores all rows in one
pass with the four of them, and prints for each the area under the ROC curve of the dot product and of the cosine, and
what the adaptive threshold removes. One JSON line goes to benchmarks/results/separation.jsonl.

Rows, none of which benchmarks/replication/align.py trains on:

    harmful   advbench_520.jsonl, spread over the file
    benign    half gsm8k_test_500.jsonl, half instruct_apache_1k.jsonl[450:], spread over them
    identity  identity_shift_10.jsonl: "absolutely obedient" rows with nothing openly harmful, against the GSM8K ones
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from gradshield_fast import Direction, SafetyProbes, Scorer, fit_threshold
from gradshield_fast.chat import ChatEncoder, Encoded
from gradshield_fast.errors import GradShieldError, InputError
from gradshield_fast.loading import load_model
from gradshield_fast.packing import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings  # beside this folder, not installed


def read_rows(folder: Path, name: str, first: int, count: int) -> list[list[dict[str, str]]]:
    """Read conversations, spread evenly over a file.

    Args:
        folder: the data folder.
        name: the file's name without its ending.
        first: rows before this one are left out.
        count: how many, or all there are.

    Returns:
        The messages of each row.

    Raises:
        InputError: the file is missing.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the data folder with --data or GRADSHIELD_SHARED_DATA")
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()][first:]
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def score_rows(
    model: Any, direction: Direction, encoded: list[Encoded], tokens: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Score rows with the public API.

    Args:
        model: the model.
        direction: K directions.
        encoded: the rows.
        tokens: of a batch.

    Returns:
        FIHS float64 [rows, directions], its cosine, and the number of tokens scored.

    Raises:
        InputError: a row could not be scored.
    """
    dot = np.full((len(encoded), direction.count), np.nan)
    norm = np.full(len(encoded), np.nan)
    total, done, start = sum(len(e.input_ids) for e in encoded), 0, time.perf_counter()
    with Scorer(model, direction, norms=True) as scorer:
        for batch in pack(enumerate(encoded), batch_tokens=tokens):
            out = scorer.score(vars(batch))
            assert out.norm is not None
            dot[batch.positions] = out.dot.double().cpu().numpy()
            norm[batch.positions] = out.norm.double().cpu().numpy()
            done += int(batch.cu_seqlens[-1])
            print(f"  {done}/{total} tokens, {done / (time.perf_counter() - start):.0f} tokens/s", flush=True)
    if not np.isfinite(dot).all():
        raise InputError(f"{int((~np.isfinite(dot)).any(1).sum())} rows have no finite score")
    return dot, dot / (norm[:, None] * np.asarray(direction.norm)), total


def separation(scores: np.ndarray, kind: np.ndarray, seed: int) -> dict[str, Any]:
    """Describe how scores separate the kinds of rows.

    Args:
        scores: [rows].
        kind: [rows], "harmful", "gsm8k", "instruct" or "identity".
        seed: of the threshold's fit.

    Returns:
        AUC of harmful against benign rows and of identity-shift against GSM8K rows; the threshold fitted on harmful and
        benign rows together, and what it removes of each kind.
    """
    harmful, identity = kind == "harmful", kind == "identity"
    benign = (kind == "gsm8k") | (kind == "instruct")
    two, ten = harmful | benign, identity | (kind == "gsm8k")
    cut = fit_threshold(scores[two], random_state=seed)
    removed = scores > cut.value
    return {
        "auc": roc_auc_score(harmful[two], scores[two]),
        "auc_identity_vs_gsm8k": roc_auc_score(identity[ten], scores[ten]),
        "threshold": cut.value,
        "threshold_kind": cut.kind,
        "removed": {k: f"{int(removed[kind == k].sum())}/{int((kind == k).sum())}" for k in np.unique(kind).tolist()},
        "mean": {k: float(scores[kind == k].mean()) for k in np.unique(kind).tolist()},
    }


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.

    Raises:
        InputError: there is no data folder.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that align.py wrote, or any other model")
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="data folder")
    parser.add_argument("--probes", help="probes file; without it the bundled ones")
    parser.add_argument("--scores", nargs="+", default=["refusal_logprob", "refusal_margin"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", nargs=2, type=int, default=[200, 400], metavar=("HARMFUL", "BENIGN"))
    parser.add_argument("--max-length", type=int, default=256, help="rows are cut there")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-unaligned", action="store_true", help="measure refusal_logprob on any model")
    parser.add_argument("--results", default="separation", help="file in benchmarks/results that gets a line more")
    options = parser.parse_args(argv)
    if options.data is None:
        raise InputError("separation: give the data folder with --data or GRADSHIELD_SHARED_DATA")
    folder, (harmful, benign) = Path(options.data), options.rows
    torch.set_num_threads(options.threads)
    kinds = {
        "harmful": read_rows(folder, "advbench_520", 0, harmful),
        "gsm8k": read_rows(folder, "gsm8k_test_500", 0, benign // 2),
        "instruct": read_rows(folder, "instruct_apache_1k", 450, benign - benign // 2),
        "identity": read_rows(folder, "identity_shift_10", 0, 10),
    }
    model, tokenizer = load_model(options.model, dtype=options.dtype, device="cpu")
    probes = SafetyProbes.load(options.probes) if options.probes else SafetyProbes.default()
    directions: dict[str, Direction] = {}
    start = time.perf_counter()
    for score in options.scores:
        dense = Direction.from_probes(
            model,
            tokenizer,
            probes,
            score=score,
            allow_unaligned=options.allow_unaligned,
            batch_tokens=options.batch_tokens,
        )
        directions[f"{score} dense"] = dense
        directions[f"{score} rank {options.rank}"] = dense.low_rank(rank=options.rank)
        print(f"{score}: S {dense.meta['safety']['S']:.3f} nats/token", flush=True)
    built = time.perf_counter()
    encoder = ChatEncoder(tokenizer, max_length=options.max_length)
    rows = [(name, encoder.encode(messages)) for name, group in kinds.items() for messages in group]
    usable = [row for row in rows if row[1].usable]
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable)} rows have no answer within {options.max_length} tokens and are left out")
    kind = np.array([name for name, _ in usable])
    stack = Direction.stack(list(directions.values()))
    dot, cosine, tokens = score_rows(model, stack, [encoded for _, encoded in usable], options.batch_tokens)
    seconds = time.perf_counter() - built
    results = {}
    for k, (name, direction) in enumerate(directions.items()):
        results[name] = {
            "residual": direction.residual,
            "dot": separation(dot[:, k], kind, options.seed),
            "cosine": separation(cosine[:, k], kind, options.seed),
        }
        for measure in ("dot", "cosine"):
            r = results[name][measure]
            print(
                f"{name:26s} {measure:6s} AUC {r['auc']:.4f}  identity AUC {r['auc_identity_vs_gsm8k']:.3f}  "
                f"{r['threshold_kind']} {r['threshold']:.4g} removes {r['removed']}"
            )
    safety = {s: dict(directions[f"{s} dense"].meta["safety"]) for s in options.scores}
    for report in safety.values():  # one value a probe is too long for one line
        del report["refusal_logprob"], report["compliance_logprob"]
    append(
        options.results,
        {
            **surroundings(vars(options)),
            "safety": safety,
            "results": results,
            "seconds": {"directions": round(built - start, 1), "scoring": round(seconds, 1)},
            "tokens": tokens,
            "left_out": len(rows) - len(usable),
        },
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
