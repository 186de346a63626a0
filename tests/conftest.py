"""What all tests share: no network, a tiny model on disk, the command line in this process, a count of GPU tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import Phase, settings
from tiny import save_tiny

# for tests/mutation: whether a test fails is asked there, not on which smallest example
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many GPU tests did not run: a green run without them is not a whole one."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("needs a GPU" in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"gpu tests skipped for want of a GPU: {count}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def nan_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one NaN among its weights."""
    return save_tiny(tmp_path_factory.mktemp("tiny-nan"), broken=True)


@pytest.fixture
def shared_data() -> Path:
    """The folder of larger corpora; skips where there is none."""
    folder = os.environ.get("GRADSHIELD_SHARED_DATA")
    if not folder:
        pytest.skip("GRADSHIELD_SHARED_DATA names no folder of larger corpora")
    return Path(folder)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Run the command line in this process."""
    from gradshield_fast.cli import main

    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(end.value.code or 0), captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, before)
