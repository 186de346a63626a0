"""The command line's options, each said once; a command takes those that reach its steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from gradshield_fast.errors import InputError

_MODEL, _DIRECTION, _ROWS, _CUT, _ENGINE = "Model", "Direction", "Scoring", "Threshold", "Engine"


def _option(*names: str, help: str, panel: str) -> typer.models.OptionInfo:
    return typer.Option(*names, help=help, rich_help_panel=panel)


Corpus = Annotated[
    str,
    typer.Argument(
        help="JSONL (.gz, .zst), Parquet, a folder or a quoted pattern of those, or a `datasets` folder; also s3://, gs://."
    ),
]
Run = Annotated[Path, typer.Argument(help="A run's folder.")]
MovedCorpus = Annotated[
    str | None, typer.Option("--corpus", help="Where the corpus is now, if it has moved; its name must be the same.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run; the same command goes on with it.")]

Model = Annotated[str, _option("--model", help="Folder, .gguf file, hub name, or smollm2-demo.", panel=_MODEL)]
Adapter = Annotated[str | None, _option("--adapter", help="PEFT adapter on the model.", panel=_MODEL)]
Dtype = Annotated[
    str,
    _option("--dtype", help="auto, float32, bfloat16, float16 or float64; auto: float32 on a CPU.", panel=_MODEL),
]
Device = Annotated[str, _option("--device", help="auto, cpu, cuda, cuda:1, ...", panel=_MODEL)]
TrustRemoteCode = Annotated[
    bool, _option("--trust-remote-code", help="Run Python code that comes with the model.", panel=_MODEL)
]
AllowPickle = Annotated[
    bool, _option("--allow-pickle", help="Read pickled weights, which run their author's code.", panel=_MODEL)
]

Probes = Annotated[
    Path | None, _option("--probes", help="Prompts a safe model refuses; default: the bundled ones.", panel=_DIRECTION)
]
DirectionFiles = Annotated[
    list[Path] | None,
    _option("--direction", help="A saved direction, instead of probes; several are stacked.", panel=_DIRECTION),
]
SafetyScore = Annotated[
    str,
    _option(
        "--score",
        help="refusal_margin; refusal_logprob, the paper's, for a model that refuses; compliance_logprob; "
        "identity_margin. Several with commas between are stacked.",
        panel=_DIRECTION,
    ),
]
Weights = Annotated[
    str | None,
    _option("--weights", help="Regex of weights to use; default: those that training changes.", panel=_DIRECTION),
]
Rank = Annotated[
    int | None, _option("--rank", help="Compress to this rank; default 16; 0: keep it dense.", panel=_DIRECTION)
]
Energy = Annotated[
    float | None,
    _option("--energy", help="Compress to this share of each weight's squared norm.", panel=_DIRECTION),
]
Passes = Annotated[
    int,
    _option(
        "--passes",
        help="2 or more: build it low-rank from the start, in so many passes over the probes (3 is good), without ever "
        "holding a whole gradient.",
        panel=_DIRECTION,
    ),
]
SecondMoment = Annotated[
    Path | None,
    _option("--second-moment", help="safetensors of Adam's exp_avg_sq: score an Adam step.", panel=_DIRECTION),
]
AllowUnaligned = Annotated[
    bool,
    _option("--allow-unaligned", help="Go on where the score misleads on this model.", panel=_DIRECTION),
]

Format = Annotated[
    str | None, _option("--format", help="jsonl, parquet or arrow, where the file's name does not say.", panel=_ROWS)
]
Columns = Annotated[
    str | None,
    _option("--columns", help="Such as prompt=question,response=answer; default: detected.", panel=_ROWS),
]
MaxRowBytes = Annotated[int, _option("--max-row-bytes", help="A longer row is not scored.", panel=_ROWS)]
ChatTemplate = Annotated[
    Path | None, _option("--chat-template", help="Jinja file, instead of the tokenizer's template.", panel=_ROWS)
]
MaxLength = Annotated[
    int | None,
    _option("--max-length", help="Cut rows to this many tokens; default: the model's context.", panel=_ROWS),
]
BatchTokens = Annotated[int, _option("--batch-tokens", help="Tokens of a batch, padding included.", panel=_ROWS)]
AutoBatchTokens = Annotated[
    str, _option("--batch-tokens", help="Tokens of a batch, padding included; auto: by the free memory.", panel=_ROWS)
]
PartRows = Annotated[int, _option("--part-rows", help="Rows that are committed together.", panel=_ROWS)]
Normalize = Annotated[str, _option("--normalize", help="cosine; or none: the dot product, the paper's.", panel=_ROWS)]
Norms = Annotated[bool, _option("--norms", help="Also record gradient norms.", panel=_ROWS)]
LossReduction = Annotated[
    str, _option("--loss-reduction", help="mean over a row's response tokens, or sum.", panel=_ROWS)
]
OpBackend = Annotated[str, _option("--backend", help="auto, reference, triton or native.", panel=_ROWS)]
Verify = Annotated[bool, _option("--verify", help="Hold one row against autograd before scoring.", panel=_ROWS)]
Compile = Annotated[
    bool, _option("--compile", help="Compile the model's layers: faster after a minute at the start.", panel=_ROWS)
]
Checkpoint = Annotated[
    bool, _option("--checkpoint", help="Less memory for one more forward pass a batch.", panel=_ROWS)
]
Dedupe = Annotated[
    bool,
    _option("--dedupe/--no-dedupe", help="Score rows that say the same once.", panel=_ROWS),
]
DryRun = Annotated[
    bool, _option("--dry-run", help="Read and encode all rows; load no weights, write nothing.", panel=_ROWS)
]

Alpha = Annotated[
    float | None,
    _option("--alpha", help="Nats that two Gaussians must gain over one; default 1.5 ln(n).", panel=_CUT),
]
Rule = Annotated[
    str | None,
    _option(
        "--rule",
        help="separated, the default: two Gaussians if apart, or what sticks out; paper: two Gaussians or mean + 2 "
        "deviations; outliers, the default with --combine: what sticks out of the standard bulk.",
        panel=_CUT,
    ),
]
Threshold = Annotated[
    float | None, _option("--threshold", help="Drop rows above this score, whatever the fit.", panel=_CUT)
]
Seed = Annotated[int, _option("--seed", help="Seed of the fit.", panel=_CUT)]
DirectionIndex = Annotated[
    int, _option("--direction-index", help="Which of several directions decides, from 0.", panel=_CUT)
]
Combine = Annotated[
    str | None,
    _option(
        "--combine",
        help="distance: all directions decide together, by how unlike the bulk of the corpus a row is in them.",
        panel=_CUT,
    ),
]

Engine = Annotated[str, _option("--engine", help="local, or ray: the machines of a Ray cluster.", panel=_ENGINE)]
Workers = Annotated[
    int | None,
    _option("--workers", help="Processes that read and tokenise ahead of each scorer; 0: none.", panel=_ENGINE),
]
Threads = Annotated[
    int | None, _option("--threads", help="CPU threads of a scorer; the first start's stand.", panel=_ENGINE)
]
Actors = Annotated[int | None, _option("--actors", help="Ray actors at the most.", panel=_ENGINE)]
Shard = Annotated[
    str | None,
    _option("--shard", help="I/N: score this share; start each of 1/N to N/N, then `merge`.", panel=_ENGINE),
]
LogJson = Annotated[
    bool, _option("--log-json", help="Progress as JSON lines on the standard error stream.", panel=_ENGINE)
]


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Read the value of --shard.

    Args:
        text: such as "3/16", or None.

    Returns:
        Index and number, or None.

    Raises:
        InputError: it is not of that form.
    """
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise InputError(f"--shard takes I/N, such as 3/16: got {text!r}")
    return int(index), int(count)


def parse_columns(text: str | None) -> Mapping[str, str] | None:
    """Read the value of --columns.

    Args:
        text: "prompt=question,response=answer", or None.

    Returns:
        Our name -> the corpus's name, or None.

    Raises:
        InputError: an entry is not of the form name=column, or a name comes twice.
    """
    if text is None:
        return None
    out: dict[str, str] = {}
    for entry in text.split(","):
        name, equals, column = (part.strip() for part in entry.partition("="))
        if not (name and equals and column) or name in out:
            raise InputError(f"--columns takes name=column, each name once, with commas between: got {entry!r}")
        out[name] = column
    return out


def parse_batch_tokens(text: str) -> int | Literal["auto"]:
    """Read the value of --batch-tokens.

    Args:
        text: a number, or "auto".

    Returns:
        The number, or "auto".

    Raises:
        InputError: it is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--batch-tokens takes a number or auto: got {text!r}") from None


def read_template(path: Path | None) -> str | None:
    """Read the value of --chat-template.

    Args:
        path: a Jinja file, or None.

    Returns:
        Its text, or None.

    Raises:
        InputError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat-template {path} cannot be read: {error}") from error
