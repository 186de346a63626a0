"""A whole backend in numpy: what the protocol asks for, on a model that fits on a page. It holds no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradshield_fast.threshold import fit_threshold

LETTERS = "abcdefghijklmnopqrstuvwxyz "


class ToyBackend:
    """loss(x) = ln(1 + exp(-(w . phi(x) + b))), phi = letter frequencies; its gradient is known in closed form."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights = {"w": rng.normal(size=len(LETTERS)), "b": rng.normal(size=1)}
        self.direction: dict[str, np.ndarray] | None = None

    def capabilities(self) -> dict[str, Any]:
        return {
            "protocol": 1,
            "backend": "toy",
            "version": "1",
            "safety_scores": ["refusal_logprob"],
            "inputs": ["prompt_response"],
            "grad_norm": True,
            "own_direction": True,
        }

    def _gradient(self, text: str) -> tuple[float, dict[str, np.ndarray]]:
        phi = np.array([text.lower().count(letter) for letter in LETTERS]) / len(text)
        margin = float(self.weights["w"] @ phi + self.weights["b"][0])
        slope = -1.0 / (1.0 + math.exp(margin))
        return math.log1p(math.exp(-margin)), {"w": slope * phi, "b": np.array([slope])}

    def fit_direction(
        self, probes: Any = None, *, score: str = "refusal_logprob", allow_unaligned: bool = False
    ) -> dict[str, Any]:
        parts = [self._gradient(text)[1] for text in (probes or {"refusals": ["I cannot do this."]})["refusals"]]
        return self.use_direction({name: -np.mean([p[name] for p in parts], axis=0) for name in self.weights})

    def use_direction(self, direction: Any) -> dict[str, Any]:
        self.direction = {name: np.asarray(r, np.float64) for name, r in direction.items()}
        norm = math.sqrt(sum(float(r @ r) for r in self.direction.values()))
        return {"directions": 1, "norm": [norm], "weights": list(self.direction)}

    def score(
        self, examples: Sequence[Mapping[str, Any]] | Mapping[str, Any], *, norms: bool = False
    ) -> dict[str, Any]:
        if self.direction is None:
            raise RuntimeError("no direction")
        answer: dict[str, Any] = {"fihs": [], "loss": [], "grad_norm": [], "status": [], "reason": []}
        for row in examples:
            response = row.get("response") if isinstance(row, Mapping) else None
            if not response:
                cells = (math.nan, math.nan, math.nan, "no_response", "there is no response")
            else:
                loss, gradient = self._gradient(response)
                fihs = sum(float(gradient[name] @ r) for name, r in self.direction.items())
                norm = math.sqrt(sum(float(gradient[name] @ gradient[name]) for name in self.direction))
                cells = (fihs, loss, norm, "ok", "")
            for column, cell in zip(answer.values(), cells, strict=True):
                column.append(cell)
        for key in ("fihs", "loss", "grad_norm"):
            answer[key] = np.array(answer[key])
        return answer if norms else {**answer, "grad_norm": None}

    def fit_threshold(self, scores: Any, *, alpha: float | None = None, random_state: int = 0) -> dict[str, Any]:
        return fit_threshold(scores, alpha, random_state).to_dict()

    def decide(self, scores: Any, threshold: float) -> list[str]:
        return ["unscored" if not math.isfinite(s) else "dropped" if s > threshold else "kept" for s in scores]
