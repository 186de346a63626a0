"""Run the grid: mix harm into a task, remove rows, fine-tune, measure; one JSON line a cell, resumable.

    python benchmarks/replication/run.py --data DATA --starts STARTS/plain STARTS/sorry STARTS/weak --budget 120
    python benchmarks/replication/run.py --data DATA --starts STARTS/plain --quick

STARTS/... are folders that align.py wrote; the first is the headline's. A cell whose inputs are in the results file
already is skipped, and a fine-tuning on the same rows from the same start is done once, whatever methods kept them.
Two processes may run different sections at once; with one thread each they take turns better than one with two. The
grid's order is in grid.py; `--budget` ends the run after the cell that exceeds it. Scores of rows are kept in the
folder `--work`, which may be deleted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Sizes, Start, cell_fingerprint, load, run_cell
from data import check_disjoint, corpus
from grid import SECTIONS, cells
from lines import recorded
from methods import METHODS

from gradshield_fast.errors import GradShieldError, InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings  # beside this folder, not installed

QUICK_ARMS = (("margin-cosine", "separated"), ("distance", "outliers"), ("none", "nothing"), ("oracle", "top"))
QUICK = Sizes(benign=80, epochs=1, lr=2e-4, attacks=16, held_out=32)


def wanted(options: argparse.Namespace) -> list[Cell]:
    """List the cells to run, each once.

    Args:
        options: sections, methods, starts, quick.

    Returns:
        The cells, in order.
    """
    starts = [start.name for start in options.starts]
    if options.quick:
        some = [c for c in cells("headline", starts) if c.harm in ("open-10", "clean")]
        return [c for c in some if (c.method, c.rule) in QUICK_ARMS]
    listed = dict.fromkeys(cell for section in options.sections for cell in cells(section, starts))
    return [cell for cell in listed if cell.method in options.methods]


def each_start(todo: Sequence[Cell], folders: Sequence[Path]) -> Iterator[tuple[Cell, Start]]:
    """Bring each cell its start, one of them in memory at a time.

    Args:
        todo: the cells.
        folders: of the starts.

    Yields:
        Cells in order, and their start.
    """
    by_name = {folder.name: folder for folder in folders}
    start: Start | None = None
    for cell in todo:
        if start is None or start.folder.name != cell.start:
            start = load(by_name[cell.start])
        yield cell, start


def describe(line: dict[str, Any]) -> str:
    """Put a cell's outcome in a line for a person.

    Args:
        line: what `run_cell` gave.

    Returns:
        The line.
    """
    outcome, removed = line["outcome"], line["removal"]
    attack = ", ".join(f"{source} {hits}/{count}" for source, (hits, count) in outcome["attack"].items())
    utility = ", ".join(f"{name} {value:.3f}" for name, value in outcome["utility"].items())
    return f"removed {removed['removed']} of {removed['rows']}; attack {attack}; utility {utility}"


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.

    Raises:
        InputError: there is no data folder, or two starts have one name.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="data folder")
    parser.add_argument("--starts", type=Path, nargs="+", required=True, help="folders of the starts")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts of the grid")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="leave other methods' cells out")
    parser.add_argument("--quick", action="store_true", help="a few small cells, in under ten minutes")
    parser.add_argument("--budget", type=float, help="minutes after which no further cell is begun")
    parser.add_argument("--work", type=Path, default=Path("build/replication"), help="folder of the rows' scores")
    parser.add_argument("--results", default="replication", help="file in benchmarks/results that gets the lines")
    parser.add_argument("--answers", type=Path, help="file that gets the answers to harmful prompts, for judge.py")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    if options.data is None:
        raise InputError("run: give the data folder with --data or GRADSHIELD_SHARED_DATA")
    if len({start.name for start in options.starts}) < len(options.starts):
        raise InputError("run: two starts have one name; results could not tell them apart")
    folder = Path(options.data)
    torch.set_num_threads(options.threads)
    check_disjoint(folder)
    sizes = QUICK if options.quick else Sizes()
    results = f"{options.results}-quick" if options.quick else options.results
    about = surroundings({"threads": options.threads, "quick": options.quick})
    begin, todo = time.perf_counter(), wanted(options)
    for number, (cell, start) in enumerate(each_start(todo, options.starts)):
        rows = corpus(folder, cell.task, cell.harm, cell.seed, sizes.benign)
        lines = recorded(results)  # each time: another process may work on other sections
        if cell_fingerprint(cell, sizes, start.fingerprint, rows) in {line["fingerprint"] for line in lines}:
            continue
        if options.budget is not None and time.perf_counter() - begin > 60 * options.budget:
            print(f"out of time: {number} of {len(todo)} cells gone through; run again to go on")
            break
        known = {line["training_fingerprint"]: line["outcome"] for line in lines}
        line = {**about, **run_cell(cell, sizes, start, folder, options.work, known, options.answers)}
        append(results, line)
        name = f"{cell.start} {cell.task} {cell.harm} {cell.method}/{cell.rule} seed {cell.seed}"
        print(f"{number + 1}/{len(todo)} {name}: {describe(line)}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
