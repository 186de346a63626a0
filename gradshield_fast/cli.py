"""The command line: `gradshield-fast filter`, its steps one by one, a demo, and what this machine can run.

Exit codes: 0 done; 1 finished, but some rows could not be scored; 2 bad input or options; 130 and 143 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradshield_fast import cli_options as o
from gradshield_fast.cli_folder import TOP_ROWS, folder_commands, show_run
from gradshield_fast.cli_plan import plan_commands
from gradshield_fast.console import (
    DONE,
    INTERRUPTED,
    SOME_UNSCORED,
    TERMINATED,
    Settings,
    Terminated,
    catch_sigterm,
    guarded,
    say,
    watching,
)
from gradshield_fast.corpus import MAX_ROW_BYTES
from gradshield_fast.errors import InputError
from gradshield_fast.heap import keep_freed_memory
from gradshield_fast.pipeline.options import (
    CorpusOptions,
    CutOptions,
    DirectionOptions,
    EngineOptions,
    ModelOptions,
    RunOptions,
    ScoringOptions,
)

app = typer.Typer(
    name="gradshield-fast",
    help="Find the rows of a fine-tuning corpus that would break a language model's safety, before any training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def program(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also after a command.")] = False,
) -> None:
    """Options of the whole program."""


@app.command("filter")
@guarded(resumable=True)
def filter_corpus(
    corpus: o.Corpus,
    model: o.Model,
    out: o.Out,
    probes: o.Probes = None,
    direction: o.DirectionFiles = None,
    score: o.SafetyScore = "refusal_margin",
    weights: o.Weights = None,
    rank: o.Rank = None,
    energy: o.Energy = None,
    passes: o.Passes = 1,
    second_moment: o.SecondMoment = None,
    allow_unaligned: o.AllowUnaligned = False,
    adapter: o.Adapter = None,
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
    part_rows: o.PartRows = 1024,
    normalize: o.Normalize = "cosine",
    norms: o.Norms = False,
    loss_reduction: o.LossReduction = "mean",
    backend: o.OpBackend = "auto",
    verify: o.Verify = False,
    compile: o.Compile = False,
    checkpoint: o.Checkpoint = False,
    dedupe: o.Dedupe = True,
    rule: o.Rule = None,
    alpha: o.Alpha = None,
    threshold: o.Threshold = None,
    seed: o.Seed = 0,
    direction_index: o.DirectionIndex = 0,
    combine: o.Combine = None,
    engine: o.Engine = "local",
    workers: o.Workers = None,
    threads: o.Threads = None,
    actors: o.Actors = None,
    shard: o.Shard = None,
    log_json: o.LogJson = False,
    dry_run: o.DryRun = False,
) -> int:
    """Direction, scores, threshold, split: from a corpus to kept.jsonl, dropped.jsonl and unscored.jsonl."""
    options = RunOptions(
        corpus=CorpusOptions(corpus, format, o.parse_columns(columns), max_row_bytes),
        model=ModelOptions(model, adapter, dtype, device, trust_remote_code, allow_pickle),
        out=out,
        direction=DirectionOptions(
            tuple(direction or ()),
            probes,
            score,
            weights,
            rank,
            energy,
            second_moment,
            allow_unaligned=allow_unaligned,
            passes=passes,
        ),
        scoring=ScoringOptions(
            max_length,
            o.read_template(chat_template),
            o.parse_batch_tokens(batch_tokens),
            part_rows,
            normalize,
            norms,
            loss_reduction,
            backend,
            verify,
            compile,
            checkpoint,
            dedupe,
        ),
        cut=CutOptions(alpha, threshold, seed, direction_index, rule, combine),
        engine=EngineOptions(engine, workers, o.parse_shard(shard), actors, threads),
    )
    return _dry(options) if dry_run else _run(options, log_json=log_json)


@app.command("score")
@guarded(resumable=True)
def score_corpus(
    corpus: o.Corpus,
    model: o.Model,
    out: o.Out,
    direction: o.DirectionFiles = None,
    adapter: o.Adapter = None,
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
    part_rows: o.PartRows = 1024,
    normalize: o.Normalize = "cosine",
    norms: o.Norms = False,
    loss_reduction: o.LossReduction = "mean",
    backend: o.OpBackend = "auto",
    verify: o.Verify = False,
    compile: o.Compile = False,
    checkpoint: o.Checkpoint = False,
    dedupe: o.Dedupe = True,
    engine: o.Engine = "local",
    workers: o.Workers = None,
    threads: o.Threads = None,
    actors: o.Actors = None,
    shard: o.Shard = None,
    log_json: o.LogJson = False,
    dry_run: o.DryRun = False,
) -> int:
    """Score a corpus against saved directions; `threshold` then draws the line."""
    if not direction:
        raise InputError("score needs --direction FILE (make one with `gradshield-fast direction`)")
    options = RunOptions(
        corpus=CorpusOptions(corpus, format, o.parse_columns(columns), max_row_bytes),
        model=ModelOptions(model, adapter, dtype, device, trust_remote_code, allow_pickle),
        out=out,
        direction=DirectionOptions(tuple(direction)),
        scoring=ScoringOptions(
            max_length,
            o.read_template(chat_template),
            o.parse_batch_tokens(batch_tokens),
            part_rows,
            normalize,
            norms,
            loss_reduction,
            backend,
            verify,
            compile,
            checkpoint,
            dedupe,
        ),
        cut=None,
        engine=EngineOptions(engine, workers, o.parse_shard(shard), actors, threads),
    )
    return _dry(options) if dry_run else _run(options, log_json=log_json)


@app.command("direction")
@guarded()
def build_direction(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", help="The .safetensors file to write.")],
    probes: o.Probes = None,
    score: o.SafetyScore = "refusal_margin",
    weights: o.Weights = None,
    rank: o.Rank = None,
    energy: o.Energy = None,
    passes: o.Passes = 1,
    second_moment: o.SecondMoment = None,
    allow_unaligned: o.AllowUnaligned = False,
    adapter: o.Adapter = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    batch_tokens: o.BatchTokens = 2048,
) -> int:
    """Build the reference direction from probes and save it."""
    options = DirectionOptions(
        (), probes, score, weights, rank, energy, second_moment, batch_tokens, allow_unaligned, passes
    )
    from gradshield_fast.loading import load_model
    from gradshield_fast.pipeline.directing import make_direction
    from gradshield_fast.tables import facts, residual_line, safety_rows

    with watching() as reporter:
        reporter.stage("loading the model")
        loaded, tokenizer = load_model(
            model,
            adapter=adapter,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        made = make_direction(loaded, tokenizer, options, reporter)
        made.save(out)
    Console().print(
        facts(
            [
                ("written", out),
                ("direction", made),
                ("residual", residual_line(made.residual, made.meta)),
                ("norm", ", ".join(f"{norm:.4g}" for norm in made.norm)),
                *safety_rows(made.meta),
            ]
        )
    )
    return DONE


app.add_typer(folder_commands)
app.add_typer(plan_commands)


@app.command("demo")
@guarded(resumable=True)
def run_demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("demo_out"),
) -> int:
    """Score a bundled corpus with a real model (SmolLM2-135M-Instruct), on the CPU."""
    from gradshield_fast.demo import benign_share, demo_options, dropped_by_kind, explanation
    from gradshield_fast.pipeline.summary import summarize
    from gradshield_fast.tables import print_kinds

    print(explanation())
    options = demo_options(out)
    code = _run(options, top=TOP_ROWS)
    kinds = dropped_by_kind(summarize(out), options.corpus)
    print_kinds(kinds, Console())
    print(benign_share(kinds))
    return code


@app.command("doctor")
@guarded()
def examine_machine(
    prefer: Annotated[
        list[str] | None,
        typer.Option("--prefer", help="OP=BACKEND, attention=NAME or linear=NAME: what is taken where it can run."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear-measurements", help="Forget what was fastest or preferred.")] = False,
) -> int:
    """Say what this machine can run, and why not the rest."""
    from gradshield_fast.doctor import machine, measured_backends, op_backends, precisions, prefer_backends, software
    from gradshield_fast.tables import facts

    prefer_backends(prefer or (), clear=clear)
    console = Console()
    console.print(facts([*machine(), *precisions()], title="machine"))
    console.print(facts(software(), title="software"))
    console.print(facts(op_backends(), title="ops"))
    if kept := measured_backends():
        print("what is taken by measurement or preference")
        for key, said in kept:
            print(f"  {key}: {said}")
    return DONE


@app.command("bench")
@guarded()
def time_ops(
    op: Annotated[list[str] | None, typer.Option("--op", help="An op; again for another; default: all.")] = None,
    model: Annotated[str, typer.Option("--model", help="Layer of smollm2, llama-3.2-1b, qwen3-4b, llama-3-8b.")] = (
        "smollm2"
    ),
    tokens: Annotated[int, typer.Option("--tokens", min=1)] = 2048,
    rank: Annotated[int, typer.Option("--rank", min=1)] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: o.Device = "auto",
    backend: Annotated[list[str] | None, typer.Option("--backend", help="Default: all that the op has.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Also torch.compile of the reference.")] = False,
    isa: Annotated[
        str | None, typer.Option("--isa", help="Native CPU kernels go no higher: portable, avx2, avx512 or amx.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="How long to repeat each.")] = 0.5,
    json: Annotated[bool, typer.Option("--json", help="One JSON line a timing, nothing else.")] = False,
) -> int:
    """Time the ops at a real layer's shape: every backend, in turns with plain PyTorch."""
    from gradshield_fast.bench_report import print_timings

    with watching() as reporter:
        print_timings(
            op or (),
            model,
            tokens,
            rank,
            dtype,
            device,
            backend or (),
            compiled,
            isa,
            seconds,
            json,
            Console(),
            reporter,
        )
    return DONE


