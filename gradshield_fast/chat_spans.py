"""Where the assistant's words lie in a rendered conversation, found by what the template does, not by how it looks.

Three ways, in this order; each is checked, and one that cannot be sure says so instead of guessing:

    tags     the template marks them itself with {% generation %}
    pieces   render once more with a rare character in place of every answer: what lies between two such characters is
             the template's own text, and it must be found in the conversation in order, up to its last character
    diff     render once more for each answer with a rare character in its place: the two texts agree before and after
             the answer and nowhere in it, whatever the template strips from it or adds to it

A user who writes the template's own control words cannot move a span: no text of a turn is ever searched for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Message = dict[str, str]
Span = tuple[int, int]
Render = Callable[..., str]

# Rendering each answer's prompt costs a render per answer; beyond this many, a hostile row could make that take hours.
MAX_RENDERS = 64

_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_PRIVATE_USE = range(0xF0000, 0xF1900)


class SpansNotFound(Exception):
    """The answers could not be located with certainty; the message says which and why."""


def has_tags(template: str) -> bool:
    """Say whether a template marks the assistant's words with {% generation %}.

    Args:
        template: Jinja source.

    Returns:
        True if it has such a block.
    """
    return _TAG.search(template) is not None


def tagged_template(template: str, opening: str, closing: str) -> str:
    """Rewrite {% generation %} blocks so that what they mark shows in the text itself.

    The block becomes a call of a macro, which is what transformers' own extension turns it into, so white space and
    scopes stay as they are. This uses nothing but the template language, hence works in every transformers version.

    Args:
        template: Jinja source with such blocks.
        opening: character to print before a block.
        closing: character to print after it.

    Returns:
        Jinja source that prints the same, with the characters around each block.
    """

    def call(tag: re.Match[str]) -> str:
        return f"{{%{tag[1]} {'endcall' if tag[2] else 'call _marked()'} {tag[3]}%}}"

    macro = f"{{% macro _marked() %}}{opening}{{{{ caller() }}}}{closing}{{% endmacro %}}"
    return macro + _TAG.sub(call, template)


def rare_characters(text: str, count: int) -> list[str]:
    """Choose private-use characters that a text does not have.

    Args:
        text: the text to avoid.
        count: how many.

    Returns:
        The first ones, so the same text gives the same characters.

    Raises:
        SpansNotFound: the text uses up thousands of them.
    """
    found = [c for c in map(chr, _PRIVATE_USE[: 4 * count]) if c not in text]
    if len(found) < count:
        present = set(text)
        found = [c for c in map(chr, _PRIVATE_USE) if c not in present]
    if len(found) < count:
        raise SpansNotFound("the text uses every private-use character that could mark its answers")
    return found[:count]


def strip_marks(marked: str, opening: str, closing: str) -> tuple[str, list[Span]]:
    """Take the marks of `tagged_template` out of a rendered text.

    Args:
        marked: text rendered by that template.
        opening: the character before a block.
        closing: the character after it.

    Returns:
        The text without marks, and the spans that they enclosed.
    """
    text, spans, length, start = [], [], 0, 0
    for part in re.split(f"([{opening}{closing}])", marked):
        if part == opening:
            start = length
        elif part == closing:
            spans.append((start, length))
        else:
            text.append(part)
            length += len(part)
    return "".join(text), [span for span in spans if span[0] < span[1]]


def answer_spans(render: Render, messages: Sequence[Message], text: str, prompts: bool) -> list[Span]:
    """Locate every assistant turn in a rendered conversation.

    A span starts where the model would start to write: at the end of the prompt that the template makes from the
    turns before, if that prompt begins the text; else at the answer's first character. It ends with the answer's
    last character; `with_end_of_turn` takes it from there.

    Args:
        render: (messages, add_generation_prompt=False) -> text; raises where the template refuses.
        messages: the conversation.
        text: what `render` makes of all of it.
        prompts: whether the template obeys `add_generation_prompt`.

    Returns:
        One span per assistant turn, in order.

    Raises:
        SpansNotFound: the template leaves out a turn, repeats it, or mixes it with others.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    mark = rare_characters(text, 1)[0]
    spans = _by_pieces(render, messages, text, turns, mark)
    if spans is None:
        if len(turns) > MAX_RENDERS:
            raise SpansNotFound(f"the template rewrites answers, and the row has {len(turns)} (limit {MAX_RENDERS})")
        spans = [_by_diff(render, messages, text, turn, mark) for turn in turns]
    if len(turns) > MAX_RENDERS:
        return spans
    after, starts = 0, []
    for turn, (start, end) in zip(turns, spans, strict=True):
        starts.append(_prompt_end(render, messages[:turn], text, after, start, prompts))
        after = end
    return [(start, span[1]) for start, span in zip(starts, spans, strict=True)]


