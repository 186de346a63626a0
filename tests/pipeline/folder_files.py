"""What a run has written, and a way to stop it in the middle."""

from __future__ import annotations

from pathlib import Path

from gradshield_fast.pipeline.progress import Reporter

COLUMNS = ["row", "id", "fihs", "grad_norm", "loss", "tokens", "response_tokens", "status", "reason"]


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
