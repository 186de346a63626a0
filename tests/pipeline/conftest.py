"""A small model, its direction and a corpus: what a run is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import corpus

from gradshield_fast import Direction
from gradshield_fast.loading import load_model
from gradshield_fast.pipeline.options import (
    CorpusOptions,
    DirectionOptions,
    ModelOptions,
    RunOptions,
    ScoringOptions,
)


@pytest.fixture(scope="module")
def direction(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random direction over every weight of the tiny model."""
    model, _ = load_model(str(tiny_model), device="cpu")
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    Direction(tensors).save(path)
    return path


@pytest.fixture
def asked(tiny_model: Path, direction: Path, tmp_path: Path) -> RunOptions:
    return RunOptions(
        corpus=CorpusOptions(corpus(tmp_path / "corpus.jsonl", 50)),
        model=ModelOptions(str(tiny_model), device="cpu"),
        out=tmp_path / "run",
        direction=DirectionOptions(files=(direction,)),
        scoring=ScoringOptions(batch_tokens=256, part_rows=8, normalize="none"),
    )
