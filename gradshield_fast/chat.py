"""Conversations -> token ids and labels: a loss on what the assistant says, and on nothing else.

The whole conversation is rendered and tokenised once, so no merge at a seam differs from what training sees, and
each token is given to the assistant if any of its characters is the assistant's. Labels are not shifted: labels[t] is
the id of token t where the model should have predicted it, from the tokens before it, and -100 elsewhere.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gradshield_fast.chat_spans import (
    Message,
    Span,
    SpansNotFound,
    answer_spans,
    end_of_turn_pattern,
    has_tags,
    rare_characters,
    strip_marks,
    tagged_template,
    with_end_of_turn,
)
from gradshield_fast.chat_template import PINNED_DATE, choose_template, pin_date, turn_ends
from gradshield_fast.errors import InputError
from gradshield_fast.time_limit import TimeIsUp, time_limit

IGNORE = -100
ROW_SECONDS = 10.0
"""How long the template may take over a row: it is a program, and may loop."""

# A row is cut to `max_length` tokens, so a huge one is tokenised only as far as that takes. The margin keeps the end of
# what was tokenised, where a word may be cut in two, away from the tokens that count.
_CHARS_PER_TOKEN = 16
_MARGIN_TOKENS = 256


@dataclass(slots=True)
class Encoded:
    """One row as the model sees it.

    Attributes:
        input_ids: token ids.
        labels: as many; the token's own id where it is the assistant's, else -100. Never set at position 0.
        response_tokens: how many labels are set.
        status: "ok", "truncated" (cut, but with something to learn from), or a reason why the row cannot be scored:
            "empty", "no_response", "no_response_after_truncation", "template_error".
        reason: "" or one sentence for a person.
        notes: what was done to the row, such as "system_merged".
    """

    input_ids: list[int]
    labels: list[int]
    response_tokens: int
    status: str
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether the row can be scored."""
        return self.status in ("ok", "truncated")