def end_of_turn_pattern(specials: Sequence[str], eos: str) -> re.Pattern[str]:
    """Compile what ends a turn: white space, the first special token, and an end-of-sequence token right behind it.

    Args:
        specials: the tokenizer's special tokens as text, without the one that begins a sequence.
        eos: its end-of-sequence token, or "".

    Returns:
        A pattern that matches nothing if there are no special tokens.
    """
    if not specials:
        return re.compile(r"(?!)")
    tokens = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    # Bounded, because a row of white space only would make an unbounded match take time with its square.
    return re.compile(rf"\s{{0,8}}(?:{tokens})(?:{re.escape(eos)})?" if eos else rf"\s{{0,8}}(?:{tokens})")


def with_end_of_turn(text: str, spans: Sequence[Span], pattern: re.Pattern[str], closes: bool) -> list[Span]:
    """Extend each span over the token that ends its turn: the model has to learn to stop.

    White space after that token is left out. Where the end of a turn is plain text to the tokenizer, it is whatever
    the template writes behind the last answer.

    Args:
        text: the rendered conversation.
        spans: from `answer_spans`.
        pattern: from `end_of_turn_pattern`.
        closes: whether the last span belongs to the last turn of the conversation.

    Returns:
        The extended spans.
    """
    ending = text[spans[-1][1] :].rstrip() if closes and spans else ""
    extended = []
    for n, (start, end) in enumerate(spans):
        limit = spans[n + 1][0] if n + 1 < len(spans) else len(text)
        token = pattern.match(text, end, limit)
        if token is not None:
            end = token.end()
        elif ending and text.startswith(ending, end, limit):
            end += len(ending)
        extended.append((start, end))
    return extended


def _replaced(messages: Sequence[Message], turns: Sequence[int], mark: str) -> list[Message]:
    chosen = set(turns)
    return [{**m, "content": mark} if i in chosen else m for i, m in enumerate(messages)]


def _by_pieces(
    render: Render, messages: Sequence[Message], text: str, turns: list[int], mark: str
) -> list[Span] | None:
    try:
        pieces = render(_replaced(messages, turns, mark)).split(mark)
    except Exception:
        return None
    if len(pieces) != len(turns) + 1 or not text.startswith(pieces[0]):
        return None
    at, spans = len(pieces[0]), []
    for turn, piece in zip(turns, pieces[1:], strict=True):
        for answer in _variants(messages[turn]["content"]):
            if text.startswith(answer, at) and text.startswith(piece, at + len(answer)):
                spans.append((at, at + len(answer)))
                at += len(answer) + len(piece)
                break
        else:
            return None
    return spans if at == len(text) else None


def _variants(content: str) -> list[str]:
    """What templates make of an answer, the longest first: as it is, trimmed, or without its thoughts."""
    variants = [content, content.lstrip(), content.rstrip(), content.strip()]
    if "</think>" in content:
        answer = content.rsplit("</think>", 1)[1]
        variants += [answer.lstrip("\n"), answer.strip()]
    return variants


def _by_diff(render: Render, messages: Sequence[Message], text: str, turn: int, mark: str) -> Span:
    try:
        other = render(_replaced(messages, [turn], mark))
    except Exception as error:
        raise SpansNotFound(f"the template refuses another text in turn {turn}: {error}") from error
    if other.count(mark) != 1:
        what = "leaves out" if mark not in other else "repeats"
        raise SpansNotFound(f"the template {what} the assistant's turn {turn}, so its tokens cannot be told apart")
    start = _common_prefix(text, other)
    end = len(text) - _common_prefix(text[::-1], other[::-1])
    if start > end:
        raise SpansNotFound(f"the template changes with the text of turn {turn}, so its tokens cannot be told apart")
    return start, end


def _common_prefix(one: str, two: str) -> int:
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _prompt_end(render: Render, before: Sequence[Message], text: str, after: int, start: int, prompts: bool) -> int:
    """Where the prompt for an answer ends, if the text begins with that prompt; else where the answer starts."""
    if not before:
        return start
    try:
        prompt = render(before, add_generation_prompt=True)
    except Exception:
        return start
    if not after <= len(prompt) <= start or not text.startswith(prompt):
        return start
    # Without a generation prompt, what comes next may be the header of the turn, which the model does not write.
    return len(prompt) if prompts or text[len(prompt) : start].isspace() else start
