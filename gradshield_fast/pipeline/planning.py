"""What a run will need, from a sample of its rows: memory, disk, operations, and hours where a rate was measured."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradshield_fast import storage
from gradshield_fast.chat import Encoded
from gradshield_fast.corpus import parse_row
from gradshield_fast.corpus_files import find_files
from gradshield_fast.corpus_sample import Sample, sample_rows
from gradshield_fast.errors import InputError
from gradshield_fast.loading import count_products, load_config, load_tokenizer, pick_device
from gradshield_fast.pipeline.encoding import encode_row
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.identity import model_identity
from gradshield_fast.pipeline.manifest import read_manifest
from gradshield_fast.pipeline.measuring import Measured, measure
from gradshield_fast.pipeline.options import RunOptions
from gradshield_fast.pipeline.parts import Part, part_bytes
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.record import run_record
from gradshield_fast.pipeline.units import Unit
from gradshield_fast.pipeline.worker import make_encoder

if TYPE_CHECKING:
    from gradshield_fast.loading import Products

GIB = 2.0**30
_BYTES = {"float64": 8, "bfloat16": 2, "float16": 2}


@dataclass
class Plan:
    """What a run will need.

    Attributes:
        rows: rows of the corpus.
        exact: whether they were counted, or estimated from the sample.
        sampled: rows of the sample.
        scorable: share of the sample that can be scored.
        tokens: tokens that will be scored, duplicates not taken off.
        tokens_error: twice the standard error of that.
        response_tokens: those of them that carry the loss.
        longest: tokens of the longest row of the sample.
        weights: bytes of the model's weights, or None where its class is not known.
        direction: bytes more while the direction is built; 0 where a finished one is given.
        step: bytes of a scoring step at its peak, or None where nothing was measured.
        free: bytes of memory that are free, or were named, or None where that is not known.
        disk: bytes that the run will write at the most.
        disk_free: bytes that are free where it will write, or None.
        operations: floating-point operations in linear layers, or None.
        rate: tokens a second, or None.
        source: where the rate comes from.
        problems: why the run cannot fit, and what would; empty where it can as far as that is known.
    """

    rows: int
    exact: bool
    sampled: int
    scorable: float
    tokens: float
    tokens_error: float
    response_tokens: float
    longest: int
    weights: int | None
    direction: int
    step: int | None
    free: int | None
    disk: int
    disk_free: int | None
    operations: float | None
    rate: float | None
    source: str
    problems: list[str]

    @property
    def hours(self) -> float | None:
        """How long scoring will take at the measured rate."""
        return None if self.rate is None else self.tokens / self.rate / 3600


def plan_run(
    options: RunOptions,
    *,
    sample: int,
    measured: bool = False,
    like: Path | None = None,
    memory: int | None = None,
    reporter: Reporter | None = None,
) -> Plan:
    """Work out what a run will need; its folder is not touched.

    Args:
        options: the run.
        sample: about how many rows to look at.
        measured: load the model, and measure the memory of its steps and the rate on rows of the sample.
        like: the folder of a run of the same model in the same way, whose rate is taken.
        memory: bytes of memory of the device, where it is another than this machine's.
        reporter: told about the steps.

    Returns:
        The plan.

    Raises:
        InputError: the corpus, the model or an option does not do, or the run of `like` was of another model.
    """
    reporter = reporter or Reporter()
    corpus, scoring = options.corpus, options.scoring
    reporter.stage("sampling")
    drawn = sample_rows(find_files(corpus.path, corpus.format), sample, corpus.max_row_bytes)
    trust = options.model.trust_remote_code
    tokenizer = load_tokenizer(options.model.name, trust_remote_code=trust)
    config = load_config(options.model.name, trust_remote_code=trust)
    encoder = make_encoder(tokenizer, config, options)
    rows = [
        encode_row(parse_row(raw, n, corpus.columns, corpus.max_row_bytes), encoder) for n, raw in enumerate(drawn.rows)
    ]
    usable = [row for row in rows if row.usable]
    tokens = np.array([len(row.input_ids) if row.usable else 0 for row in rows], dtype=np.float64)
    response = sum(row.response_tokens for row in usable) / len(rows)
    products = count_products(config)
    rate, source, found = None, "not known: --measure takes it, --like RUN reads it from a run", None
    if like is not None:
        rate, source = _rate_of(like, options)
    if measured:
        if not usable:
            raise InputError("no row of the sample can be scored, so there is nothing to measure")
        found = measure(options, usable, reporter)
        rate, source = found.rate, f"measured just now on {found.tokens:,} tokens of the sample, {found.device}"
    error = 2 * float(tokens.std()) / math.sqrt(len(rows)) * drawn.total
    made = Plan(
        rows=drawn.total,
        exact=drawn.exact,
        sampled=len(rows),
        scorable=len(usable) / len(rows),
        tokens=float(tokens.mean()) * drawn.total,
        tokens_error=error,
        response_tokens=response * drawn.total,
        longest=int(tokens.max()),
        weights=None if products is None else products.parameters * _BYTES.get(options.model.dtype, 4),
        direction=0 if options.direction.files or products is None else _direction_bytes(options, products),
        step=None if found is None else found.step,
        free=memory if memory is not None else _free(options, found),
        disk=_disk(drawn, rows),
        disk_free=_disk_free(options.out),
        operations=None,
        rate=rate,
        source=source,
        problems=[],
    )
    if products is not None:
        again = 1.5 if scoring.checkpoint else 1.0
        made.operations = again * (4.0 * made.tokens * products.blocks + 4.0 * made.response_tokens * products.head)
    made.problems = _problems(made, options)
    return made


def _direction_bytes(options: RunOptions, products: Products) -> int:
    """A float32 gradient of every weight, and a float32 copy of the weights it is taken at; in passes neither."""
    return 0 if options.direction.passes > 1 else 4 * products.parameters


def _free(options: RunOptions, found: Measured | None) -> int | None:
    if found is not None:
        return found.free
    from gradshield_fast.memory import free_bytes

    return free_bytes(pick_device(options.model.device))


def _disk(drawn: Sample, rows: list[Encoded]) -> int:
    """Outputs hold each row once, in the corpus's form or as text; scores as they are written for the sample."""
    part = Part.blank(0, len(rows), 1)
    values = np.random.default_rng(0).standard_normal((4, len(rows))).astype(np.float32)  # does not compress
    part.fihs[:, 0], part.loss, part.grad_norm = values[0], values[1], values[2]
    part.id = [str(n) for n in range(len(rows))]
    part.status, part.reason = [row.status for row in rows], [row.reason for row in rows]
    part.tokens = np.array([len(row.input_ids) for row in rows], dtype=np.int32)
    scores = len(part_bytes(part, Unit(0, 0, 0, len(rows), 0, 0, ""))) / len(rows)
    return round(max(drawn.stored, drawn.row_bytes * drawn.total) + scores * drawn.total)


