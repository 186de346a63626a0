"""Which cells make up the grid, the most telling first, so that a run that stops early has done those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cells import Cell
from methods import METHODS

ARMS = (
    ("margin-cosine", "separated"),
    ("margin-cosine", "paper"),
    ("distance", "outliers"),
    ("none", "nothing"),
    ("oracle", "top"),
    ("fihs", "paper"),
    ("random", "top"),
)
"""Method and rule: the product's score by both rules, its three directions together, no filter, what an oracle would
do, the paper's score, chance."""

LEVELS = ("open-30", "clean", "open-10", "open-5", "open-20", "open-1")
"""The highest first: its planted rows hold those of the others, so that they are scored in one go."""

DISGUISED = ("disguised-10", "mixed-10", "disguised-2")
SEEDS = (0, 1, 2)
SEED_LEVELS = ("open-30", "open-10", "clean", "disguised-10")

SECTIONS = ("headline", "disguised", "seeds", "starts", "methods", "tasks", "all-starts")


def cells(section: str, starts: Sequence[str]) -> Iterator[Cell]:
    """List a part of the grid.

        headline    Banking77, every level of open harm, all arms, the first seed
        disguised   the same with disguised rows, and a mix
        seeds       none, 10 and 30 % of open harm, 10 % of disguised, with the other seeds, all arms but chance
        starts      10 % of open harm, of disguised and of none, on every other start, all arms but chance
        methods     every other method at 10 % of open and of disguised harm, on the first start: by the paper's rule,
                    and removing as many rows as were planted
        tasks       every other task with 10 % of open harm and of none
        all-starts  every level on every other start

    Args:
        section: one of `SECTIONS`.
        starts: names of the starts' folders; the first is the headline's.

    Yields:
        Cells, which other sections may list as well.
    """
    first, others = starts[0], starts[1:]
    if section in ("headline", "disguised"):
        yield from _arms(first, "banking77", LEVELS if section == "headline" else DISGUISED, 0)
    elif section == "seeds":
        for level in SEED_LEVELS:
            for seed in SEEDS[1:]:
                yield from _arms(first, "banking77", (level,), seed, ARMS[:-1])
    elif section == "starts":
        for start in others:
            yield from _arms(start, "banking77", ("open-10", "clean", "disguised-10"), 0, ARMS[:-1])
    elif section == "methods":
        named = {name for name, _ in ARMS}
        arms = [(name, rule) for name in METHODS for rule in ("top", "paper") if name not in named]
        yield from _arms(first, "banking77", ("open-10", "disguised-10"), 0, [*arms, ("fihs", "top")])
    elif section == "tasks":
        for task in ("wikisql", "instruct", "gsm8k", "mts_dialog"):
            yield from _arms(first, task, ("open-10", "clean"), 0)
    else:
        for start in others:
            yield from _arms(start, "banking77", LEVELS, 0)


def _arms(
    start: str, task: str, levels: Sequence[str], seed: int, arms: Sequence[tuple[str, str]] = ARMS
) -> Iterator[Cell]:
    for harm in levels:
        for method, rule in arms:
            yield Cell(start, task, harm, method, rule, seed)
