"""From the object in a row to the turns of a conversation, whatever the row calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradshield_fast.errors import InputError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
}
COLUMNS = ("id", "messages", "prompt", "input", "response", "system")
_FORMATS = "messages | conversations | prompt + completion or response or answer | instruction (+ input) + output"
# What these carry would be trained on or rendered; a score without them would be a score of another row.
_NOT_RENDERED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class RowProblem(Exception):
    """A row that cannot be scored, with the status and the sentence that say why."""

    def __init__(self, status: str, reason: str) -> None:
        """Keep the code and the sentence.

        Args:
            status: "bad_row", "unknown_role" or "no_response".
            reason: one line for a person.
        """
        super().__init__(reason)
        self.status = status
        self.reason = reason


def show(value: object) -> str:
    """Quote a value from a corpus for a message: plain ASCII, one line, short.

    Args:
        value: anything that JSON can hold.

    Returns:
        At most 60 characters.
    """
    text = (
        ascii(value[:80] if isinstance(value, str) else value) if not isinstance(value, (dict, list)) else _kind(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Check the names that a caller chose.

    Args:
        columns: role of a column -> its name in the rows, or None for detection.

    Raises:
        InputError: a role is unknown, or the roles do not make a conversation.
    """
    if columns is None:
        return
    for key, name in columns.items():
        if key not in COLUMNS:
            raise InputError(f"columns: unknown entry {key!r}; expected some of {', '.join(COLUMNS)}")
        if not isinstance(name, str) or not name:
            raise InputError(f"columns: {key} must name a column of the corpus; got {name!r}")
    turns = {"messages", "prompt", "response"}.intersection(columns)
    alone = turns == {"messages"} and "input" not in columns
    if set(columns) != {"id"} and not alone and turns != {"prompt", "response"}:
        raise InputError(
            f"columns: expected either messages, or prompt and response; got {', '.join(columns) or 'none'}"
        )


def to_messages(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """Turn a row into messages, each {"role": system | user | assistant | tool, "content": text}.

    Args:
        row: the object of the row.
        columns: names to read instead of detecting the format; see `COLUMNS`.

    Returns:
        The turns, of which at least one is an assistant's and not blank.

    Raises:
        RowProblem: the row has another shape, an unknown role, or no answer to learn from.
    """
    messages = _chosen(row, columns) if columns and set(columns) != {"id"} else _detected(row)
    for message in messages:
        if message["role"] == "assistant" and message["content"].strip():
            return messages
    raise RowProblem("no_response", "the row has no assistant turn with text, so there is nothing to learn from it")


def _chosen(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, str]]:
    for key in ("messages", "prompt", "response"):
        if key in columns and columns[key] not in row:
            raise RowProblem("bad_row", f"the row has no column {columns[key]!r} for {key}; it has {_keys(row)}")
    system = row.get(columns["system"]) if "system" in columns else None
    if "messages" in columns:
        return _with_system(_turns(row[columns["messages"]], columns["messages"]), system)
    extra = columns.get("input", "")
    return _pair(row, columns["prompt"], extra, columns["response"], system)


def _detected(row: Mapping[str, Any]) -> list[dict[str, str]]:
    get = row.get
    for name in ("messages", "conversations"):
        turns = get(name)
        if turns is not None:
            if get("tools") and isinstance(row["tools"], (list, str)):
                raise RowProblem("bad_row", "the row carries 'tools', which change its prompt and are not rendered yet")
            return _with_system(_turns(turns, name), get("system"))
    for prompt, extra, responses in (
        ("prompt", "", ("completion", "response", "answer")),
        ("instruction", "input", ("output", "response")),
    ):
        if get(prompt) is not None:
            # A null answer beside a prompt is a row without an answer, not a row of an unknown format.
            named = [name for name in responses if get(name) is not None] or [name for name in responses if name in row]
            if named:
                return _pair(row, prompt, extra, named[0], get("system"))
    raise RowProblem("bad_row", f"expected {_FORMATS}; the row has {_keys(row)}; name its columns to read it")


