"""The order of a run's steps, and where a second start goes on.

A step is done if its files are there: the direction, each part of the scores, the three outputs. So a run that was
stopped, by whatever, goes on when it is started again, and scores no committed row twice.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradshield_fast import storage
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.corpus_files import find_files, iter_raw
from gradshield_fast.errors import GradShieldError, InputError
from gradshield_fast.fingerprint import model_fingerprint
from gradshield_fast.loading import context_length, load_model
from gradshield_fast.pipeline.cutting import check_direction, find_cut, split
from gradshield_fast.pipeline.directing import describe, make_direction
from gradshield_fast.pipeline.engine import Engine, corpus_rows
from gradshield_fast.pipeline.folder import MANIFEST_FORMAT, RunFolder
from gradshield_fast.pipeline.identity import differences, identity
from gradshield_fast.pipeline.options import CorpusOptions, CutOptions, ModelOptions, RunOptions
from gradshield_fast.pipeline.parts import part_path, write_part
from gradshield_fast.pipeline.progress import Reporter

if TYPE_CHECKING:
    from gradshield_fast.direction import Direction
    from gradshield_fast.memory import Choice
    from gradshield_fast.scorer import Scorer


@dataclass
class _Session:
    """What one start of a run did."""

    started: str
    seconds: float = 0.0
    rows: int = 0
    tokens: int = 0
    halved_batches: int = 0


def run(options: RunOptions, reporter: Reporter | None = None) -> bool:
    """Score a corpus and, unless `options.cut` is None, split it; go on where an earlier start stopped.

    Args:
        options: what to do.
        reporter: told how far it is.

    Returns:
        Whether there was anything left to do.

    Raises:
        InputError: the corpus, the model, an option or the folder does not do, or the folder holds another run.
        UnalignedModelError: the safety score would mislead on this model.
        ScoringError: a weight would be scored wrongly.
    """
    reporter = reporter or Reporter()
    reporter.stage("reading")
    wanted = identity(options)
    folder = RunFolder(options.out)
    folder.create()
    with folder.locked():
        manifest = _open(folder, options, wanted)
        if _finished(folder, manifest, options.cut):
            return False
        _score(folder, manifest, options, reporter)
        if options.cut is not None:
            _cut(folder, manifest, options.corpus, options.cut, reporter)
    return True


def recut(out: Path, cut: CutOptions, corpus: str | Path | None = None, reporter: Reporter | None = None) -> None:
    """Choose the threshold of a scored run, anew if need be, and split its corpus.

    Args:
        out: the run's folder.
        cut: how to choose.
        corpus: where the corpus is now, if it has moved; its content must be the same.
        reporter: told how far it is.

    Raises:
        InputError: the folder holds no run, or one that is not scored to its end.
    """
    folder = RunFolder(out)
    manifest = folder.read_manifest() if folder.path.is_dir() else None
    if manifest is None:
        raise InputError(f"{out} holds no run: make one with `gradshield-fast score` or `gradshield-fast filter`")
    with folder.locked():
        missing = _missing(folder, manifest)
        if missing is None or missing:
            raise InputError(f"the run in {out} is not scored to its end; run the command that started it again")
        _cut(folder, manifest, corpus_of(manifest, corpus), cut, reporter or Reporter())


def corpus_of(manifest: dict[str, Any], moved_to: str | Path | None = None) -> CorpusOptions:
    """Say which rows a run is about.

    Args:
        manifest: the run's record.
        moved_to: where the corpus is now, if it has moved.

    Returns:
        The options it was read with.
    """
    read = manifest["identity"]["corpus"]
    path = moved_to or manifest["request"]["corpus"]["path"]
    return CorpusOptions(path, read["format"], read["columns"], read["max_row_bytes"])


def _open(folder: RunFolder, options: RunOptions, wanted: dict[str, Any]) -> dict[str, Any]:
    """Take up the run in the folder, or begin one; a run that has not scored anything yet gives way to another."""
    old = folder.read_manifest()
    manifest = {
        "format": MANIFEST_FORMAT,
        "state": "new",
        "identity": wanted,
        "request": _request(options),
        "rows": None,
        "sessions": [],
    }
    if old is not None:
        other = differences(old["identity"], wanted)
        if other and any(folder.scores.glob("part-*.parquet")):
            raise InputError(
                f"output folder {folder.path} holds another run: it differs in {', '.join(other)}; name a new folder"
            )
        if not other:
            manifest = {**old, "request": manifest["request"]}
        elif not any(name.startswith(("version", "model.", "direction.")) for name in other):
            manifest.update((key, old[key]) for key in ("direction", "loaded") if key in old)
    folder.write_json(folder.manifest, manifest)
    return manifest


def _finished(folder: RunFolder, manifest: dict[str, Any], cut: CutOptions | None) -> bool:
    if manifest["state"] != "complete":
        return cut is None and _missing(folder, manifest) == []
    if cut is not None and manifest["cut"] != asdict(cut):
        other = ", ".join(differences(manifest["cut"], asdict(cut)))
        raise InputError(
            f"output folder {folder.path} holds a finished run with another threshold: {other}; to draw the line "
            f"anew, use `gradshield-fast threshold {folder.path}`, or name a new folder"
        )
    return True


def _missing(folder: RunFolder, manifest: dict[str, Any]) -> list[int] | None:
    """List the parts that are not scored; None where it is not known how many there are."""
    if manifest["rows"] is None:
        return None
    return [n for n in range(_count(manifest)) if not part_path(folder, n).exists()]


def _count(manifest: dict[str, Any]) -> int:
    return -(-manifest["rows"] // manifest["identity"]["scoring"]["part_rows"])


def _score(folder: RunFolder, manifest: dict[str, Any], options: RunOptions, reporter: Reporter) -> None:
    if manifest["rows"] is None:
        corpus = options.corpus
        # counts as reading does, and refuses an empty corpus
        corpus_rows(corpus)
        manifest["rows"] = sum(1 for _ in iter_raw(find_files(corpus.path, corpus.format), corpus.max_row_bytes))
    missing = _missing(folder, manifest)
    if not missing:
        return
    reporter.stage("loading the model")
    model, tokenizer = load_model(**asdict(options.model))
    _record_model(folder, manifest, model)
    encoder = make_encoder(tokenizer, model.config, options)
    manifest["encoder"] = encoder.describe()
    direction = _direction(folder, manifest, options, model, tokenizer, reporter)
    if options.cut is not None:
        check_direction(options.cut, direction.count)

    from gradshield_fast.scorer import Scorer

    scoring = options.scoring
    manifest["state"] = "scoring"
    session = _Session(datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    begun = time.perf_counter()
    with _recorded(folder, manifest, session):
        with Scorer(
            model,
            direction,
            scoring.backend,
            scoring.loss_reduction,
            norms=scoring.needs_norms,
            verify=scoring.verify,
            compile=scoring.compile,
            checkpoint=scoring.checkpoint,
        ) as scorer:
            done = manifest["rows"] - sum(_rows_of(manifest, n) for n in missing)
            reporter.stage("scoring", manifest["rows"], done=done)
            kept = manifest.get("batches", {}).get("tokens")

            def choose(choice: Choice) -> None:
                # before the first part: every start of a run makes the same batches
                manifest["batches"] = asdict(choice)
                folder.write_json(folder.manifest, manifest)

            engine = Engine(scorer, encoder, scoring, reporter, kept, choose)
            for numbers in _runs(missing):
                rows = corpus_rows(options.corpus, numbers[0] * scoring.part_rows)
                for number in numbers:
                    part = engine.score(rows, number * scoring.part_rows, _rows_of(manifest, number))
                    write_part(part_path(folder, number), part)
                    session.rows += len(part.row)
                    session.tokens += int(part.tokens[part.scored].sum())
                    session.halved_batches = engine.halved
                    session.seconds = time.perf_counter() - begun
            manifest["scorer"] = {"backends": scorer.backends, "ways": scorer.ways, "methods": _methods(scorer)}
        manifest["state"] = "scored"


def _cut(
    folder: RunFolder, manifest: dict[str, Any], corpus: CorpusOptions, options: CutOptions, reporter: Reporter
) -> None:
    reporter.stage("choosing the threshold")
    parts = [part_path(folder, number) for number in range(_count(manifest))]
    cut = find_cut(parts, options)
    manifest.update(state="scored", cut=asdict(options))
    folder.write_json(folder.manifest, manifest)
    folder.write_json(folder.threshold, cut)
    fingerprint = manifest["identity"]["corpus"]
    counts = split(
        folder,
        corpus,
        fingerprint,
        parts,
        cut,
        rows=manifest["rows"],
        direction=options.direction,
        reporter=reporter,
    )
    manifest.update(state="complete", counts=counts)
    folder.write_json(folder.manifest, manifest)


def make_encoder(tokenizer: Any, config: Any, options: RunOptions) -> ChatEncoder:
    """Make the encoder of a run.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's config, for its context length.
        options: the run.

    Returns:
        The encoder.

    Raises:
        InputError: rows are to be cut beyond what the model can read.
    """
    limit, wanted = context_length(config), options.scoring.max_length
    if limit is not None and wanted is not None and wanted > limit:
        raise InputError(f"--max-length {wanted} is beyond the model's context of {limit} tokens")
    return ChatEncoder(tokenizer, max_length=wanted or limit, template=options.scoring.template)


def _direction(
    folder: RunFolder, manifest: dict[str, Any], options: RunOptions, model: Any, tokenizer: Any, reporter: Reporter
) -> Direction:
    from gradshield_fast.direction import Direction

    if "direction" not in manifest or not folder.direction.exists():
        direction = make_direction(model, tokenizer, options.direction, reporter)
        direction.save(folder.direction)
        manifest["direction"] = describe(direction)
        folder.write_json(folder.manifest, manifest)
        reporter.note(f"direction: {manifest['direction']['summary']}")
    # read back even when just made: every start of a run scores against the same bits
    return Direction.load(folder.direction, model)


def _record_model(folder: RunFolder, manifest: dict[str, Any], model: Any) -> None:
    """Record the model that was loaded; the one of an earlier start must have been the same."""
    import torch
    import transformers

    weight = next(model.parameters())
    loaded = {"weights": model_fingerprint(model), "dtype": str(weight.dtype).removeprefix("torch.")}
    loaded["device"] = weight.device.type
    other = differences(manifest.get("loaded", loaded), loaded, "model.")
    if other:
        raise InputError(
            f"output folder {folder.path} holds a run of another model: {', '.join(other)}; name a new folder"
        )
    manifest["loaded"] = loaded
    manifest["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else platform.machine(),
    }


@contextlib.contextmanager
def _recorded(folder: RunFolder, manifest: dict[str, Any], session: _Session) -> Iterator[None]:
    """Write the session into the run's record, however it ends; a failure to do so hides no other error."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(GradShieldError):
            _add_session(folder, manifest, session)
        raise
    _add_session(folder, manifest, session)


