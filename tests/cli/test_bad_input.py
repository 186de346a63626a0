"""What bad input gets: one line and exit code 2, or a row that is counted and named and exit code 1."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BAD_LINES, corpus, lines, row

from gradshield_fast import Direction
from gradshield_fast.loading import load_model

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def direction(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = load_model(str(tiny_model), device="cpu")
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    generator = torch.Generator().manual_seed(1)
    Direction({name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}).save(path)
    return path


@pytest.fixture
def filter_(cli: Cli, tiny_model: Path, direction: Path, tmp_path: Path) -> Cli:
    """`gradshield-fast filter`, with what a test does not give."""

    def call(corpus_path: Path, *more: object, model: object = tiny_model, direction: object = direction) -> Any:
        arguments = ["filter", corpus_path, "--model", model, "--out", tmp_path / "run"]
        if direction is not None:
            arguments += ["--direction", direction]
        return cli(*arguments, "--device", "cpu", *more)

    return call


def refusal(result: Any) -> str:
    """The one line of an error; progress may have come before it."""
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.err.rstrip().endswith(errors[0])
    return errors[0]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return corpus(tmp_path / "good.jsonl", 12)


def test_missing_corpus(filter_: Cli, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in refusal(filter_(tmp_path / "nowhere.jsonl"))
    assert not (tmp_path / "run").exists()


def test_unknown_type_of_corpus(filter_: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.xls").write_bytes(b"x")
    assert "unknown type" in refusal(filter_(tmp_path / "rows.xls"))


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_empty_corpus(filter_: Cli, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    assert "empty" in refusal(filter_(tmp_path / "empty.jsonl"))
    assert not (tmp_path / "run" / "kept.jsonl").exists()


@pytest.mark.parametrize("model", ["./nowhere", "owner/nowhere", "", "nowhere.gguf"])
def test_unknown_model(filter_: Cli, good: Path, model: str) -> None:
    assert "model" in refusal(filter_(good, model=model))


def test_model_with_a_nan_weight(filter_: Cli, good: Path, nan_model: Path, tmp_path: Path) -> None:
    assert "NaN" in refusal(filter_(good, model=nan_model))
    probes = tmp_path / "probes.json"
    probes.write_text(json.dumps({"prompts": ["x"], "refusals": ["no"], "compliances": ["yes"]}))
    options = ("--probes", probes, "--score", "refusal_margin", "--out", tmp_path / "other")
    assert "is nan" in refusal(filter_(good, *options, model=nan_model, direction=None))


@pytest.mark.parametrize("status", list(BAD_LINES))
def test_bad_row_is_counted_and_named_and_never_kept(filter_: Cli, good: Path, tmp_path: Path, status: str) -> None:
    content = good.read_bytes().splitlines()
    good.write_bytes(b"\n".join([*content[:5], BAD_LINES[status], *content[5:]]))
    result = filter_(good, "--max-row-bytes", 4000)
    assert result.code == 1
    assert re.search(rf"{status}\W+1\b", result.out)
    (entry,) = (json.loads(line) for line in (tmp_path / "run" / "unscored.jsonl").read_bytes().splitlines())
    assert (entry["row"], entry["status"]) == (5, status)
    assert entry["reason"]
    written = [(tmp_path / "run" / name).read_bytes().splitlines() for name in ("kept.jsonl", "dropped.jsonl")]
    assert sorted([*written[0], *written[1]]) == sorted(content)


def test_template_that_throws(filter_: Cli, good: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if '7' in m.content %}{{ raise_exception('no sevens') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    result = filter_(good, "--chat-template", template)
    assert result.code == 1
    (entry,) = (json.loads(line) for line in (tmp_path / "run" / "unscored.jsonl").read_bytes().splitlines())
    assert (entry["id"], entry["status"]) == ("r7", "template_error")
    assert "no sevens" in entry["reason"]


def test_template_that_is_broken_or_missing(filter_: Cli, good: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for %}")
    assert "template" in refusal(filter_(good, "--chat-template", tmp_path / "broken.jinja"))
    assert "--chat-template" in refusal(filter_(good, "--chat-template", tmp_path / "nowhere.jinja"))


def test_direction_that_does_not_fit(filter_: Cli, good: Path, tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"\x10\0\0\0")
    for name, tensors in {"names": {"x.weight": (3,)}, "shapes": {"lm_head.weight": (3, 3)}}.items():
        Direction({key: torch.ones(shape) for key, shape in tensors.items()}).save(tmp_path / name)
        assert next(iter(tensors)) in refusal(filter_(good, direction=tmp_path / name))
    assert "not a readable" in refusal(filter_(good, direction=tmp_path / "torn"))
    assert "nowhere" in refusal(filter_(good, direction=tmp_path / "nowhere"))


def test_direction_of_another_model(filter_: Cli, good: Path, tiny_model: Path, tmp_path: Path) -> None:
    made = Direction({"lm_head.weight": torch.ones(640, 32)}, meta={"model": "another"})
    path = tmp_path / "other.safetensors"
    model, _ = load_model(str(tiny_model), device="cpu")
    Direction({"lm_head.weight": torch.ones_like(model.lm_head.weight)}, meta=made.meta).save(path)
    assert "fingerprint" in refusal(filter_(good, direction=path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"prompts": []}', b'{"prompts": 7}', b'{"prompt": ""}\n', b"\xff\xfe"], ids=repr
)
def test_probes_that_are_none(filter_: Cli, good: Path, tmp_path: Path, content: bytes) -> None:
    probes = tmp_path / "probes.json"
    probes.write_bytes(content)
    assert "probes.json" in refusal(filter_(good, "--probes", probes, direction=None))
    assert "nowhere" in refusal(filter_(good, "--probes", tmp_path / "nowhere.json", direction=None))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--normalize", "l1"), "--normalize"),
        (("--loss-reduction", "max"), "--loss-reduction"),
        (("--batch-tokens", 0), "--batch-tokens"),
        (("--batch-tokens", "many"), "a number or auto"),
        (("--max-length", 1), "max_length"),
        (("--max-length", 100_000), "--max-length"),
        (("--alpha", 1, "--threshold", 1), "--alpha"),
        (("--threshold", "nan"), "--threshold"),
        (("--direction-index", 3), "--direction-index"),
        (("--combine", "sum"), "--combine must be one of distance"),
        (("--combine", "distance"), "--combine distance needs several scores"),
        (("--combine", "distance", "--direction-index", 1), "--direction-index"),
        (("--rule", "outliers"), "--combine"),
        (("--score", "refusal_margin,kindness"), "--score"),
        (("--rank", 2, "--energy", 0.5), "--rank"),
        (("--probes", "x.json"), "--probes"),
        (("--passes", 0), "--passes"),
        (("--passes", 3), "--passes is for building a direction"),
        (("--passes", 3, "--energy", 0.5), "--energy needs the dense gradient"),
        (("--passes", 3, "--rank", 0), "--rank 0 needs the dense gradient"),
        (("--passes", 3, "--second-moment", "x"), "--second-moment"),
        (("--columns", "prompt"), "--columns"),
        (("--columns", "prompt=a,prompt=b"), "--columns"),
        (("--columns", "nonsense=a"), "nonsense"),
        (("--dtype", "int8"), "int8"),
        (("--device", "abacus"), "abacus"),
        (("--backend", "abacus"), "abacus"),
        (("--format", "xls"), "xls"),
        (("--max-row-bytes", 0), "max_row_bytes"),
    ],
    ids=str,
)
def test_bad_options(filter_: Cli, good: Path, options: tuple[object, ...], named: str) -> None:
    assert named in refusal(filter_(good, *options))


def test_option_that_does_not_exist(filter_: Cli, good: Path) -> None:
    result = filter_(good, "--kindness", 3)
    assert result.code == 2
    assert "--kindness" in result.err


def test_output_folder_of_another_run(filter_: Cli, good: Path, tmp_path: Path) -> None:
    assert filter_(good).code == 0
    before = (tmp_path / "run" / "kept.jsonl").read_bytes()
    corpus(good, 13)
    line = refusal(filter_(good))
    assert "another run" in line
    assert "corpus.sha256" in line
    assert (tmp_path / "run" / "kept.jsonl").read_bytes() == before


def test_output_folder_that_is_in_the_way(filter_: Cli, good: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert "a file is in the way" in refusal(filter_(good))


def test_output_folder_that_is_the_corpus(filter_: Cli, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    good.rename(folder / "kept.jsonl")
    assert "error: " in refusal(filter_(folder, "--out", folder))
    assert len((folder / "kept.jsonl").read_bytes().splitlines()) == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_while_the_outputs_are_written(
    filter_: Cli, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradshield_fast import outputs

    real = outputs._Lines.__init__

    def open_full(self: Any, path: Path, compression: str) -> None:
        real(self, path, compression)
        if "kept" in path.name:
            self._under.close()
            self._over = self._under = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

    with monkeypatch.context() as patch:
        patch.setattr(outputs._Lines, "__init__", open_full)
        assert "No space left on device" in refusal(filter_(good))
    assert not (tmp_path / "run" / "kept.jsonl").exists()
    assert filter_(good).code == 0


def test_hostile_text_does_not_reach_the_terminal(filter_: Cli, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "hostile.jsonl"
    path.write_bytes(lines(row(number) for number in range(9)))
    hostile = {"id": "[red]\x1b[2J\u202e", "prompt": "\x1b]0;owned\x07 [bold]x", "response": "\x9b31m [link=x]y[/link]"}
    path.write_bytes(path.read_bytes() + lines([hostile]))
    filter_(path)
    result = cli("report", tmp_path / "run")
    assert result.code == 0
    assert not set(result.out + result.err) & set("\x1b\x07\x9b\u202e")
    assert "[bold]" in result.out


def test_unexpected_error_is_one_line_with_a_way_to_see_more(
    filter_: Cli, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("surprise\nand more")

    monkeypatch.setattr("gradshield_fast.pipeline.run.wanted_identity", fail)
    line = refusal(filter_(good))
    assert "KeyError" in line
    assert "--debug" in line
    with pytest.raises(KeyError):
        filter_(good, "--debug")
