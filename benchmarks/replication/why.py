"""Whether FIHS is what it claims to be: what one step on a row does to S, and where it comes from.

    python benchmarks/replication/why.py --start STARTS/plain --data DATA

The first-order claim is tested by taking the step. For each of some rows of every kind theta' = theta - lr grad loss(x)
in float32, and S(theta') - S(theta) is measured on the probes that the direction was built from, for several learning
rates; and the same for one step of Adam from rest, along sign(grad loss(x)). Correlations are those of the
measured loss of safety with FIHS, over all rows.

The same rows are scored with each layer's and each weight kind's part of the direction alone, which add up to FIHS: the
share of the score that a part holds, and how well it alone finds planted rows. One JSON line goes to
benchmarks/results/why.jsonl.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from context import score_rows
from directions import restrict, row_gradients
from sample import sample
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from gradshield_fast import Direction, SafetyProbes
from gradshield_fast.answers import AnswerEncoder
from gradshield_fast.batches import PaddedBatch, padded_batch
from gradshield_fast.chat import ChatEncoder, Encoded
from gradshield_fast.errors import GradShieldError, InputError
from gradshield_fast.loading import load_model
from gradshield_fast.packing import pack
from gradshield_fast.response_logprob import answer_means
from gradshield_fast.weight_gradients import chosen_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings  # beside this folder, not installed

KINDS = ("embed", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm")


class Safety:
    """S of the probes, for both scores at once.

    Attributes:
        batch: the answers, refusals first.
        count: probes.
    """

    def __init__(self, tokenizer: Any, probes: SafetyProbes) -> None:
        """Encode the answers: of each probe the first refusal and its compliance.

        Args:
            tokenizer: the tokenizer.
            probes: the probes.
        """
        encoder = AnswerEncoder(tokenizer)
        answers = [encoder.encode(p, probes.refusals[0], f"probe {i}") for i, p in enumerate(probes.prompts)]
        answers += [encoder.encode(p, probes.compliance_of(i), f"probe {i}") for i, p in enumerate(probes.prompts)]
        (packed,) = pack(enumerate(answers), batch_tokens=1 << 62, window=len(answers))
        order = np.argsort(packed.positions)
        self.batch: PaddedBatch = padded_batch(
            {
                "input_ids": packed.input_ids[order],
                "labels": packed.labels[order],
                "attention_mask": packed.attention_mask[order],
            },
            torch.device("cpu"),
            None,
        )
        self.count = len(probes)

    def values(self, model: Any) -> torch.Tensor:
        """Measure S.

        Args:
            model: the model.

        Returns:
            Float[Tensor, "2"], refusal log-probability and refusal margin, nats a token.
        """
        means = answer_means(model, self.batch)
        refusal, compliance = means[: self.count].mean(), means[self.count :].mean()
        return torch.stack([refusal, refusal - compliance])


def directions(model: Any, safety: Safety) -> dict[str, Direction]:
    """Differentiate S.

    Args:
        model: the model.
        safety: what is measured.

    Returns:
        "refusal" and "margin", dense.
    """
    weights = chosen_weights(model, None)
    for weight in weights.values():
        weight.requires_grad_(True)
    values = safety.values(model)
    found = {}
    for k, name in enumerate(("refusal", "margin")):
        gradients = torch.autograd.grad(values[k], list(weights.values()), retain_graph=k == 0)
        found[name] = Direction(dict(zip(weights, gradients, strict=True)))
    return found


def steps(model: Any, rows: Sequence[Encoded], safety: Safety, rates: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Take one step on each row from the same weights, and measure S after it.

    Args:
        model: float32 model; as before when this returns.
        rows: the rows.
        safety: what is measured.
        rates: "sgd" and "adam" -> learning rates.

    Returns:
        float64 [rows, steps, 2], change of both scores; steps as in `rates`.
    """
    weights = chosen_weights(model, None)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        base = safety.values(model)
    plan = [(kind, rate) for kind, some in rates.items() for rate in some]
    changes = np.zeros((len(rows), len(plan), 2))
    begin = time.perf_counter()

    @torch.no_grad()
    def take(i: int, gradient: dict[str, torch.Tensor]) -> None:
        for k, (kind, rate) in enumerate(plan):
            for name, weight in weights.items():
                g = gradient[name]
                torch.sub(before[name], g.sign() if kind == "adam" else g, alpha=rate, out=weight.data)
            changes[i, k] = (safety.values(model) - base).double().numpy()
        for name, weight in weights.items():
            weight.data.copy_(before[name])
        if i % 20 == 19:
            print(f"  {i + 1}/{len(rows)} rows, {time.perf_counter() - begin:.0f} s", flush=True)

    row_gradients(model, rows, take)
    return changes


def parts(direction: Direction) -> dict[str, Direction]:
    """Take a direction apart.

    Args:
        direction: a single one.

    Returns:
        "layer 0", ... and kinds of weights, each restricted to its own; layers and the embedding add up to the whole
        but for the last norm, and kinds to all of it.
    """
    layers = sorted({int(n) for name in direction.names for n in re.findall(r"layers\.(\d+)\.", name)})
    tests = {f"layer {n}": (lambda name, n=n: f"layers.{n}." in name) for n in layers}
    tests |= {kind: (lambda name, kind=kind: kind in name) for kind in KINDS}
    found = {label: restrict(direction, test) for label, test in tests.items()}
    return {label: part for label, part in found.items() if part is not None}


