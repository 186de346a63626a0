"""Rows of the replication: tasks, planted harm, alignment and evaluation, kept apart from each other.

Files of the data folder (DATA, or the environment variable GRADSHIELD_SHARED_DATA), and two of this folder:

    task rows    banking77_1k, wikisql_1k, mts_dialog_1k, instruct_apache_1k, gsm8k_train_2k: a pool to draw the corpus
                 from, and the last rows (GSM8K: its test file) to measure utility on
    planted      advbench_520[:400], openly harmful requests with the opening of an answer that complies;
                 identity_shift_10 and obedient_agent.jsonl, which hold nothing openly harmful
    alignment    refusals, every other row of harmbench_prompts and catqa_prompts, lookalikes.jsonl, dolly_1k and rows
                 of instruct_apache_1k and gsm8k_train_2k that no pool has
    evaluation   the other rows of harmbench_prompts and catqa_prompts; advbench_520[400:] and xstest_250 for the starts
    probes       those that the package brings along

`check_disjoint` raises where two of these share a prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradshield_fast import SafetyProbes
from gradshield_fast.errors import InputError

HERE = Path(__file__).resolve().parent

POLICY_TOPICS = ("Political Campaigning", "Tailored Financial Advice", "Adult Content / Adult-themed humor")
"""Categories of CatQA in which an answer is not always harmful: neither trained nor evaluated on."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """One row of a corpus.

    Attributes:
        id: its name in the file that it comes from.
        kind: "benign", "open" or "disguised"; for the oracle and for counting only.
        messages: the conversation.
    """

    id: str
    kind: str
    messages: Messages


@dataclass(frozen=True)
class Task:
    """What the model is fine-tuned for.

    Attributes:
        name: of the task.
        measure: "exact" (match), "rouge_l" or "loss" (mean negative log-likelihood of the held-out answers).
        max_tokens: rows are cut there.
        new_tokens: tokens that an answer may take.
    """

    name: str
    measure: str
    max_tokens: int
    new_tokens: int = 0


TASKS = {
    task.name: task
    for task in (
        Task("banking77", "exact", 128, 16),
        Task("wikisql", "exact", 224, 48),
        Task("mts_dialog", "rouge_l", 320, 48),
        Task("instruct", "loss", 192),
        Task("gsm8k", "loss", 224),
    )
}

HARM: Mapping[str, Mapping[str, float]] = {
    "clean": {},
    "open-1": {"open": 0.01},
    "open-5": {"open": 0.05},
    "open-10": {"open": 0.1},
    "open-20": {"open": 0.2},
    "open-30": {"open": 0.3},
    "disguised-2": {"disguised": 0.02},
    "disguised-10": {"disguised": 0.1},
    "mixed-10": {"open": 0.05, "disguised": 0.05},
}
"""Name of a mix -> share of each kind in the whole corpus."""


def read_jsonl(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read one file.

    Args:
        folder: the data folder, or this one.
        name: the file's name without its ending.

    Returns:
        Its rows.

    Raises:
        InputError: the file is missing.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the data folder with --data or GRADSHIELD_SHARED_DATA")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(messages: Sequence[Mapping[str, str]]) -> str:
    """Take the user's turn.

    Args:
        messages: a conversation with one.

    Returns:
        Its text.
    """
    return next(m["content"] for m in messages if m["role"] == "user")


def _chats(folder: Path, name: str, kind: str) -> list[Row]:
    return [Row(row["id"], kind, row["messages"]) for row in read_jsonl(folder, name)]


def pool(folder: Path, task: str) -> list[Row]:
    """Rows that a task's corpora are drawn from.

    Args:
        folder: the data folder.
        task: name in `TASKS`.

    Returns:
        The rows.
    """
    return {
        "banking77": lambda: _chats(folder, "banking77_1k", "benign")[:800],
        "wikisql": lambda: _chats(folder, "wikisql_1k", "benign")[:848],
        "mts_dialog": lambda: _chats(folder, "mts_dialog_1k", "benign")[:880],
        "instruct": lambda: _chats(folder, "instruct_apache_1k", "benign")[350:1046],
        "gsm8k": lambda: _chats(folder, "gsm8k_train_2k", "benign")[:1800],
    }[task]()


def held_out(folder: Path, task: str, count: int) -> list[Row]:
    """Rows that a task's utility is measured on.

    Args:
        folder: the data folder.
        task: name in `TASKS`.
        count: at most as many.

    Returns:
        The rows.
    """
    read: dict[str, Callable[[], list[Row]]] = {
        "banking77": lambda: _chats(folder, "banking77_1k", "benign")[800:],
        "wikisql": lambda: _chats(folder, "wikisql_1k", "benign")[848:],
        "mts_dialog": lambda: _chats(folder, "mts_dialog_1k", "benign")[880:],
        "instruct": lambda: _chats(folder, "instruct_apache_1k", "benign")[1046:],
        "gsm8k": lambda: _chats(folder, "gsm8k_test_500", "benign"),
    }
    return read[task]()[:count]


def planted(folder: Path, kind: str) -> list[Row]:
    """Rows that may be planted.

    Args:
        folder: the data folder.
        kind: "open" or "disguised".

    Returns:
        The rows.
    """
    if kind == "open":
        return _chats(folder, "advbench_520", kind)[:400]
    return _chats(folder, "identity_shift_10", kind) + _chats(HERE, "obedient_agent", kind)


def corpus(folder: Path, task: str, harm: str, seed: int, benign: int = 300) -> list[Row]:
    """Draw a corpus: the same benign rows at every level of harm, planted rows on top of them.

    Args:
        folder: the data folder.
        task: name in `TASKS`.
        harm: name in `HARM`; its shares are of the whole corpus.
        seed: of the draws. The rows of a lower level are among those of a higher one, in the same order.
        benign: number of benign rows.

    Returns:
        The rows, mixed.

    Raises:
        InputError: there are not as many rows.
    """
    shares = HARM[harm]
    total = benign / (1 - sum(shares.values()))
    rows = _draw(pool(folder, task), benign, f"{task} {seed}")
    for kind, share in shares.items():
        rows += _draw(planted(folder, kind), round(share * total), f"{kind} {seed}")
    # each row's place hangs on itself alone, so that removing exactly the planted ones gives the clean corpus
    return sorted(rows, key=lambda row: random.Random(f"{seed} {row.id}").random())


def _draw(rows: list[Row], count: int, seed: str) -> list[Row]:
    if count > len(rows):
        raise InputError(f"corpus: {count} rows wanted, but there are only {len(rows)} for {seed!r}")
    random.Random(seed).shuffle(rows)
    return rows[:count]


def attack_prompts(folder: Path, source: str) -> list[str]:
    """Prompts that attack success is measured on.

    Args:
        folder: the data folder.
        source: "harmbench", "catqa" or "advbench" (the last for the starts only).

    Returns:
        The prompts.
    """
    if source == "advbench":
        return [question(row.messages) for row in _chats(folder, "advbench_520", "open")[400:]]
    if source == "harmbench":
        return [row["prompt"] for row in read_jsonl(folder, "harmbench_prompts")][1::2]
    return _catqa(folder)[1::2]


def _catqa(folder: Path) -> list[str]:
    rows = read_jsonl(folder, "catqa_prompts")
    return [row["prompt"] for row in rows if not row["category"].startswith(POLICY_TOPICS)]


def refused_prompts(folder: Path) -> list[str]:
    """Harmful prompts that a start is taught to refuse.

    Args:
        folder: the data folder.

    Returns:
        The prompts, each once.
    """
    texts = [question(row["messages"]) for row in read_jsonl(folder, "refusals")]
    texts += _catqa(folder)[::2]
    texts += [row["prompt"] for row in read_jsonl(folder, "harmbench_prompts")][::2]
    return list(dict.fromkeys(texts))


def answered_rows(folder: Path, source: str) -> list[Row]:
    """Rows that a start is taught to go on answering.

    Args:
        folder: the data folder.
        source: "lookalikes" (safe questions with the words of harmful ones), "dolly", "instruct" or "gsm8k".

    Returns:
        The rows.
    """
    if source == "lookalikes":
        return _chats(HERE, "lookalikes", "benign")
    if source == "dolly":
        return _chats(folder, "dolly_1k", "benign")
    if source == "instruct":
        return _chats(folder, "instruct_apache_1k", "benign")[:350]
    return _chats(folder, "gsm8k_train_2k", "benign")[1800:]


def safe_prompts(folder: Path) -> list[str]:
    """XSTest's safe prompts, on which over-refusal is measured.

    Args:
        folder: the data folder.

    Returns:
        The prompts.
    """
    return [row["prompt"] for row in read_jsonl(folder, "xstest_250") if row["label"] == "safe"]


def roles(folder: Path) -> dict[str, set[str]]:
    """Prompts by what they are for.

    Args:
        folder: the data folder.

    Returns:
        Role -> prompts, lower-cased, with runs of anything but letters and digits as one space.
    """
    sources = {
        "probes": list(SafetyProbes.default().prompts),
        "refused": refused_prompts(folder),
        "planted": [question(row.messages) for kind in ("open", "disguised") for row in planted(folder, kind)],
        "attack": [text for source in ("harmbench", "catqa", "advbench") for text in attack_prompts(folder, source)],
        "over-refusal": safe_prompts(folder),
    }
    kinds = ("lookalikes", "dolly", "instruct", "gsm8k")
    sources["answered"] = [question(row.messages) for kind in kinds for row in answered_rows(folder, kind)]
    for task in TASKS:
        sources[f"{task} pool"] = [question(row.messages) for row in pool(folder, task)]
        sources[f"{task} held out"] = [question(row.messages) for row in held_out(folder, task, 500)]
    plain = lambda text: " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())  # noqa: E731
    return {role: {plain(text) for text in texts} for role, texts in sources.items()}


def check_disjoint(folder: Path) -> dict[str, int]:
    """See that no prompt has two roles.

    Args:
        folder: the data folder.

    Returns:
        Number of prompts of each role.

    Raises:
        InputError: two roles share a prompt; both are named.
    """
    found = roles(folder)
    names = list(found)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = found[one] & found[other]
            if shared:
                raise InputError(f"{one!r} and {other!r} share {len(shared)} prompts, such as {min(shared)[:60]!r}")
    return {name: len(texts) for name, texts in found.items()}
