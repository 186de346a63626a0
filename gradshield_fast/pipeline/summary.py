"""What a run's folder says to a person."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradshield_fast.corpus import parse_row
from gradshield_fast.corpus_files import find_files, iter_raw
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.manifest import read_manifest
from gradshield_fast.pipeline.options import CorpusOptions, CutOptions
from gradshield_fast.pipeline.parts import Part, part_path, read_parts
from gradshield_fast.pipeline.record import recorded_corpus, run_record


@dataclass
class Summary:
    """A run, told from the files in its folder.

    Attributes:
        path: the folder.
        state: "new", "scoring", "scored" or "complete".
        record: all that its files say, as in run.json.
        cut: the content of threshold.json, or None.
        scores: the scores of the rows that are scored so far, or None.
    """

    path: Path
    state: str
    record: dict[str, Any]
    cut: dict[str, Any] | None
    scores: Part | None

    @property
    def statuses(self) -> dict[str, int]:
        """How many rows have which status, the most frequent first."""
        return dict(Counter(self.scores.status).most_common()) if self.scores else {}

    @property
    def unscored(self) -> int:
        """How many rows were looked at and have no score."""
        return int((~self.scores.scored).sum()) if self.scores else 0

    @property
    def seconds(self) -> float:
        """Time spent on scoring, over all starts."""
        return sum(session["seconds"] for session in self.record["sessions"])

    @property
    def decider(self) -> int:
        """Which direction's score draws the line."""
        return CutOptions(**self.record["cut"]).direction if "cut" in self.record else 0

    def speed(self, what: str) -> float:
        """Say how fast it was.

        Args:
            what: "rows" or "tokens".

        Returns:
            As many a second, over all starts; 0.0 if nothing was timed.
        """
        return sum(session[what] for session in self.record["sessions"]) / self.seconds if self.seconds else 0.0

    def corpus(self, moved_to: Path | None = None) -> CorpusOptions:
        """Say which rows the run is about.

        Args:
            moved_to: where the corpus is now, if it has moved.

        Returns:
            The options it was read with.
        """
        return recorded_corpus(self.record, moved_to)

    def dropped(self) -> np.ndarray:
        """Say which rows lie above the threshold.

        Returns:
            Bool [rows].
        """
        if self.scores is None or self.cut is None or self.cut["value"] is None:
            return np.zeros(0 if self.scores is None else len(self.scores.row), dtype=bool)
        return self.scores.scored & (self.scores.fihs[:, self.decider].astype(np.float64) > self.cut["value"])

    def top(self, count: int) -> list[int]:
        """Find the rows with the highest scores.

        Args:
            count: how many.

        Returns:
            Their positions in `scores`, the highest first.
        """
        if self.scores is None:
            return []
        values = np.where(self.scores.scored, self.scores.fihs[:, self.decider].astype(np.float64), -np.inf)
        order = np.lexsort((np.arange(len(values)), -values))[:count]
        return [int(i) for i in order if values[i] > -np.inf]


def summarize(out: str | Path) -> Summary:
    """Read a run's folder.

    Args:
        out: the folder.

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
    scores = read_parts(folder, count) if count else None
    return Summary(folder.path, record["state"], record, folder.read_threshold(), scores)


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
