"""The commands that are given a run's folder: threshold, merge, status, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradshield_fast import cli_options as o
from gradshield_fast.console import DONE, SOME_UNSCORED, guarded, watching
from gradshield_fast.pipeline.options import CutOptions

TOP_ROWS = 10

folder_commands = typer.Typer()


@folder_commands.command("threshold")
@guarded(resumable=True)
def draw_threshold(
    run: o.Run,
    rule: o.Rule = None,
    alpha: o.Alpha = None,
    threshold: o.Threshold = None,
    seed: o.Seed = 0,
    direction_index: o.DirectionIndex = 0,
    combine: o.Combine = None,
    corpus: o.MovedCorpus = None,
    log_json: o.LogJson = False,
) -> int:
    """Fit or set the threshold of a scored run, and write its three files anew."""
    return _recut(run, CutOptions(alpha, threshold, seed, direction_index, rule, combine), corpus, log_json)


@folder_commands.command("merge")
@guarded(resumable=True)
def merge_shards(
    run: o.Run,
    rule: o.Rule = None,
    alpha: o.Alpha = None,
    threshold: o.Threshold = None,
    seed: o.Seed = 0,
    direction_index: o.DirectionIndex = 0,
    combine: o.Combine = None,
    corpus: o.MovedCorpus = None,
    log_json: o.LogJson = False,
) -> int:
    """Check that the shards scored every row once, then choose the threshold and write the three files."""
    return _recut(run, CutOptions(alpha, threshold, seed, direction_index, rule, combine), corpus, log_json)


@folder_commands.command("status")
@guarded()
def show_status(
    run: o.Run, as_json: Annotated[bool, typer.Option("--json", help="One JSON object, nothing else.")] = False
) -> int:
    """Say how far a run is, while it works or after it died, and how long it will take."""
    from gradshield_fast.pipeline.status import run_status
    from gradshield_fast.tables_status import print_status

    status = run_status(run)
    if as_json:
        print(json.dumps(status.to_dict()))
    else:
        print_status(status, Console())
    return DONE


@folder_commands.command("report")
@guarded()
def report_run(
    run: o.Run,
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the highest scores to show.")] = TOP_ROWS,
    corpus: o.MovedCorpus = None,
) -> int:
    """Sum up a run: counts, threshold, and the rows with the highest scores."""
    show_run(run, top=top, corpus=corpus)
    return DONE


def show_run(out: Path, top: int = 0, corpus: str | None = None) -> int:
    """Print what a run's folder holds.

    Args:
        out: the folder.
        top: how many of the highest scores to show.
        corpus: where the corpus is now, if it has moved.

    Returns:
        The exit code that says whether all rows have scores.
    """
    from gradshield_fast.pipeline.record import recorded_corpus
    from gradshield_fast.pipeline.summary import excerpts, summarize
    from gradshield_fast.tables import print_summary, print_top

    console, summary = Console(), summarize(out, top)
    print_summary(summary, console)
    if summary.top:
        where = recorded_corpus(summary.record, corpus)
        print_top(summary, excerpts(where, [row.row for row in summary.top]), console)
    return SOME_UNSCORED if summary.unscored else DONE


def _recut(run: Path, cut: CutOptions, corpus: str | None, log_json: bool) -> int:
    from gradshield_fast.pipeline.run import recut

    with watching(log_json) as reporter:
        recut(run, cut, corpus, reporter)
    return show_run(run)