def _pair(row: Mapping[str, Any], prompt: str, extra: str, response: str, system: Any) -> list[dict[str, str]]:
    if isinstance(row[prompt], list) or isinstance(row[response], list):
        return _turn_pair(row, prompt, response, system)
    asked = _text(row[prompt], prompt)
    more = _text(row.get(extra), extra) if extra else ""
    turns = [
        {"role": "user", "content": f"{asked}\n\n{more}" if more.strip() else asked},
        {"role": "assistant", "content": _text(row[response], response)},
    ]
    return _with_system(turns, system)


def _turn_pair(row: Mapping[str, Any], prompt: str, response: str, system: Any) -> list[dict[str, str]]:
    """Join a prompt and a response of which at least one is a list of turns."""
    sides = []
    for name, role in ((prompt, "user"), (response, "assistant")):
        value = row[name]
        sides.append(
            _turns(value, name) if isinstance(value, list) else [{"role": role, "content": _text(value, name)}]
        )
    if any(turn["role"] == "assistant" for turn in sides[0]):
        raise RowProblem(
            "bad_row", f"{prompt} holds assistant turns that are not to be learned; expected them as messages"
        )
    return _with_system(sides[0] + sides[1], system)


def _with_system(turns: list[dict[str, str]], system: Any) -> list[dict[str, str]]:
    if system is None or (turns and turns[0]["role"] == "system"):
        return turns
    text = _text(system, "system")
    return [{"role": "system", "content": text}, *turns] if text.strip() else turns


def _turns(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise RowProblem("bad_row", f"{name} must be a list of turns; got {show(value)}")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RowProblem("bad_row", f"{name}[{i}] must be an object with role and content; got {show(turn)}")
        role = turn.get("role")
        if role is None:
            role = turn.get("from")
        known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None:
            if role is None:
                raise RowProblem("bad_row", f"{name}[{i}] has no role: expected role or from; it has {_keys(turn)}")
            raise RowProblem("unknown_role", f"{name}[{i}] has role {show(role)}; expected one of {', '.join(ROLES)}")
        if len(turn) > 2:
            _refuse_extras(turn, f"{name}[{i}]")
        content = turn.get("content")
        if content is None:
            if "content" not in turn and "value" not in turn:
                raise RowProblem("bad_row", f"{name}[{i}] has no text: expected content or value; it has {_keys(turn)}")
            content = turn.get("value")
        turns.append(
            {"role": known, "content": content if isinstance(content, str) else _parts(content, f"{name}[{i}]")}
        )
    return turns


def _refuse_extras(turn: Mapping[str, Any], where: str) -> None:
    for key in _NOT_RENDERED:
        if turn.get(key):
            raise RowProblem(
                "bad_row", f"{where} carries {key!r}, which is not rendered yet; put its text into content"
            )
    weight = turn.get("weight")
    if weight is not None and weight != 1:
        raise RowProblem(
            "bad_row", f"{where} has weight {show(weight)}: only 1 is known; leave it out, or split the row"
        )


def _parts(content: Any, where: str) -> str:
    """Join the text parts of a turn; null is no text."""
    if content is None:
        return ""
    if not isinstance(content, list):
        raise RowProblem("bad_row", f"{where}: content must be text or a list of text parts; got {show(content)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise RowProblem("bad_row", f"{where}: only text parts can be scored; got a part of type {show(kind)}")
        texts.append(text)
    return "".join(texts)


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowProblem("bad_row", f"{name} must be text; got {show(value)}")
    return value


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list"}.get(type(value), type(value).__name__)


def _keys(row: Mapping[str, Any]) -> str:
    if not row:
        return "no keys"
    names: Sequence[str] = [show(key) for key in list(row)[:8]]
    return ", ".join(names) + (", ..." if len(row) > 8 else "")
