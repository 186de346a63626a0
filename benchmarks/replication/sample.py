"""Score a sample of real rows once, by every method; thresholds.py, detection.py and figures.py work on the numbers.

    python benchmarks/replication/sample.py --start STARTS/plain --data DATA

Rows of every task's pool and all that may be planted are scored in one pass. The numbers, no texts, go to
benchmarks/results/row_scores/START.json; what was scored before is taken from the folder `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from columns import BUILD, columns
from context import Context
from data import TASKS, Row, planted, pool
from plain_methods import hidden, keywords
from row_cache import RowCache

from gradshield_fast import SafetyProbes
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.errors import GradShieldError, InputError
from gradshield_fast.files import write_whole
from gradshield_fast.fingerprint import model_fingerprint
from gradshield_fast.loading import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import RESULTS, surroundings  # beside this folder, not installed

FOLDER = RESULTS / "row_scores"


def sample(folder: Path, benign: int, open_rows: int) -> list[tuple[str, Row]]:
    """Choose rows, spread over their files.

    Args:
        folder: the data folder.
        benign: rows of each task.
        open_rows: openly harmful rows.

    Returns:
        (where a row is from, the row): a task's name, "open" or "disguised".
    """
    groups = {name: (pool(folder, name), benign) for name in TASKS}
    groups |= {"open": (planted(folder, "open"), open_rows), "disguised": (planted(folder, "disguised"), 1000)}
    chosen = []
    for name, (rows, wanted) in groups.items():
        count = min(wanted, len(rows))
        chosen += [(name, rows[i * len(rows) // count]) for i in range(count)]
    return chosen


def read_scores(start: str) -> dict[str, Any]:
    """Read what this script wrote.

    Args:
        start: name of the start.

    Returns:
        "source", where each row is from; "columns", name -> numbers; and how they came about.

    Raises:
        InputError: there is no such file.
    """
    path = FOLDER / f"{start}.json"
    if not path.is_file():
        raise InputError(f"{path.name}: no scores of that start; run sample.py first")
    found = json.loads(path.read_text(encoding="utf-8"))
    found["columns"] = {name: np.array(values) for name, values in found["columns"].items()}
    found["source"] = np.array(found["source"])
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.

    Raises:
        InputError: there is no data folder.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder that align.py wrote")
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="data folder")
    parser.add_argument("--benign", type=int, default=200, help="rows of each task")
    parser.add_argument("--open", type=int, default=400, help="openly harmful rows")
    parser.add_argument("--tables", nargs="+", choices=sorted(BUILD), default=list(BUILD))
    parser.add_argument("--max-length", type=int, default=256, help="rows are cut there")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/replication"), help="folder of the rows' scores")
    options = parser.parse_args(argv)
    if options.data is None:
        raise InputError("sample: give the data folder with --data or GRADSHIELD_SHARED_DATA")
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(str(options.start), dtype=options.dtype, device="cpu")
    encoder = ChatEncoder(tokenizer, max_length=options.max_length)
    drawn = sample(Path(options.data), options.benign, options.open)
    chosen = [(name, row) for name, row in drawn if encoder.encode(row.messages).usable]
    name = f"{model_fingerprint(model)[:16]}-sample-{options.max_length}-{options.dtype}"
    cache = RowCache(options.work / "rows" / name)
    rows = [row for _, row in chosen]
    context = Context(model, tokenizer, encoder, rows, SafetyProbes.default(), 0, cache)
    begin = time.perf_counter()
    found = dict(columns(context, options.tables))
    print(f"directions and scores in {time.perf_counter() - begin:.0f} s", flush=True)
    found |= {"hidden": hidden(context), "keywords": keywords(context)}
    record = {
        **surroundings(vars(options)),
        "rows": len(chosen),
        "tokens": sum(len(e.input_ids) for e in context.encoded),
        "seconds": round(time.perf_counter() - begin, 1),
        "id": [row.id for row in rows],
        "source": [name for name, _ in chosen],
        "columns": {column: [float(f"{x:.6g}") for x in values] for column, values in found.items()},
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_whole(FOLDER / f"{options.start.name}.json", (json.dumps(record) + "\n").encode())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
