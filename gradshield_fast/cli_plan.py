"""The command that says what a run will need before anything is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradshield_fast import cli_options as o
from gradshield_fast.console import DONE, guarded, watching
from gradshield_fast.corpus import MAX_ROW_BYTES
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.options import CorpusOptions, DirectionOptions, ModelOptions, RunOptions, ScoringOptions

plan_commands = typer.Typer()


@plan_commands.command("plan")
@guarded()
def plan_a_run(
    corpus: o.Corpus,
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", help="Where it would write; nothing is written now.")] = Path("."),
    direction: o.DirectionFiles = None,
    rank: o.Rank = None,
    passes: o.Passes = 1,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    format: o.Format = None,
    columns: o.Columns = None,
    max_row_bytes: o.MaxRowBytes = MAX_ROW_BYTES,
    chat_template: o.ChatTemplate = None,
    max_length: o.MaxLength = None,
    batch_tokens: o.AutoBatchTokens = "2048",
    compile: o.Compile = False,
    checkpoint: o.Checkpoint = False,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Rows to look at, about.")] = 2000,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model, and measure a step's memory and the rate.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option("--like", help="A run of this model on such a device: take its rate.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0.001, help="GiB of the device, if it is another than this one.")
    ] = None,
) -> int:
    """Sample a corpus: rows, tokens, memory, disk, operations, and hours at a measured rate; refuse what cannot fit."""
    from gradshield_fast.pipeline.planning import GIB, plan_run
    from gradshield_fast.tables_plan import print_plan

    options = RunOptions(
        corpus=CorpusOptions(corpus, format, o.parse_columns(columns), max_row_bytes),
        model=ModelOptions(model, None, dtype, device, trust_remote_code, allow_pickle),
        out=out,
        direction=DirectionOptions(tuple(direction or ()), rank=rank, passes=passes),
        scoring=ScoringOptions(
            max_length,
            o.read_template(chat_template),
            o.parse_batch_tokens(batch_tokens),
            compile=compile,
            checkpoint=checkpoint,
        ),
    )
    with watching() as reporter:
        plan = plan_run(
            options,
            sample=sample,
            measured=measure,
            like=like,
            memory=None if memory is None else int(memory * GIB),
            reporter=reporter,
        )
    print_plan(plan, Console())
    if plan.problems:
        raise InputError(f"this run cannot fit: {' | '.join(plan.problems)}")
    return DONE
