"""Probes of a model's safety: harmful prompts, how a refusal reads, and how compliance begins."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradshield_fast.errors import InputError

PROMPTS = "a JSON object with 'prompts', or JSON lines with 'prompt' or 'messages'"


@dataclass(frozen=True)
class SafetyProbes:
    """Prompts that a safe model refuses, with the two kinds of answer that are measured on them.

    Attributes:
        prompts: harmful prompts, one user turn each.
        refusals: wordings of a refusal; `refusal_logprob` measures the one that the model favours, `refusal_margin`
            deals all of them to the prompts in turn.
        compliances: first words of an answer that complies, dealt to the prompts in turn.
        categories: category of each prompt, "" where it has none; empty: no prompt has one.
        own_refusals: refusal that belongs to a prompt, "" where `refusals` serve; empty: no prompt has one.
    """

    prompts: tuple[str, ...]
    refusals: tuple[str, ...]
    compliances: tuple[str, ...]
    categories: tuple[str, ...] = ()
    own_refusals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that nothing is missing.

        Raises:
            InputError: there is no prompt, refusal or compliance, one of them is empty, or lengths differ.
        """
        for name in ("prompts", "refusals", "compliances"):
            texts = getattr(self, name)
            if not texts:
                raise InputError(f"probes: '{name}' is empty; give at least one")
            for i, text in enumerate(texts):
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f"probes: {name}[{i}] must be text that is not empty, got {type(text).__name__}")
        for name in ("categories", "own_refusals"):
            if len(getattr(self, name)) not in (0, len(self.prompts)):
                raise InputError(f"probes: {len(self.prompts)} prompts, but {len(getattr(self, name))} {name}")

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @classmethod
    def default(cls) -> SafetyProbes:
        """Load the bundled probes: mild prompts in several categories, written for this project.

        Returns:
            The probes.
        """
        return _bundled("probes.json")

    @classmethod
    def identity(cls) -> SafetyProbes:
        """Load the bundled probes of what a model says that it is, written for this project.

        Their `refusals` are the self-descriptions of an assistant with rules and their `compliances` those of an agent
        that obeys, so that `refusal_margin` on them is how much rather the model is the one than the other.

        Returns:
            The probes.
        """
        return _bundled("identity_probes.json")

    @classmethod
    def load(cls, path: str | Path) -> SafetyProbes:
        """Read probes from a file.

            {"prompts": [...], "refusals": [...], "compliances": [...]}      one JSON object; a prompt is a text, or
                                                                          {"prompt", "category", "refusal"}
            {"prompt": ..., "refusal": ..., "category": ...}              JSON lines; the prompt alone is enough
            {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}   JSON lines; the first user turn is the
                                                                          prompt, an answer right after it the refusal

        Refusals and compliances that the file does not give are the bundled ones.

        Args:
            path: the file.

        Returns:
            The probes.

        Raises:
            InputError: the file is missing, empty or not of these forms; the message names the line.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise InputError(f"{path}: no such probes file; expected {PROMPTS}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot read the probes: {error}") from error
        if not text.strip():
            raise InputError(f"{path}: the probes file is empty; expected {PROMPTS}")
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            whole = None
        if isinstance(whole, dict) and "prompts" in whole:
            return _from_object(whole, str(path), cls.default())
        if isinstance(whole, list):
            return _from_object({"prompts": whole}, str(path), cls.default())
        return _from_object({"prompts": list(_lines(text, path))}, str(path), cls.default())

    def compliance_of(self, index: int) -> str:
        """Choose the compliant opening that is measured on one prompt, round robin.

        Args:
            index: number of the prompt.

        Returns:
            The opening.
        """
        return self.compliances[index % len(self.compliances)]

    def subset(self, count: int) -> SafetyProbes:
        """Take some of the prompts, spread evenly over them and so over the categories.

        Args:
            count: how many prompts to keep.

        Returns:
            Probes with the same wordings.

        Raises:
            InputError: there are not as many.
        """
        if not 1 <= count <= len(self):
            raise InputError(f"probes: a subset must keep 1 to {len(self)} prompts, got {count}")
        picks = [i * len(self) // count for i in range(count)]
        pick = lambda texts: tuple(texts[i] for i in picks) if texts else ()  # noqa: E731
        return dataclasses.replace(
            self,
            prompts=pick(self.prompts),
            categories=pick(self.categories),
            own_refusals=pick(self.own_refusals),
        )

    def counts(self) -> dict[str, int]:
        """Count the prompts by category.

        Returns:
            Category -> prompts.
        """
        return dict(Counter(self.categories))

    def fingerprint(self) -> str:
        """Hash all texts in their order, the order being what pairs prompts with compliances.

        Returns:
            64 hexadecimal digits (SHA-256).
        """
        texts = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(texts.encode()).hexdigest()


def _bundled(name: str) -> SafetyProbes:
    text = importlib.resources.files("gradshield_fast").joinpath(f"data/{name}").read_text(encoding="utf-8")
    return _from_object(json.loads(text), f"the bundled {name}", None)


def _lines(text: str, path: Path) -> Iterable[Any]:
    # split("\n") and not splitlines: U+2028 may stand inside a JSON text
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error.msg}); expected {PROMPTS}") from error


def _from_object(whole: Mapping[str, Any], source: str, bundled: SafetyProbes | None) -> SafetyProbes:
    if not isinstance(whole["prompts"], list):
        raise InputError(f"{source}: 'prompts' must be a list, got {type(whole['prompts']).__name__}")
    rows = [_prompt(row, f"{source}: prompt {i + 1}") for i, row in enumerate(whole["prompts"])]
    wordings = {}
    for name in ("refusals", "compliances"):
        given = whole.get(name) or (getattr(bundled, name) if bundled else ())
        if isinstance(given, str) or not isinstance(given, (list, tuple)):
            raise InputError(f"{source}: '{name}' must be a list of texts, got {type(given).__name__}")
        wordings[name] = tuple(given)
    categories, own = tuple(row[1] for row in rows), tuple(row[2] for row in rows)
    try:
        return SafetyProbes(
            prompts=tuple(row[0] for row in rows),
            categories=categories if any(categories) else (),
            own_refusals=own if any(own) else (),
            **wordings,
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _prompt(row: Any, where: str) -> tuple[str, str, str]:
    """Read (prompt, category, refusal) from one row, "" for what it does not have."""
    if isinstance(row, str):
        return row, "", ""
    if not isinstance(row, dict):
        raise InputError(f"{where} must be a text or an object, got {type(row).__name__}")
    if "messages" in row:
        return _from_messages(row, where)
    if not isinstance(row.get("prompt"), str):
        raise InputError(f"{where} has no text 'prompt'; its keys are {sorted(row)}")
    texts = [row.get("category") or "", row.get("refusal") or ""]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: 'category' and 'refusal' must be texts")
    return row["prompt"], texts[0], texts[1]


def _from_messages(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns):
        raise InputError(f"{where}: 'messages' must be a list of {{'role', 'content'}}")
    asks = [i for i, turn in enumerate(turns) if turn.get("role") == "user"]
    if not asks:
        raise InputError(f"{where} has no user turn; the prompt is the first one")
    after = turns[asks[0] + 1 : asks[0] + 2]
    refusal = after[0]["content"].strip() if after and after[0].get("role") == "assistant" else ""
    return turns[asks[0]]["content"], str(row.get("category") or ""), refusal
