"""What a run would read and need, without its weights and without writing a byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gradshield_fast.chat import Encoded
from gradshield_fast.corpus import read_corpus
from gradshield_fast.loading import count_parameters, load_config, load_tokenizer
from gradshield_fast.packing import BATCH_TOKENS, pack
from gradshield_fast.pipeline.encoding import encode_row
from gradshield_fast.pipeline.identity import identity
from gradshield_fast.pipeline.options import RunOptions
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.worker import make_encoder


@dataclass
class DryRun:
    """What was counted.

    Attributes:
        rows: rows of the corpus.
        statuses: status -> rows.
        reasons: status -> the first row that has it, and why.
        notes: what was done to rows, such as "system_merged" -> rows.
        tokens: tokens that would be scored.
        response_tokens: those of them that the loss is on.
        longest: tokens of the longest row that would be scored.
        batch_tokens: tokens of a batch; for "auto", which needs the weights, those where nothing is known.
        batches: batches that would be scored.
        padding: share of their tokens that is padding.
        encoder: how rows are encoded.
        parameters: how many weights the model has, or None where its class cannot be told from the config.
        vocabulary: how many tokens it knows, or None.
    """

    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    batch_tokens: int = BATCH_TOKENS
    batches: int = 0
    padding: float = 0.0
    encoder: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    vocabulary: int | None = None


def dry_run(options: RunOptions, reporter: Reporter | None = None) -> DryRun:
    """Read and encode every row of a corpus, and check what can be checked without the weights.

    Args:
        options: the run; its folder is not touched.
        reporter: told how far it is.

    Returns:
        What was counted.
    """
    reporter = reporter or Reporter()
    identity(options)
    if options.direction.probes:
        from gradshield_fast.safety import SafetyProbes

        SafetyProbes.load(options.direction.probes)
    trust = options.model.trust_remote_code
    reporter.stage("loading the tokenizer")
    tokenizer, config = (
        load_tokenizer(options.model.name, trust_remote_code=trust),
        load_config(options.model.name, trust_remote_code=trust),
    )
    encoder = make_encoder(tokenizer, config, options)
    out = DryRun(encoder=encoder.describe(), parameters=count_parameters(config))
    out.vocabulary = getattr(config, "vocab_size", None)
    reporter.stage("encoding")
    padded = 0
    scoring = options.scoring
    if scoring.batch_tokens != "auto":
        out.batch_tokens = scoring.batch_tokens
    rows = _encoded(options, encoder, out, reporter)
    for batch in pack(rows, batch_tokens=out.batch_tokens, window=scoring.part_rows):
        out.batches += 1
        padded += batch.input_ids.size
    out.padding = 1.0 - out.tokens / padded if padded else 0.0
    return out


def _encoded(options: RunOptions, encoder: Any, out: DryRun, reporter: Reporter) -> Iterator[tuple[int, Encoded]]:
    corpus = options.corpus
    for row in read_corpus(
        corpus.path, format=corpus.format, columns=corpus.columns, max_row_bytes=corpus.max_row_bytes
    ):
        encoded = encode_row(row, encoder)
        out.rows += 1
        out.statuses[encoded.status] += 1
        out.notes.update(encoded.notes)
        if encoded.reason:
            out.reasons.setdefault(encoded.status, f"row {row.index}: {encoded.reason}")
        reporter.advance(1)
        if encoded.usable:
            out.tokens += len(encoded.input_ids)
            out.response_tokens += encoded.response_tokens
            out.longest = max(out.longest, len(encoded.input_ids))
            yield row.index, encoded
