"""What a run's folder says to a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradshield_fast.corpus import parse_row
from gradshield_fast.corpus_files import find_files, iter_raw
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.combining import deciding
from gradshield_fast.pipeline.cutting import is_dropped
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.manifest import read_manifest
from gradshield_fast.pipeline.options import CorpusOptions, CutOptions
from gradshield_fast.pipeline.parts import Part, part_path, read_part
from gradshield_fast.pipeline.record import run_record


@dataclass(frozen=True)
class TopRow:
    """A row with a high score.

    Attributes:
        row: its position in the corpus.
        id: its own id.
        score: the score that decides.
        loss: its loss.
        dropped: whether it lies above the threshold.
    """

    row: int
    id: str
    score: float
    loss: float
    dropped: bool


@dataclass
class Summary:
    """A run, told from the files in its folder.

    Attributes:
        path: the folder.
        state: "new", "scoring", "scored" or "complete".
        record: all that its files say, as in run.json.
        cut: the content of threshold.json, or None.
        parts: the files of the scores so far, in the rows' order.
        rows: rows that were looked at.
        scored: those of them that have a score.
        dropped: those of them that lie above the threshold.
        duplicates: rows that say what an earlier one says, and share its score.
        statuses: how many rows have which status, the most frequent first.
        top: rows with the highest scores, the highest first.
    """

    path: Path
    state: str
    record: dict[str, Any]
    cut: dict[str, Any] | None
    parts: list[Path]
    rows: int = 0
    scored: int = 0
    dropped: int = 0
    duplicates: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    top: list[TopRow] = field(default_factory=list)

    @property
    def unscored(self) -> int:
        """How many rows were looked at and have no score."""
        return self.rows - self.scored

    @property
    def seconds(self) -> float:
        """Time spent on scoring, over all starts."""
        return sum(session["seconds"] for session in self.record["sessions"])

    @property
    def decider(self) -> int:
        """Which direction's score draws the line, where they are not combined."""
        return CutOptions(**self.record["cut"]).direction if "cut" in self.record else 0

    def speed(self, what: str) -> float:
        """Say how fast it was.

        Args:
            what: "rows" or "tokens".

        Returns:
            As many a second, over all starts; 0.0 if nothing was timed.
        """
        return sum(session[what] for session in self.record["sessions"]) / self.seconds if self.seconds else 0.0

    def is_dropped(self) -> Iterator[bool]:
        """Say of one row after the other whether it lies above the threshold."""
        for path in self.parts:
            yield from is_dropped(read_part(path), self.cut, self.decider).tolist()


def summarize(out: str | Path, top: int = 0) -> Summary:
    """Read a run's folder, one part at a time.

    Args:
        out: the folder.
        top: how many of the rows with the highest scores to name.

    Returns:
        What it says.

    Raises:
        InputError: it holds no run, or a file of it is damaged.
    """
    folder = RunFolder(out)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{out} holds no run: it has no manifest.json")
    record = run_record(folder, manifest)
    count = 0
    while part_path(folder, count).exists():
        count += 1
    parts = [part_path(folder, number) for number in range(count)]
    summary = Summary(folder.path, record["state"], record, folder.read_threshold(), parts)
    statuses = Counter[str]()
    for path in parts:
        part = read_part(path)
        dropped = is_dropped(part, summary.cut, summary.decider)
        statuses.update(part.status)
        summary.rows += len(part.row)
        summary.scored += int(part.scored.sum())
        summary.dropped += int(dropped.sum())
        summary.duplicates += int((part.same_as >= 0).sum())
        values = deciding(part.fihs, summary.cut or {}, summary.decider)
        summary.top = _highest([*summary.top, *_top_rows(part, values, dropped, top)], top)
    summary.statuses = dict(statuses.most_common())
    return summary


def _top_rows(part: Part, scores: np.ndarray, dropped: np.ndarray, count: int) -> list[TopRow]:
    values = np.where(part.scored, scores.astype(np.float64), -np.inf)
    order = np.lexsort((np.arange(len(values)), -values))[:count]
    return [
        TopRow(int(part.row[i]), part.id[i], float(values[i]), float(part.loss[i]), bool(dropped[i]))
        for i in order
        if values[i] > -np.inf
    ]


def _highest(rows: list[TopRow], count: int) -> list[TopRow]:
    return sorted(rows, key=lambda row: (-row.score, row.row))[:count]


def excerpts(corpus: CorpusOptions, rows: list[int], chars: int = 64) -> dict[int, str]:
    """Read the beginnings of a few rows' last answers, to show them to a person.

    Args:
        corpus: where they are.
        rows: their positions.
        chars: length of an excerpt.

    Returns:
        Position -> "prompt → answer", on one line; it may hold anything that a corpus holds.
    """
    wanted, out = set(rows), {}
    for index, raw in enumerate(iter_raw(find_files(corpus.path, corpus.format), corpus.max_row_bytes)):
        if index not in wanted:
            continue
        messages = parse_row(raw, index, corpus.columns, corpus.max_row_bytes).messages or []
        asked = [m["content"] for m in messages if m["role"] == "user"][-1:]
        said = [m["content"] for m in messages if m["role"] == "assistant"][-1:]
        out[index] = " → ".join(_cut(" ".join(text.split()), chars // 2) for text in asked + said)
        wanted.discard(index)
        if not wanted:
            break
    return out


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[: chars - 1]}…"
