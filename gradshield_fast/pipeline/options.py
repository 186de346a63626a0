"""What a run was asked to do; grouped by the step that the options reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gradshield_fast.corpus import MAX_ROW_BYTES
from gradshield_fast.corpus_formats import check_columns
from gradshield_fast.errors import InputError

DEFAULT_RANK = 16
SAFETY_SCORES = ("refusal_logprob", "refusal_margin", "compliance_logprob", "identity_margin")
"""Those of `safety.SCORES`, and `refusal_margin` on the probes of `SafetyProbes.identity`."""
COMBINATIONS = ("distance",)
NORMALIZATIONS = ("none", "cosine")
REDUCTIONS = ("mean", "sum")
CUT_RULES = ("paper", "separated", "outliers")
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class CorpusOptions:
    """Which rows.

    Attributes:
        path: as for `read_corpus`.
        format: as for `read_corpus`.
        columns: as for `read_corpus`.
        max_row_bytes: as for `read_corpus`.
    """

    path: str | Path
    format: str | None = None
    columns: Mapping[str, str] | None = None
    max_row_bytes: int = MAX_ROW_BYTES

    def __post_init__(self) -> None:
        check_columns(self.columns)


@dataclass(frozen=True)
class ModelOptions:
    """Which model; as for `load_model`."""

    name: str
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class DirectionOptions:
    """Which direction: files, or how to build one from probes.

    Attributes:
        files: saved directions, stacked if there are several; then nothing is built.
        probes: a probes file; None: the bundled probes. `identity_margin` has its own.
        score: the safety score whose gradient is the direction; several, with commas between, are stacked.
        weights: regular expression on the names of the weights; None: those that training would change.
        rank: compress to this rank; 0 keeps the direction dense; None: `DEFAULT_RANK` for a direction that is built,
            as it is for one from a file.
        energy: compress to this share of each weight's squared norm instead.
        second_moment: safetensors file of Adam's second moments, to score an Adam step.
        batch_tokens: tokens of a batch of probes.
        allow_unaligned: go on where the safety score would mislead on this model.
        passes: 1: the dense gradient, compressed afterwards; 2 or more: factors of that rank from the start, in as many
            passes over the probes.
    """

    files: tuple[Path, ...] = ()
    probes: Path | None = None
    score: str = "refusal_margin"
    weights: str | None = None
    rank: int | None = None
    energy: float | None = None
    second_moment: Path | None = None
    batch_tokens: int = 2048
    allow_unaligned: bool = False
    passes: int = 1

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise InputError(f"--passes must be at least 1: got {self.passes}")
        if self.passes > 1:
            whole = {"--rank 0": self.rank == 0, "--energy": self.energy, "--second-moment": self.second_moment}
            for option, value in whole.items():
                if value:
                    raise InputError(f"{option} needs the dense gradient, but --passes {self.passes} never makes it")
            if self.files:
                raise InputError("--passes is for building a direction, but --direction names a finished one")
        if not set(self.scores) <= set(SAFETY_SCORES):
            raise InputError(
                f"--score must be one of {', '.join(SAFETY_SCORES)}, or several with commas between: got {self.score!r}"
            )
        if self.rank is not None and self.energy is not None:
            raise InputError("--rank and --energy both say how far to compress the direction; give one of them")
        if self.rank is not None and self.rank < 0:
            raise InputError(f"--rank must be 0 (keep the direction dense) or more: got {self.rank}")
        if self.files:
            built = {"--probes": self.probes, "--weights": self.weights, "--second-moment": self.second_moment}
            for option, value in built.items():
                if value is not None:
                    raise InputError(f"{option} is for building a direction, but --direction names a finished one")

    @property
    def scores(self) -> tuple[str, ...]:
        """The safety scores, one a direction."""
        return tuple(name.strip() for name in self.score.split(","))


@dataclass(frozen=True)
class ScoringOptions:
    """How the rows are scored.

    Attributes:
        max_length: rows are cut to as many tokens; None: the model's context length.
        template: Jinja source of a chat template, or the name of one of the tokenizer's; None: the tokenizer's.
        batch_tokens: tokens of a batch, padding included; "auto": as many as fit the free memory when the run begins,
            which it then keeps. Batches change scores by rounding at the most.
        part_rows: rows of a part, the unit that is committed and resumed.
        normalize: "none": the dot product; "cosine": divided by the norms of gradient and direction.
        norms: also record the gradient norms (the cosine does).
        loss_reduction: "mean" over a row's response tokens, or "sum".
        backend: backend of the ops.
        verify: hold one row against autograd before anything is scored.
        compile: run the model's repeated layers through torch.compile.
        checkpoint: run each repeated layer's forward pass again in the backward pass, for less memory.
        dedupe: score rows that say the same once.
    """

    max_length: int | None = None
    template: str | None = None
    batch_tokens: int | Literal["auto"] = 2048
    part_rows: int = 1024
    normalize: str = "cosine"
    norms: bool = False
    loss_reduction: str = "mean"
    backend: str = "auto"
    verify: bool = False
    compile: bool = False
    checkpoint: bool = False
    dedupe: bool = True

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATIONS:
            raise InputError(f"--normalize must be one of {', '.join(NORMALIZATIONS)}: got {self.normalize!r}")
        if self.loss_reduction not in REDUCTIONS:
            raise InputError(f"--loss-reduction must be one of {', '.join(REDUCTIONS)}: got {self.loss_reduction!r}")
        for option, value in (("--batch-tokens", self.batch_tokens), ("--part-rows", self.part_rows)):
            if isinstance(value, str) and value != "auto":
                raise InputError(f"{option} must be a number or 'auto': got {value!r}")
            if isinstance(value, int) and value < 1:
                raise InputError(f"{option} must be at least 1: got {value}")

    @property
    def needs_norms(self) -> bool:
        """Whether the scorer has to work out gradient norms."""
        return self.norms or self.normalize == "cosine"


@dataclass(frozen=True)
class CutOptions:
    """Where the line is drawn between kept and dropped rows.

    Attributes:
        alpha: how much better two Gaussians must fit than one; None: the default of `fit_threshold`.
        value: drop rows above this score, whatever their distribution.
        seed: seed of the mixture's fit.
        direction: which direction's score decides, where several were stacked.
        rule: "paper", "separated" or "outliers", see `fit_threshold`; None: "outliers" of a combination,
            else "separated".
        combine: "distance": all directions decide together, see `gradshield_fast.distance`; None: one does.
    """

    alpha: float | None = None
    value: float | None = None
    seed: int = 0
    direction: int = 0
    rule: str | None = None
    combine: str | None = None

    def __post_init__(self) -> None:
        if self.combine is not None and self.combine not in COMBINATIONS:
            raise InputError(f"--combine must be one of {', '.join(COMBINATIONS)}: got {self.combine!r}")
        if self.combine is not None and self.direction:
            raise InputError("--combine lets all directions decide and --direction-index one; give one of them")
        if self.fitted_rule not in CUT_RULES:
            raise InputError(f"--rule must be one of {', '.join(CUT_RULES)}: got {self.rule!r}")
        if self.rule == "outliers" and self.combine is None:
            raise InputError("--rule outliers is for scores whose bulk is standard normal: give --combine distance too")
        if self.alpha is not None and self.value is not None:
            raise InputError("--alpha is for fitting the threshold and --threshold sets it; give one of them")
        for option, number in (("--alpha", self.alpha), ("--threshold", self.value)):
            if number is not None and not math.isfinite(number):
                raise InputError(f"{option} must be a finite number: got {number}")
        if self.direction < 0:
            raise InputError(f"--direction-index counts from 0: got {self.direction}")

    @property
    def fitted_rule(self) -> str:
        """The rule, named or not."""
        return self.rule or ("separated" if self.combine is None else "outliers")

    @property
    def column(self) -> str:
        """Name of the score that decides: a column's, or the combination's."""
        return self.combine or fihs_column(self.direction)


@dataclass(frozen=True)
class EngineOptions:
    """What works on a run; no score depends on it.

    Attributes:
        kind: "local": this process; "ray": actors on the machines of a Ray cluster.
        workers: processes that read, render and tokenise ahead of each scorer; 0: the scorer does it itself; None: by
            the device and the corpus.
        shard: index, from 1, and number of the shards that share a folder; None: all of the run.
        actors: Ray actors at the most; None: as many as the cluster has room for.
        threads: CPU threads of a scorer; None: as torch chooses. The first start's stand, as they may change the last
            bits of a score.
    """

    kind: str = "local"
    workers: int | None = 0
    shard: tuple[int, int] | None = None
    actors: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ENGINES:
            raise InputError(f"--engine must be one of {', '.join(ENGINES)}: got {self.kind!r}")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"--workers must be 0 (none) or more: got {self.workers}")
        for option, value in (("--actors", self.actors), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise InputError(f"{option} must be at least 1: got {value}")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise InputError(f"--shard I/N counts from 1/N to N/N: got {self.shard[0]}/{self.shard[1]}")
        if self.shard is not None and self.kind != "local":
            raise InputError("--shard is for processes that are started one by one; --engine ray deals out the units")


@dataclass(frozen=True)
class RunOptions:
    """All of it; `cut` is None for a run that stops at the scores."""

    corpus: CorpusOptions
    model: ModelOptions
    out: Path
    direction: DirectionOptions = field(default_factory=DirectionOptions)
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    cut: CutOptions | None = field(default_factory=CutOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.engine.shard is not None and self.cut not in (None, CutOptions()):
            raise InputError("a shard draws no threshold: give its options to `gradshield-fast merge`")


def fihs_column(direction: int) -> str:
    """Name the column of a direction's scores.

    Args:
        direction: its position in the stack.

    Returns:
        `fihs` for the first, `fihs_1` for the second, and so on.
    """
    return "fihs" if direction == 0 else f"fihs_{direction}"