def _add_session(folder: RunFolder, manifest: dict[str, Any], session: _Session) -> None:
    manifest["sessions"].append(asdict(replace(session, seconds=round(session.seconds, 3))))
    folder.write_json(folder.manifest, manifest)


def _rows_of(manifest: dict[str, Any], number: int) -> int:
    size = manifest["identity"]["scoring"]["part_rows"]
    return min(size, manifest["rows"] - number * size)


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Group consecutive numbers, so that the corpus is positioned once for each group."""
    rest = iter(numbers)
    group = list(islice(rest, 1))
    for number in rest:
        if number != group[-1] + 1:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _methods(scorer: Scorer) -> dict[str, int]:
    """Count the weights that each rule scored; which rule ran belongs to the result."""
    uses = (use.split(" @ ")[0] for uses in scorer.methods.values() for use in uses)
    return dict(sorted(Counter(uses).items()))


def _request(options: RunOptions) -> dict[str, Any]:
    """Say what was asked for in words that a person can type again."""
    model: ModelOptions = options.model
    return {
        "corpus": {"path": storage.absolute(options.corpus.path)},
        "model": model.name,
        "adapter": model.adapter,
        "probes": str(options.direction.probes) if options.direction.probes else None,
        "directions": [str(path) for path in options.direction.files],
    }
