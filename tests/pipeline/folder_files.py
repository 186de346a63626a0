"""What a run has written, and a way to stop it in the middle."""

from __future__ import annotations

from dataclasses import fields
from itertools import chain
from pathlib import Path

import numpy as np

from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.parts import Part, part_path, read_part
from gradshield_fast.pipeline.progress import Reporter

COLUMNS = ["row", "id", "fihs", "grad_norm", "loss", "tokens", "response_tokens", "status", "reason", "same_as"]


def files(folder: Path) -> dict[str, bytes]:
    """Everything a run leaves that must not depend on where it was stopped, nor on who worked on it."""
    aside = ("manifest.json", "prepared.json", "batches.json", "run.json", "direction.safetensors")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in aside]
    paths = [path for path in paths if path.parent.name != "sessions" and not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class StopAt(Reporter):
    """Interrupts a run once it has scored so many rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows
        self.stages: list[str] = []

    def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        self.stages.append(title)

    def advance(self, count: int, tokens: int = 0) -> None:
        if self.stages[-1] == "scoring":
            self.left -= count
            if self.left <= 0:
                raise KeyboardInterrupt


def read_parts(folder: RunFolder, count: int) -> Part:
    """The scores of all rows, which the package itself never holds at once."""
    parts = [read_part(part_path(folder, number)) for number in range(count)]
    joined = {}
    for field in fields(Part):
        values = [getattr(part, field.name) for part in parts]
        listed = isinstance(values[0], list)
        joined[field.name] = list(chain.from_iterable(values)) if listed else np.concatenate(values)
    return Part(**joined)
