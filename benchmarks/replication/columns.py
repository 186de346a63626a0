"""Scores of rows against many directions in one pass, and the formulas over them that are compared.

Tables, each kept on disk with its directions:

    main    rank 16 unless named: refusal at rank 4, 16 and 64, margin, compliance, pressed, identity, anchors, lora;
            and the norm of the row's gradient, its loss, and its response tokens
    dense   refusal without compression
    adam    refusal and margin divided by the root of a second moment, which is measured on 32 rows of the corpus, at
            rank 16
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from context import Context, score_rows
from directions import RANK, anchors, from_score, low_rank_adapter, second_moment

from gradshield_fast import Direction
from gradshield_fast.chat import Encoded
from gradshield_fast.distance import Distance

SCORES = ("refusal", "margin", "compliance", "pressed", "identity")
MAIN = ("refusal-4", "refusal-64", *SCORES, "anchors", "lora")
COLUMNS: Mapping[str, tuple[str, ...]] = {"main": MAIN, "dense": ("dense",), "adam": ("refusal-adam", "margin-adam")}
"""Table -> its columns; "main" has "norm", "loss" and "tokens" as well."""

MOMENT_ROWS = 32

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Formula:
    """One score made of columns.

    Attributes:
        score: columns -> float64 [rows].
        tables: the tables that it needs.
    """

    score: Callable[[Values], np.ndarray]
    tables: tuple[str, ...] = ("main",)


def _main(context: Context) -> Direction:
    model, tokenizer, probes = context.model, context.tokenizer, context.probes
    found: dict[str, Direction] = {}
    for name in SCORES:
        print(f"direction {name}", flush=True)
        dense = from_score(model, tokenizer, probes, name)
        found[name] = dense.low_rank(rank=RANK)
        if name == "refusal":
            found |= {"refusal-4": dense.low_rank(rank=4), "refusal-64": dense.low_rank(rank=64)}
            found["lora"] = low_rank_adapter(dense)
    found["anchors"] = anchors(model, tokenizer, probes).low_rank(rank=RANK)
    return Direction.stack([found[name] for name in MAIN])


def _dense(context: Context) -> Direction:
    return from_score(context.model, context.tokenizer, context.probes, "refusal")


def _adam(context: Context) -> Direction:
    picks = [i for i in np.argsort(context.keys)[:MOMENT_ROWS].tolist() if context.encoded[i].usable]
    moment = second_moment(context.model, [context.encoded[i] for i in picks])
    made = []
    for name in ("refusal", "margin"):
        dense = from_score(context.model, context.tokenizer, context.probes, name)
        eps = 1e-3 * float(np.mean([float(moment[n].mean()) for n in dense.names])) ** 0.5
        made.append(dense.precondition(moment, eps=eps).low_rank(rank=RANK))
    return Direction.stack(made)


BUILD: Mapping[str, Callable[[Context], Direction]] = {"main": _main, "dense": _dense, "adam": _adam}


def _stored(path: Path, build: Callable[[], Direction]) -> Direction:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        build().save(path)
    return Direction.load(path)


def columns(context: Context, tables: Sequence[str] = tuple(BUILD)) -> Values:
    """Score a corpus.

    Args:
        context: the cell.
        tables: which tables, a subset of `BUILD`'s names.

    Returns:
        Column's name -> float64 [rows].
    """
    values: dict[str, np.ndarray] = {}
    for name in tables:
        # Adam's second moment, and so the score, belongs to the corpus
        drawn = hashlib.sha256(" ".join(sorted(context.keys)).encode()).hexdigest()[:12]
        table = f"adam-{drawn}" if name == "adam" else name

        def compute(encoded: list[Encoded], name: str = name, table: str = table) -> np.ndarray:
            path = context.cache.folder / f"{table}.safetensors"
            return score_rows(context.model, _stored(path, lambda: BUILD[name](context)), encoded)

        found = context.table(table, compute)
        values |= {column: found[:, k] for k, column in enumerate(COLUMNS[name])}
        if name == "main":
            values |= {"norm": found[:, -2], "loss": found[:, -1]}
    return values | {"tokens": np.array([float(e.response_tokens) for e in context.encoded])}


def standard(scores: np.ndarray) -> np.ndarray:
    """Make scores of different units comparable.

    Args:
        scores: float64 [rows].

    Returns:
        Distance from the median in units of the median distance; outliers, which are what is looked for, move neither.
    """
    away = scores - np.median(scores)
    return away / (np.median(np.abs(away)) or 1.0)


DISTANCE = ("margin", "compliance", "identity")
"""The directions of `--score refusal_margin,compliance_logprob,identity_margin`."""


def distance(values: Values) -> np.ndarray:
    """Let several directions decide together, as `--combine distance` does.

    Args:
        values: columns.

    Returns:
        float64 [rows], about N(0, 1) in the bulk.
    """
    x = np.stack([values[name] / values["norm"] for name in DISTANCE], axis=1)
    return Distance.fit(x).of(x).astype(np.float64)


def _dot(column: str, tables: tuple[str, ...] = ("main",)) -> Formula:
    return Formula(lambda v: v[column], tables)


def _cosine(column: str) -> Formula:
    return Formula(lambda v: v[column] / v["norm"])


def _larger(*names: str) -> Formula:
    return Formula(lambda v: np.max([standard(v[name] / v["norm"]) for name in names], axis=0))


def _sum(*names: str) -> Formula:
    return Formula(lambda v: np.sum([standard(v[name] / v["norm"]) for name in names], axis=0))


FORMULAS: dict[str, Formula] = {
    "loss": _dot("loss"),
    "gradient-norm": _dot("norm"),
    "anchors-cosine": _cosine("anchors"),
    "fihs-cosine": _cosine("refusal"),
    "fihs-rank4": _dot("refusal-4"),
    "fihs-rank64": _dot("refusal-64"),
    "fihs-dense": _dot("dense", ("dense",)),
    "fihs-lora": _dot("lora"),
    "fihs-adam": _dot("refusal-adam", ("adam",)),
    "margin": _dot("margin"),
    "margin-cosine": _cosine("margin"),
    "margin-adam": _dot("margin-adam", ("adam",)),
    "compliance-cosine": _cosine("compliance"),
    "pressed-cosine": _cosine("pressed"),
    "identity-cosine": _cosine("identity"),
    "distance": Formula(distance),
    "larger-refusal-margin": _larger("refusal", "margin"),
    "sum-refusal-margin": _sum("refusal", "margin"),
    "larger-margin-identity": _larger("margin", "identity"),
    "sum-margin-identity": _sum("margin", "identity"),
}