def _disk_free(out: Path) -> int | None:
    here = next((path for path in (out, *out.absolute().parents) if path.is_dir()), None)
    return shutil.disk_usage(here).free if here else None


def _problems(made: Plan, options: RunOptions) -> list[str]:
    problems = []
    if made.free is not None and made.weights is not None:
        need = made.weights + max(made.step or 0, made.direction)
        if need > made.free:
            problems.append(_memory_problem(made, options, need))
    if made.disk_free is not None and made.disk > made.disk_free:
        problems.append(
            f"disk: it writes up to {made.disk / GIB:.1f} GiB and {made.disk_free / GIB:.1f} GiB are free at "
            f"{options.out}; choose another --out"
        )
    return problems


def _memory_problem(made: Plan, options: RunOptions, need: int) -> str:
    assert made.free is not None
    assert made.weights is not None
    advice = []
    scored = made.weights + (made.step or 0)
    if made.direction and scored <= made.free:
        advice.append("--passes 3, which builds the direction without a float32 gradient of every weight")
    if made.step and made.weights < made.free < scored and not options.scoring.checkpoint:
        advice.append("--checkpoint or a smaller --batch-tokens")
    if options.model.dtype in ("auto", "float32") and made.weights / 2 < made.free:
        advice.append("--dtype bfloat16")
    advice.append(f"a device with {math.ceil(need / GIB)} GiB")
    return (
        f"memory: {need / GIB:.1f} GiB are needed and {made.free / GIB:.1f} GiB are free; "
        f"what would help: {'; '.join(advice)}"
    )


def _rate_of(like: Path, options: RunOptions) -> tuple[float, str]:
    folder = RunFolder(like)
    manifest = read_manifest(folder) if like.is_dir() else None
    if manifest is None:
        raise InputError(f"--like {like} holds no run")
    if manifest.identity["model"] != model_identity(options.model):
        raise InputError(
            f"--like {like} is a run of another model, type or device; its rate says nothing about this one"
        )
    record = run_record(folder, manifest)
    seconds, tokens = (sum(session[name] for session in record["sessions"]) for name in ("seconds", "tokens"))
    if not seconds or not tokens:
        raise InputError(f"--like {like} has not scored anything yet")
    device = record.get("environment", {}).get("device", "an unknown device")
    return tokens / seconds, f"of the run in {storage.file_name(str(like))}, {tokens:,} tokens on {device}"
