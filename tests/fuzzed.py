"""Broken rows, broken files and odd chat templates, as many as one likes, from a seed."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from typing import Any

from tiny import row

TEXTS = [
    "", " ", "\x00", "\ud800", "\u202e", "\ufeff", "<|im_end|>", "<|im_start|>assistant\n", "{{ 1/0 }}",
    "{% for x in y %}", "\U000f0000", "\U000f0000\U000f0001", "é" * 50, "\r\n\r\n", "a\u0300" * 40, "\U0001f600" * 30,
    "</think>x", "x" * 3000,
]  # fmt: skip
VALUES: list[Any] = [None, True, 0, -1, 1e308, 10**30, "", [], {}, [[]], [None], {"content": None}, "text", [1, "a"]]
ROLES = ["user", "assistant", "system", "tool", "gpt", "human", "USER ", "", None, 7, "martian", "assistant\n"]

TEMPLATES = {
    "loops over a range": "{% for i in range(999999999) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops on an answer": (
        "{% for m in messages %}{{ m.content }}{% if 'long' in m.content %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
    ),
    "reads attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "reads globals": "{{ self.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
    "changes its input": "{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}",
    "says nothing": "",
    "says nothing of the rows": "x",
    "repeats answers": "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
    "turns them round": "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
    "raises": "{{ raise_exception('no') }}",
    "divides by zero": "{{ 1 / 0 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "is large": "{{ 'x' * 99999 }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "depends on length": "{% for m in messages %}{{ m.content | length }}{{ m.content | upper }}{% endfor %}",
}


def value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value, nested at random."""
    kind = chance.random()
    if depth > 4 or kind < 0.5:
        return chance.choice([*VALUES, *TEXTS])
    if kind < 0.75:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(["role", "content", "value", "x", ""]): value(chance, depth + 1) for _ in range(3)}


def turns(chance: random.Random) -> Any:
    """A conversation, or what is left of one."""
    if chance.random() < 0.1:
        return value(chance)
    said = []
    for _ in range(chance.choice((0, 1, 2, 2, 3, 40))):
        turn: dict[str, Any] = {"role": chance.choice(ROLES), "content": chance.choice(TEXTS)}
        if chance.random() < 0.2:
            turn[chance.choice(["content", "role", "weight", "tool_calls", "name"])] = value(chance)
        said.append(turn)
    return said


def line(chance: random.Random, number: int) -> bytes:
    """One line without a newline that some reader will not like; now and then a good one."""
    kind = chance.randrange(12)
    if kind == 0:
        return json.dumps(row(number)).encode()
    if kind == 1:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 60))).replace(b"\n", b"x") or b"x"
    if kind == 2:
        good = bytearray(json.dumps(row(number)).encode())
        for _ in range(chance.randint(1, 4)):
            good[chance.randrange(len(good))] = chance.choice([0, 34, 92, 123, 125, 200, 255])
        return bytes(good)
    if kind == 3:
        good = json.dumps(row(number)).encode()
        return good[: chance.randrange(1, len(good))]
    if kind == 4:
        depth = chance.choice((10, 900, 1100, 20_000))
        return chance.choice((b"[", b'{"messages":[', b'{"a":')) * depth
    if kind == 5:
        return json.dumps(value(chance)).encode()
    if kind == 6:
        return b'{"id":%d,"prompt":"x","response":"%s"}' % (10 ** chance.randrange(20), b"y" * chance.randrange(6000))
    if kind == 7:
        return b'{"prompt": NaN, "response": 1%s}' % (b"0" * chance.choice((3, 5000)))
    names = (
        "messages",
        "conversations",
        "prompt",
        "response",
        "instruction",
        "input",
        "output",
        "system",
        "tools",
        "id",
    )
    made = {name: value(chance) for name in chance.sample(names, chance.randint(1, 5))}
    if kind > 8:
        made["messages"] = turns(chance)
    text = json.dumps(made, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return text.replace(b'"id"', b'"id", "id"', 1) if chance.random() < 0.02 else text


def damaged(chance: random.Random, whole: bytes) -> bytes:
    """A file with bytes changed, cut off or put in."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(max(1, len(data)))
        change: Callable[[], None] = chance.choice(
            [lambda at=at: data.__delitem__(slice(at, None)), lambda at=at: data.insert(at, chance.randrange(256))]
        )
        change()
    return bytes(data)


def packed(lines: list[bytes], suffix: str) -> bytes:
    """A corpus as a file of its kind."""
    data = b"\n".join(lines) + b"\n"
    return gzip.compress(data, mtime=0) if suffix == ".gz" else data
