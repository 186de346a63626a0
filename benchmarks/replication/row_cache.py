"""What was worked out about a row, kept on disk: a score of a row depends on the model and the row alone."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradshield_fast.files import write_whole

Compute = Callable[[list[int]], np.ndarray]
"""Positions of rows -> float64 [rows, columns]."""


def row_key(messages: Sequence[Any]) -> str:
    """Name a row by what it says.

    Args:
        messages: its chat messages.

    Returns:
        A hexadecimal digest.
    """
    return hashlib.sha256(json.dumps(list(messages), ensure_ascii=False).encode()).hexdigest()[:24]


class RowCache:
    """One table for each name, rows found by their content; corpora share rows, so most are there already.

    Attributes:
        folder: where the tables are.
        cpu_seconds: what the rows that were asked for cost when they were worked out, wherever they came from.
    """

    def __init__(self, folder: Path) -> None:
        """Open the cache.

        Args:
            folder: one for each model and precision; made when something is stored.
        """
        self.folder = folder
        self.cpu_seconds = 0.0

    def rows(self, name: str, keys: Sequence[str], compute: Compute) -> np.ndarray:
        """Look rows up, and work out those that are missing in one call.

        Args:
            name: of the table; a file's name.
            keys: `row_key` of each row.
            compute: given the positions of missing rows (a content that comes twice only once), works them out.

        Returns:
            float64 [rows, columns].
        """
        path = self.folder / f"{name}.json"
        table: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
        missing = [i for i, key in enumerate(keys) if key not in table and keys.index(key) == i]
        if missing:
            start = time.process_time()
            values = np.asarray(compute(missing), dtype=np.float64).reshape(len(missing), -1)
            share = (time.process_time() - start) / len(missing)
            table |= {keys[i]: [share, *row] for i, row in zip(missing, values.tolist(), strict=True)}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(table).encode())
        found = np.array([table[key] for key in keys], dtype=np.float64)
        self.cpu_seconds += float(found[:, 0].sum())
        return found[:, 1:]
