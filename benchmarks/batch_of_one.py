"""Rank-16 scoring against the loop that it replaces: one backward pass with weight gradients for each row.

    python benchmarks/batch_of_one.py --data DATA [--model MODEL] [--rows 32] [--dtype float32] [--rounds 3]

Both score the same real rows with the same direction in the same precision and threads. They run in turns, so that a
slow moment of the machine falls on both, and each is given by its best round; the ratio of every round is printed too.
The loop is the plain way to a dot product with autograd: loss, torch.autograd.grad, <G, r> weight by weight against
the dense direction. One JSON line goes to benchmarks/results/batch_of_one.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from record import append, surroundings

from gradshield_fast import Direction, Scorer
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.errors import InputError
from gradshield_fast.loading import load_model
from gradshield_fast.packing import Batch, pack

FILES = ("gsm8k_train_2k", "instruct_apache_1k", "banking77_1k", "mts_dialog_1k")


def read_batches(data: Path, tokenizer: Any, rows: int, max_length: int, batch_tokens: int) -> list[Batch]:
    """Encode real rows, the same number from each file, and pack them.

    Args:
        data: folder with the files.
        tokenizer: the model's.
        rows: how many in all.
        max_length: tokens a row is cut at.
        batch_tokens: tokens of a batch.

    Returns:
        The batches.

    Raises:
        InputError: a file is missing.
    """
    encoder = ChatEncoder(tokenizer, max_length=max_length)
    encoded = []
    for name in FILES:
        path = data / f"{name}.jsonl"
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the data folder with --data or GRADSHIELD_SHARED_DATA")
        lines = path.read_text(encoding="utf-8").splitlines()[: -(-rows // len(FILES))]
        encoded += [encoder.encode(json.loads(line)["messages"]) for line in lines]
    usable = [row for row in encoded if row.usable][:rows]
    return list(pack(enumerate(usable), batch_tokens=batch_tokens))


def batched(scorer: Scorer, batches: list[Batch]) -> dict[int, float]:
    """Score every batch.

    Args:
        scorer: the open scorer.
        batches: the rows.

    Returns:
        Row's position -> FIHS.
    """
    scores: dict[int, float] = {}
    for batch in batches:
        out = scorer.score(
            {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
        )
        scores.update(zip(batch.positions.tolist(), out.dot[:, 0].tolist(), strict=True))
    return scores


def one_by_one(model: torch.nn.Module, direction: Direction, batches: list[Batch]) -> dict[int, float]:
    """Score every row by autograd.

    Args:
        model: the model, with gradients on.
        direction: the dense direction.
        batches: the rows.

    Returns:
        Row's position -> FIHS.
    """
    weights = dict(model.named_parameters())
    names = direction.names
    scores: dict[int, float] = {}
    for batch in batches:
        for n, position in enumerate(batch.positions.tolist()):
            length = int(batch.attention_mask[n].sum())
            ids = torch.from_numpy(batch.input_ids[n : n + 1, :length])
            labels = torch.from_numpy(batch.labels[n : n + 1, :length])
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            grads = torch.autograd.grad(loss, [weights[name] for name in names])
            scores[position] = sum(
                float((g.float() * direction.parts[0][name]).sum())  # pyright: ignore[reportOperatorIssue]
                for name, g in zip(names, grads, strict=True)
            )
    return scores


def main() -> None:
    """Run the benchmark and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GRADSHIELD_SHARED_DATA"))
    parser.add_argument("--model", default="smollm2-demo")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--probes", type=int, default=16, help="probes of the direction; the timing does not depend on it"
    )
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the data folder with --data or GRADSHIELD_SHARED_DATA")
    model, tokenizer = load_model(options.model, dtype=options.dtype, device="cpu")
    model.eval()
    from gradshield_fast import SafetyProbes

    dense = Direction.from_probes(
        model, tokenizer, SafetyProbes.default().subset(options.probes), score="refusal_margin"
    )
    low = dense.low_rank(options.rank)
    batches = read_batches(options.data, tokenizer, options.rows, options.max_length, options.batch_tokens)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    rows = sum(len(batch.positions) for batch in batches)
    times: dict[str, list[float]] = {"rank": [], "one_by_one": []}
    scores: dict[str, dict[int, float]] = {}
    for _ in range(options.rounds):
        with Scorer(model, low) as scorer:
            batched(scorer, batches[-1:])  # warm up; calibration is once a corpus, not once a batch
            start = time.perf_counter()
            scores["rank"] = batched(scorer, batches)
            times["rank"].append(time.perf_counter() - start)
        start = time.perf_counter()
        scores["one_by_one"] = one_by_one(model, dense, batches)
        times["one_by_one"].append(time.perf_counter() - start)
    order = sorted(scores["one_by_one"])
    table = torch.tensor([[scores[name][n] for n in order] for name in times], dtype=torch.float64)
    agreement = torch.corrcoef(table)[-1]
    speed = {name: tokens / min(seconds) for name, seconds in times.items()}
    ratios = [slow / fast for slow, fast in zip(times["one_by_one"], times["rank"], strict=True)]
    print(f"{rows} rows, {tokens} tokens, {options.dtype}, residual of rank {options.rank}: {low.residual:.3g}")
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
        "rows": rows,
        "tokens": tokens,
        "residual": low.residual,
    }
    append("batch_of_one", {**surroundings(vars(options)), **result})


if __name__ == "__main__":
    main()