class ChatEncoder:
    """Encodes conversations with a tokenizer and its chat template.

    Attributes:
        template: the Jinja source in use.
        template_kind: "option" if it was given, "tokenizer" if the tokenizer has one, else "fallback".
        max_length: rows are cut on the right to as many tokens; None for no bound.
    """

    template: str
    template_kind: str
    max_length: int | None

    def __init__(self, tokenizer: Any, *, max_length: int | None = None, template: str | None = None) -> None:
        """Choose the template and check that it compiles.

        Args:
            tokenizer: a Hugging Face tokenizer, fast or not.
            max_length: bound on the tokens of a row.
            template: Jinja source to use instead of the tokenizer's, or the name of one of the tokenizer's.

        Raises:
            InputError: the bound is below 2, the template has a syntax error, or jinja2 is missing.
        """
        if max_length is not None and max_length < 2:
            raise InputError(f"max_length must be at least 2, a token to see and one to predict: got {max_length}")
        self._tokenizer = tokenizer
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        self.max_length = max_length
        self.template, self.template_kind = choose_template(tokenizer, template)
        self._tags = has_tags(self.template)
        self._source, self._dated = pin_date(self.template)
        self._turn_end = end_of_turn_pattern(turn_ends(tokenizer), str(getattr(tokenizer, "eos_token", None) or ""))
        self._prompts = self._obeys_generation_prompt()

    def describe(self) -> dict[str, Any]:
        """Describe what decides the tokens and labels of a row, for the record of a run.

        Returns:
            A dict that JSON can hold.
        """
        return {
            "template_kind": self.template_kind,
            "template_sha256": hashlib.sha256(self.template.encode("utf-8", "surrogatepass")).hexdigest(),
            "generation_tags": self._tags,
            "pinned_date": PINNED_DATE.isoformat() if self._dated else None,
            "max_length": self.max_length,
            "tokenizer": type(self._tokenizer).__name__,
            "vocabulary": len(self._tokenizer),
        }

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Encode a conversation; whatever is wrong with it ends up in the status.

        Args:
            messages: turns as {"role": "system" | "user" | "assistant" | "tool", "content": text}.

        Returns:
            Its tokens and labels; without tokens if the status says that it could not be rendered.
        """
        if not messages:
            return _failed("empty", "the row has no turns")
        if not any(message.get("role") == "assistant" for message in messages):
            return _failed("no_response", "the row has no assistant turn, so there is nothing to learn from it")
        try:
            with time_limit(ROW_SECONDS):
                text, messages, notes = self._rendered(messages)
                spans, more_notes = self._spans(messages, text)
        except TimeIsUp:
            return _failed("template_error", f"the chat template took longer than {ROW_SECONDS:g} s")
        except Exception as error:
            return _failed("template_error", f"the chat template failed: {_one_line(error)}")
        try:
            ids, ranges, complete = self._tokenised(text, spans)
        except Exception as error:
            return _failed("template_error", f"the tokenizer failed: {_one_line(error)}")
        return self._labelled(ids, ranges, complete, notes + more_notes)

    def encode_prompt_response(self, prompt: str, response: str, system: str | None = None) -> Encoded:
        """Encode one question and its answer.

        Args:
            prompt: what the user says.
            response: what the assistant answers.
            system: an optional system turn.

        Returns:
            As `encode`.
        """
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self.encode([{"role": "system", "content": system}, *messages] if system else messages)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, source: str | None = None
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages),
            chat_template=source or self._source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        if not isinstance(text, str):
            raise TypeError(f"apply_chat_template gave {type(text).__name__} instead of text")
        return text

    def _obeys_generation_prompt(self) -> bool:
        question = [{"role": "user", "content": "x"}]
        try:
            with time_limit(ROW_SECONDS):
                return self._render(question, add_generation_prompt=True) != self._render(question)
        except TimeIsUp:
            raise InputError(
                f"the chat template ({self.template_kind}) took longer than {ROW_SECONDS:g} s over a turn of one letter"
            ) from None
        except ImportError as error:
            raise InputError(
                f"chat templates need jinja2: {_one_line(error)}; install it with: pip install jinja2"
            ) from error
        except Exception as error:
            if type(error).__name__ == "TemplateSyntaxError":
                raise InputError(f"the chat template ({self.template_kind}) is broken: {_one_line(error)}") from error
            return False

    def _rendered(self, messages: Sequence[Message]) -> tuple[str, Sequence[Message], tuple[str, ...]]:
        """Render a conversation, with its system turn in the first user turn if the template refuses such turns."""
        try:
            text, notes = self._render(messages), ()
        except Exception as refusal:
            merged = _merge_system(messages)
            if merged is None:
                raise
            try:
                text, messages, notes = self._render(merged), merged, ("system_merged",)
            except Exception:
                raise refusal from None
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        if system.strip() not in text:
            notes += ("system_ignored",)
        return text, messages, notes

    def _spans(self, messages: Sequence[Message], text: str) -> tuple[list[Span], tuple[str, ...]]:
        notes = ()
        if self._tags:
            spans = self._tagged_spans(messages, text)
            if spans:
                return spans, notes
            notes = ("generation_tags_empty",)
        spans = answer_spans(self._render, messages, text, self._prompts)
        return with_end_of_turn(text, spans, self._turn_end, messages[-1]["role"] == "assistant"), notes

    def _tagged_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        opening, closing = rare_characters(text, 2)
        try:
            marked = self._render(messages, source=tagged_template(self._source, opening, closing))
        except Exception:
            return []
        plain, spans = strip_marks(marked, opening, closing)
        return spans if plain == text else []

    def _tokenised(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span], bool]:
        """Tokenise once, without a second <bos>, and turn spans of characters into ranges of tokens.

        Also says whether that was all of the text, or only a beginning of more than `max_length` tokens.
        """
        if not self._fast:
            return *self._tokenised_slowly(text, spans), True
        enough = len(text) if self.max_length is None else self.max_length + _MARGIN_TOKENS
        size = enough * _CHARS_PER_TOKEN
        while True:
            out = self._tokenizer(
                text[:size],
                add_special_tokens=False,
                truncation=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids = list(out["input_ids"])
            if size >= len(text) or len(ids) >= enough:
                return ids, _token_ranges(out["offset_mapping"], spans), size >= len(text)
            size *= 8

    def _tokenised_slowly(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Count the tokens before each end of a span, for a tokenizer that does not say where its tokens lie."""
        ids, ranges = self._ids(text), []
        for start, end in spans:
            before, through = self._ids(text[:start]), self._ids(text[:end])
            first = next((t for t, (x, y) in enumerate(zip(before, ids, strict=False)) if x != y), len(before))
            if through != ids[: len(through)] or len(before) - first > 2:
                raise SpansNotFound("it reads an answer differently with what comes after it; use its fast version")
            ranges.append((first, len(through)))
        return ids, ranges

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    def _labelled(self, ids: list[int], ranges: Sequence[Span], complete: bool, notes: tuple[str, ...]) -> Encoded:
        if not ids:
            return _failed("empty", "the chat template and the tokenizer make no token of this row")
        kept = len(ids) if self.max_length is None else min(len(ids), self.max_length)
        labels = [IGNORE] * kept
        total = 0
        for start, end in ranges:
            # Nothing comes before the first token, so nothing predicts it.
            start = max(start, 1)
            total += max(0, end - start)
            stop = min(end, kept)
            if start < stop:
                labels[start:stop] = ids[start:stop]
        learnt = kept - labels.count(IGNORE)
        cut = f"the first {kept} of {len(ids)}{'' if complete else ' or more'} tokens"
        if total == 0 and complete:
            status, reason = "no_response", "the chat template and the tokenizer leave no token of the assistant's"
        elif learnt == 0:
            status, reason = "no_response_after_truncation", f"all of the answer lies beyond {cut}; raise max_length"
        elif kept < len(ids):
            status, reason = "truncated", f"cut to {cut}"
        else:
            status, reason = "ok", ""
        return Encoded(ids[:kept], labels, learnt, status, reason, notes)


def _merge_system(messages: Sequence[Message]) -> list[Message] | None:
    """Put the system turns in front of the first user turn; None if there is no such pair."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    rest = [dict(m) for m in messages if m["role"] != "system"]
    user = next((m for m in rest if m["role"] == "user"), None)
    if not system or user is None:
        return None
    user["content"] = "\n\n".join([*(text for text in system if text.strip()), user["content"]])
    return rest


def _token_ranges(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Ranges of the tokens that have a character in a span.

    White space that a tokenizer leaves out of its offsets belongs to the token behind it, and the tokens that make up
    one character share it.
    """
    ends = list(accumulate((end for _, end in offsets), max))
    ranges = []
    for start, end in spans:
        first = bisect_right(ends, start)
        last = bisect_left(ends, end, lo=first)
        while last < len(ends) and (
            last == first or ends[last - 1] < end or offsets[last][0] < end <= offsets[last][1]
        ):
            last += 1
        ranges.append((first, last if start < end else first))
    return ranges


def _failed(status: str, reason: str) -> Encoded:
    return Encoded([], [], 0, status, reason)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