def _run(options: RunOptions, top: int = 0, log_json: bool = False) -> int:
    from gradshield_fast.pipeline.run import run

    shard = options.engine.shard
    with watching(log_json) as reporter:
        if not run(options, reporter):
            what = f"the run in {options.out}" if shard is None else f"shard {shard[0]}/{shard[1]} in {options.out}"
            reporter.note(f"{what} is complete: nothing is left to do")
    if shard is not None:
        print(f"shard {shard[0]}/{shard[1]} is scored; after the last one: gradshield-fast merge {options.out}")
        return DONE
    return show_run(options.out, top=top)


def _dry(options: RunOptions) -> int:
    from gradshield_fast.pipeline.dry import dry_run
    from gradshield_fast.tables import print_dry_run

    with watching() as reporter:
        dry = dry_run(options, reporter)
    width = {"float64": 8, "bfloat16": 2, "float16": 2}.get(options.model.dtype, 4)
    print_dry_run(dry, width, dry.batch_tokens, Console())
    return DONE if set(dry.statuses) <= {"ok", "truncated"} else SOME_UNSCORED


def main(arguments: list[str] | None = None) -> None:
    """Run the program.

    Args:
        arguments: what follows its name; None: from the command line.

    Raises:
        SystemExit: always, with the exit code.
    """
    given = sys.argv[1:] if arguments is None else arguments
    Settings.debug = "--debug" in given
    catch_sigterm()
    keep_freed_memory()
    try:
        app(args=[argument for argument in given if argument != "--debug"], prog_name="gradshield-fast")
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except Terminated:
        say("terminated")
        raise SystemExit(TERMINATED) from None
    raise SystemExit(DONE)
