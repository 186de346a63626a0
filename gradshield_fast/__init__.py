"""Deciding, before any training, which rows of a fine-tuning corpus would break a language model's safety.

GradShield (arXiv 2605.14194) scores a row by the dot product of its loss gradient with a reference direction. This
package computes that score for every row of a batch at once, without ever storing a per-example gradient.

The names below are imported when they are first used, so that `import gradshield_fast` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Direction": "direction",
    "Scorer": "scorer",
    "Scores": "scorer",
    "SafetyProbes": "safety",
    "fit_threshold": "threshold",
}

__all__ = ["Direction", "SafetyProbes", "Scorer", "Scores", "__version__", "fit_threshold", "ops"]

if TYPE_CHECKING:
    from gradshield_fast import ops
    from gradshield_fast.direction import Direction
    from gradshield_fast.safety import SafetyProbes
    from gradshield_fast.scorer import Scorer, Scores
    from gradshield_fast.threshold import fit_threshold


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("gradshield_fast.ops")
    if name in _HOME:
        return getattr(importlib.import_module(f"gradshield_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gradshield_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
