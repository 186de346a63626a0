"""The order of a run's steps, and where a second start goes on.

A step is done if its files are there: the manifest, the direction, each part of the scores, the outputs. So a run that
was stopped, by whatever, goes on when it is started again, and scores no committed row twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from gradshield_fast.errors import InputError
from gradshield_fast.files import write_whole
from gradshield_fast.pipeline.combining import check_combination
from gradshield_fast.pipeline.cutting import find_cut, split
from gradshield_fast.pipeline.duplicates import fill_duplicates
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.identity import differences
from gradshield_fast.pipeline.manifest import Manifest, open_manifest, read_manifest, request, wanted_identity
from gradshield_fast.pipeline.options import CorpusOptions, CutOptions, RunOptions
from gradshield_fast.pipeline.parts import part_path, read_part, why_unreadable
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.record import keep_record, recorded_corpus, run_record
from gradshield_fast.pipeline.sessions import recorded
from gradshield_fast.pipeline.units import Unit, shard_units
from gradshield_fast.pipeline.worker import Task, scored_here


def run(options: RunOptions, reporter: Reporter | None = None) -> bool:
    """Score a corpus and, unless `options.cut` is None, split it; go on where an earlier start stopped.

    Args:
        options: what to do. A shard scores its units and does not split.
        reporter: told how far it is.

    Returns:
        Whether there was anything left to do.

    Raises:
        InputError: the corpus, the model, an option or the folder does not do, or the folder holds another run.
        UnalignedModelError: the safety score would mislead on this model.
        ScoringError: a weight would be scored wrongly, or workers died again and again.
    """
    reporter = reporter or Reporter()
    reporter.stage("reading")
    folder = RunFolder(options.out)
    wanted = wanted_identity(folder, options)
    folder.create()
    shard = options.engine.shard
    with folder.locked(shard):
        manifest = open_manifest(folder, options, wanted, reporter)
        units = manifest.units if shard is None else shard_units(manifest.units, *shard)
        missing = _missing(folder, units, reporter)
        if not missing and (shard is not None or _finished(folder, options.cut)):
            return False
        if missing:
            _score(folder, manifest, units, missing, options, reporter)
        if shard is None:
            duplicates = fill_duplicates(folder, manifest.units)
            changes = {"state": "scored", "request": request(options), "duplicates": duplicates}
            keep_record(folder, manifest, changes)
            if options.cut is not None:
                _cut(folder, manifest, options.corpus, options.cut, reporter)
    return True


def recut(out: Path, cut: CutOptions, corpus: str | Path | None = None, reporter: Reporter | None = None) -> None:
    """Choose the threshold of a scored run, anew if need be, and split its corpus.

    Every part is read and held against the manifest, whoever made it: each row must be in exactly one of them.

    Args:
        out: the run's folder.
        cut: how to choose.
        corpus: where the corpus is now, if it has moved; its content must be the same.
        reporter: told how far it is.

    Raises:
        InputError: the folder holds no run, or one that is not scored to its end.
    """
    reporter = reporter or Reporter()
    folder = RunFolder(out)
    manifest = read_manifest(folder) if folder.path.is_dir() else None
    if manifest is None:
        raise InputError(f"{out} holds no run: make one with `gradshield-fast score` or `gradshield-fast filter`")
    with folder.locked():
        reporter.stage("checking the parts")
        missing = _missing(folder, manifest.units, reporter)
        if missing:
            first = missing[0]
            raise InputError(
                f"the run in {out} is not scored to its end: {len(missing)} of {len(manifest.units)} parts are "
                f"missing or damaged, the first {part_path(folder, first.number).name} with rows {first.first} to "
                f"{first.first + first.rows - 1}; run the command that started it again, or that of each shard"
            )
        stray = {path.name for path in folder.scores.glob("part-*.parquet")}
        stray -= {part_path(folder, unit.number).name for unit in manifest.units}
        if stray:
            raise InputError(f"{folder.scores / sorted(stray)[0]} is no part of this run; move it elsewhere")
        keep_record(folder, manifest, {"state": "scored", "duplicates": fill_duplicates(folder, manifest.units)})
        _cut(folder, manifest, recorded_corpus(run_record(folder, manifest), corpus), cut, reporter)


def _finished(folder: RunFolder, cut: CutOptions | None) -> bool:
    record = folder.read(folder.record) or {}
    if cut is None:
        return bool(record)
    files = record.get("counts", {}).get("files", {}).values()
    if record.get("state") != "complete" or not all((folder.path / name).exists() for name in files):
        return False
    if record["cut"] != asdict(cut):
        other = ", ".join(differences(record["cut"], asdict(cut)))
        raise InputError(
            f"output folder {folder.path} holds a finished run with another threshold: {other}; to draw the line "
            f"anew, use `gradshield-fast threshold {folder.path}`, or name a new folder"
        )
    return True


def _missing(folder: RunFolder, units: Iterable[Unit], reporter: Reporter) -> list[Unit]:
    """List the units without a part that can be read to its end and is theirs."""
    missing = []
    for unit in units:
        path = part_path(folder, unit.number)
        why = why_unreadable(path, unit) if path.exists() else ""
        if why is not None:
            missing.append(unit)
            if why:
                reporter.note(f"{path.name} is damaged, its rows are to be scored anew: {why}")
    return missing


def _score(
    folder: RunFolder, manifest: Manifest, units: list[Unit], missing: list[Unit], options: RunOptions, told: Reporter
) -> None:
    shard = options.engine.shard
    about = {"engine": options.engine.kind, "shard": None if shard is None else f"{shard[0]}/{shard[1]}"}
    rows, left = (sum(unit.rows for unit in some) for some in (units, missing))
    engine = scored_here
    if options.engine.kind == "ray":
        from gradshield_fast.pipeline.ray_engine import scored_by_ray as engine
    with recorded(folder, about) as session:

        def begin() -> None:
            session.begin()
            told.stage("scoring", rows, done=rows - left)

        for content, timing in engine(Task(folder, manifest, missing, options, told, begin, session.outcome)):
            write_whole(part_path(folder, timing.unit), content)
            session.add(timing)


def _cut(folder: RunFolder, manifest: Manifest, corpus: CorpusOptions, options: CutOptions, reporter: Reporter) -> None:
    reporter.stage("choosing the threshold")
    parts = [part_path(folder, unit.number) for unit in manifest.units]
    scores = read_part(parts[0]).fihs.shape[1]
    check_combination(options, scores, manifest.identity["scoring"]["normalize"])
    cut = find_cut(parts, options)
    keep_record(folder, manifest, {"state": "scored", "cut": asdict(options)})
    folder.write(folder.threshold, cut)
    counts = split(
        folder,
        corpus,
        manifest.identity["corpus"],
        parts,
        cut,
        rows=manifest.rows,
        direction=options.direction,
        reporter=reporter,
    )
    keep_record(folder, manifest, {"state": "complete", "counts": counts})
