"""Reading the results files back, for figures and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gradshield_fast.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import RESULTS  # beside this folder, not installed


def recorded(name: str) -> list[dict[str, Any]]:
    """Read what was recorded so far.

    Args:
        name: of the results file, without its ending.

    Returns:
        Its lines, none if there is no file; a last one that was cut off by a crash is left out.
    """
    path = RESULTS / f"{name}.jsonl"
    found = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


def lines(name: str) -> list[dict[str, Any]]:
    """Read a results file that must be there.

    Args:
        name: without its ending.

    Returns:
        Its lines.

    Raises:
        InputError: there is nothing in it, or no file.
    """
    if not (found := recorded(name)):
        raise InputError(f"{name}.jsonl: not there yet")
    return found


def last(name: str, **wanted: Any) -> dict[str, Any]:
    """Find the newest line of a results file.

    Args:
        name: without its ending.
        wanted: what it must have, at the top or among its options.

    Returns:
        The line.

    Raises:
        InputError: there is none.
    """
    for line in reversed(lines(name)):
        both = {**line["options"], **line}
        if all(both.get(key) == value for key, value in wanted.items()):
            return line
    raise InputError(f"{name}: no line with {wanted}")
