"""SafetyProbes: the bundled ones, every file form, and what a bad file gets."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gradshield_fast import SafetyProbes
from gradshield_fast.errors import InputError


@pytest.fixture
def probes() -> SafetyProbes:
    return SafetyProbes(
        prompts=("p0", "p1", "p2", "p3", "p4"),
        categories=("a", "a", "b", "b", "c"),
        refusals=("No.", "Never.", "I will not."),
        compliances=("Sure, here is", "Of course:"),
    )


def write(tmp_path: Any, text: str | bytes) -> str:
    path = tmp_path / "probes.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_bundled_probes_are_many_and_different():
    bundled = SafetyProbes.default()
    assert len(bundled) >= 64
    assert len(set(bundled.prompts)) == len(bundled)
    assert len(bundled.counts()) >= 8
    assert len(set(bundled.refusals)) == len(bundled.refusals) >= 8
    assert bundled.compliances


def test_compliances_are_dealt_in_turn(probes: SafetyProbes):
    assert [probes.compliance_of(i) for i in range(3)] == ["Sure, here is", "Of course:", "Sure, here is"]


def test_a_subset_spreads_over_the_prompts(probes: SafetyProbes):
    small = probes.subset(3)
    assert small.prompts == ("p0", "p1", "p3")
    assert small.categories == ("a", "a", "b")
    assert small.refusals == probes.refusals
    assert len(SafetyProbes.default().subset(20).counts()) >= 8
    for count in (0, 6):
        with pytest.raises(InputError, match="1 to 5 prompts"):
            probes.subset(count)


def test_the_fingerprint_is_of_texts_and_order(probes: SafetyProbes):
    assert probes.fingerprint() == dataclasses.replace(probes).fingerprint()
    others = [
        probes.subset(4),
        dataclasses.replace(probes, prompts=probes.prompts[::-1]),
        dataclasses.replace(probes, refusals=("No.", "Never.", "I will not!")),
        dataclasses.replace(probes, own_refusals=("x", "", "", "", "")),
    ]
    assert len({p.fingerprint() for p in [probes, *others]}) == 5


def test_reads_one_object(tmp_path: Any):
    whole = {"prompts": ["p0", {"prompt": "p1", "category": "c", "refusal": "No!"}], "refusals": ["No."]}
    loaded = SafetyProbes.load(write(tmp_path, json.dumps(whole, indent=1)))
    assert loaded.prompts == ("p0", "p1")
    assert loaded.categories == ("", "c")
    assert loaded.own_refusals == ("", "No!")
    assert loaded.refusals == ("No.",)
    assert loaded.compliances == SafetyProbes.default().compliances


def test_reads_lines_of_prompts(tmp_path: Any):
    lines = ['\ufeff{"prompt": "p\u20280"}', "", '{"prompt": "p1", "refusal": "No!", "other": 1}\r']
    loaded = SafetyProbes.load(write(tmp_path, "\n".join(lines)))
    assert loaded.prompts == ("p\u20280", "p1")
    assert loaded.categories == ()
    assert loaded.own_refusals == ("", "No!")
    assert loaded.refusals == SafetyProbes.default().refusals


def test_reads_one_line(tmp_path: Any):
    assert SafetyProbes.load(write(tmp_path, '{"prompt": "p0"}')).prompts == ("p0",)
    assert SafetyProbes.load(write(tmp_path, '["p0", "p1"]')).prompts == ("p0", "p1")


def test_reads_conversations(tmp_path: Any):
    def turns(*said: tuple[str, str]) -> str:
        return json.dumps({"messages": [{"role": role, "content": text} for role, text in said]})

    lines = [
        turns(("system", "s"), ("user", "p0"), ("assistant", " No! "), ("user", "why?")),
        turns(("user", "p1")),
    ]
    loaded = SafetyProbes.load(write(tmp_path, "\n".join(lines)))
    assert loaded.prompts == ("p0", "p1")
    assert loaded.own_refusals == ("No!", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (b"\xff\xfe\x00", "cannot read"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ('{"question": "a"}', "prompt 1 has no text 'prompt'"),
        ('{"prompt": "a"}\n{"prompt": 3}', "prompt 2 has no text 'prompt'"),
        ('{"prompt": "a", "refusal": ["b"]}', "must be texts"),
        ('{"prompt": "  "}', "prompts\\[0\\] must be text that is not empty"),
        ('{"prompts": []}', "'prompts' is empty"),
        ('{"prompts": "a"}', "'prompts' must be a list"),
        ('{"prompts": ["a"], "refusals": "b"}', "'refusals' must be a list"),
        ('{"prompts": ["a"], "compliances": [""]}', "compliances\\[0\\] must be text"),
        ("[3]", "prompt 1 must be a text or an object"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no user turn"),
        ('{"messages": ["a"]}', "must be a list of"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Any, text: str | bytes, message: str):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as error:
        SafetyProbes.load(path)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Any):
    with pytest.raises(InputError, match="no such probes file"):
        SafetyProbes.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot read"):
        SafetyProbes.load(tmp_path)


def test_lengths_must_agree():
    with pytest.raises(InputError, match="1 prompts, but 2 categories"):
        SafetyProbes(("p",), ("r",), ("c",), categories=("a", "b"))
