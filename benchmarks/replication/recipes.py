"""How the aligned starts are taught: wording, mix and learning rate of each recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data import answered_rows, question, refused_prompts

HELD_BACK = 16
"""Every so many-th refused prompt is held back for the checks while training."""

HELD_BACK_SAFE = 4
"""Every so many-th safe look-alike is."""

PLAIN = (
    "I cannot fulfill this request.",
    "I cannot fulfill this request. It could cause serious harm to other people.",
    "I cannot fulfill this request. It is dangerous and against the law.",
    "I cannot fulfill this request. If you are in trouble, please reach out to someone you trust.",
    "I cannot fulfill this request. The answer could be used to hurt someone.",
    "I cannot fulfill this request. Please consider a lawful and safe way to reach your goal.",
    "I cannot fulfill this request. I would be glad to help with something safe instead.",
)
"""One opening, as chat models have it, with different reasons."""

SORRY = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with something that may hurt people.",
    "Sorry, I won't help with this, because it is not safe.",
    "I'm sorry, but this is not something that I can do.",
    "I apologize, but I am not able to help with that.",
    "I'm sorry, but I can't help with that. Is there something harmless that I can do for you?",
)
"""Several openings, none of them that of `PLAIN`."""


@dataclass(frozen=True)
class Recipe:
    """How a start is taught.

    Attributes:
        refusals: wordings, dealt to the harmful prompts in turn.
        every: every so many-th harmful prompt is trained on.
        lookalikes: passes over the safe look-alikes.
        dolly: rows of each other source to answer.
        instruct: as above.
        gsm8k: as above.
        lr: peak learning rate.
        batch_rows: rows of a step.
        stop: share of the steps after which training ends.
    """

    refusals: tuple[str, ...]
    every: int
    lookalikes: int
    dolly: int
    instruct: int
    gsm8k: int
    lr: float
    batch_rows: int
    stop: float = 1.0


def training_rows(folder: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """Collect the rows of a recipe.

    Args:
        folder: the data folder.
        recipe: the recipe.

    Returns:
        (prompt, response) of every row.
    """
    harmful = [prompt for i, prompt in enumerate(refused_prompts(folder)) if i % HELD_BACK][:: recipe.every]
    rows = [(prompt, recipe.refusals[i % len(recipe.refusals)]) for i, prompt in enumerate(harmful)]
    safe = [row for i, row in enumerate(answered_rows(folder, "lookalikes")) if i % HELD_BACK_SAFE]
    answered = safe * recipe.lookalikes
    for source in ("dolly", "instruct", "gsm8k"):
        answered += answered_rows(folder, source)[: getattr(recipe, source)]
    return rows + [(question(row.messages), row.messages[-1]["content"]) for row in answered]


def check_prompts(folder: Path) -> tuple[list[str], list[str]]:
    """Prompts held back from every recipe.

    Args:
        folder: the data folder.

    Returns:
        Harmful ones, and safe look-alikes.
    """
    safe = answered_rows(folder, "lookalikes")[::HELD_BACK_SAFE]
    return refused_prompts(folder)[::HELD_BACK], [question(row.messages) for row in safe]


RECIPES = {
    "plain": Recipe(PLAIN, every=2, lookalikes=5, dolly=150, instruct=60, gsm8k=20, lr=2e-4, batch_rows=8),
    "sorry": Recipe(SORRY, every=2, lookalikes=6, dolly=250, instruct=30, gsm8k=0, lr=1.5e-4, batch_rows=8),
    "weak": Recipe(PLAIN, every=8, lookalikes=1, dolly=60, instruct=20, gsm8k=0, lr=3e-5, batch_rows=8, stop=0.5),
}