def correlations(lost: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Compare measured and predicted.

    Args:
        lost: float64 [rows], how much S fell.
        scores: float64 [rows].

    Returns:
        Pearson's and Spearman's coefficients.
    """
    return {
        "pearson": round(float(np.corrcoef(lost, scores)[0, 1]), 4),
        "spearman": round(float(np.corrcoef(rankdata(lost), rankdata(scores))[0, 1]), 4),
    }


def claim(
    changes: np.ndarray, scores: np.ndarray, norms: np.ndarray, rates: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Test the first-order claim.

    Args:
        changes: from `steps`.
        scores: float64 [rows, 2], FIHS of both scores.
        norms: float64 [rows], of the rows' gradients.
        rates: as for `steps`.

    Returns:
        Score -> step -> correlations of the loss of safety with FIHS and with its cosine, the slope of the former (1
        where the first order is all), and the median change of S.
    """
    plan = [(kind, rate) for kind, some in rates.items() for rate in some]
    found: dict[str, Any] = {}
    for s, score in enumerate(("refusal", "margin")):
        for k, (kind, rate) in enumerate(plan):
            lost = -changes[:, k, s]
            predicted = rate * scores[:, s]
            found.setdefault(score, {})[f"{kind} {rate:g}"] = {
                "dot": correlations(lost, scores[:, s]),
                "cosine": correlations(lost, scores[:, s] / norms),
                "slope": round(float(lost @ predicted / (predicted @ predicted)), 4),
                "median_lost": float(f"{np.median(lost):.4g}"),
            }
    return found


def by_part(values: np.ndarray, labels: Sequence[str], source: np.ndarray) -> dict[str, Any]:
    """Say what each part of the direction does alone.

    Args:
        values: float64 [rows, parts].
        labels: of the parts.
        source: where each row is from.

    Returns:
        Part -> mean score of each source, and AUC of either kind of planted rows against the benign ones.
    """
    planted = {kind: source == kind for kind in ("open", "disguised")}
    benign = ~(planted["open"] | planted["disguised"])
    found = {}
    for k, label in enumerate(labels):
        x = values[:, k]
        found[label] = {
            "mean": {str(name): float(f"{x[source == name].mean():.4g}") for name in np.unique(source)},
            "auc": {
                kind: round(float(roc_auc_score(mask[benign | mask], x[benign | mask])), 4)
                for kind, mask in planted.items()
            },
        }
    return found


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
    parser.add_argument("--start", type=Path, required=True, help="folder that align.py wrote")
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="data folder")
    parser.add_argument("--probes", type=int, default=8, help="probes that S is measured on")
    parser.add_argument("--benign", type=int, default=25, help="rows of each task")
    parser.add_argument("--open", type=int, default=60, help="openly harmful rows")
    parser.add_argument("--sgd", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 1e-3])
    parser.add_argument("--adam", type=float, nargs="+", default=[1e-5])
    parser.add_argument("--max-length", type=int, default=160, help="rows are cut there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", default="why", help="file in benchmarks/results that gets a line")
    options = parser.parse_args(argv)
    if options.data is None:
        raise InputError("why: give the data folder with --data or GRADSHIELD_SHARED_DATA")
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(str(options.start), dtype="float32", device="cpu")
    encoder = ChatEncoder(tokenizer, max_length=options.max_length)
    drawn = [
        (name, encoder.encode(row.messages)) for name, row in sample(Path(options.data), options.benign, options.open)
    ]
    drawn = [pair for pair in drawn if pair[1].usable]
    source, rows = np.array([name for name, _ in drawn]), [row for _, row in drawn]
    safety = Safety(tokenizer, SafetyProbes.default().subset(options.probes))
    dense = directions(model, safety)
    low = {name: direction.low_rank(rank=16) for name, direction in dense.items()}
    pieces = {name: parts(direction) for name, direction in low.items()}
    labels = list(pieces["refusal"])
    stack = Direction.stack([*low.values(), *(piece for some in pieces.values() for piece in some.values())])
    del dense
    values = score_rows(model, stack, rows)
    rates = {"sgd": options.sgd, "adam": options.adam}
    changes = steps(model, rows, safety, rates)
    scores, norms = values[:, :2], values[:, -2]
    first = claim(changes, scores, norms, rates)
    for score, some in first.items():
        for step, found in some.items():
            print(f"{score:8} {step:10} dot {found['dot']}  cosine {found['cosine']}  slope {found['slope']}")
    layers = {
        name: by_part(values[:, 2 + k * len(labels) : 2 + (k + 1) * len(labels)], labels, source)
        for k, name in enumerate(pieces)
    }
    numbers = np.concatenate([scores, norms[:, None], changes.reshape(len(rows), -1)], axis=1).tolist()
    points = [[name, *(float(f"{x:.5g}") for x in row)] for name, row in zip(source.tolist(), numbers, strict=True)]
    counts = {str(name): int((source == name).sum()) for name in np.unique(source)}
    record = {"rows": counts, "claim": first, "parts": layers, "points": points}
    append(options.results, {**surroundings(vars(options)), **record})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
