"""kronfluence (PyPI) without curvature: its pairwise scores under the identity strategy, our direction as the query.

Its own scoring loop and trackers are used; the query, which it would make from a measurement's gradient, is put where
its precondition tracker puts it, and compressed by that tracker where a low-rank query is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from kronfluence.analyzer import prepare_model  # pyright: ignore[reportMissingImports]
from kronfluence.arguments import FactorArguments, ScoreArguments  # pyright: ignore[reportMissingImports]
from kronfluence.module.tracked_module import ModuleMode, TrackedModule  # pyright: ignore[reportMissingImports]
from kronfluence.module.utils import set_mode, update_factor_args, update_score_args  # pyright: ignore[reportMissingImports]
from kronfluence.score.dot_product import compute_dot_products_with_loader  # pyright: ignore[reportMissingImports]
from kronfluence.task import Task  # pyright: ignore[reportMissingImports]
from kronfluence.utils.constants import ALL_MODULE_NAME  # pyright: ignore[reportMissingImports]
from kronfluence.utils.state import State  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader

from benchmarks.peers.peer import Scores, by_position, device_of, entries_of, tensors
from benchmarks.workload import linear_weights, row_losses
from gradshield_fast import Direction
from gradshield_fast.packing import Batch


class _Rows(Task):
    """The sum over rows of each row's mean loss, as kronfluence asks for it."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
        ids, labels = batch
        return row_losses(model(input_ids=ids, use_cache=False).logits, labels).sum()

    def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names


class Exact:
    """The dense query: an einsum of query, activations and output gradients a layer."""

    covers = "linear"
    batch_tokens = (512, 2048)
    rank: int | None = None

    def __init__(self, model: Any, direction: Direction) -> None:
        """Wrap the linear layers, and score in the model's type, as its low-precision presets do.

        Args:
            model: a causal language model.
            direction: a dense direction.
        """
        names = [name.removesuffix(".weight") for name in linear_weights(model)]
        dtype = next(model.parameters()).dtype
        self.task = _Rows(names)
        entries = entries_of(direction)
        self.r = {name: entries[f"{name}.weight"] for name in names}
        self.model = prepare_model(model, self.task)
        self.factors = FactorArguments(strategy="identity")
        self.arguments = ScoreArguments(
            score_dtype=dtype, per_sample_gradient_dtype=dtype, query_gradient_low_rank=self.rank
        )
        self.state = State(cpu=not torch.cuda.is_available())
        update_factor_args(model=self.model, factor_args=self.factors)
        update_score_args(model=self.model, score_args=self.arguments)
        self.modules = [module for module in self.model.modules() if isinstance(module, TrackedModule)]

    def prepare(self, batches: list[Batch]) -> tuple[list[Batch], Any]:
        """Make a loader of the batches, and put the query in, which its scoring loop takes out at the end.

        Args:
            batches: packed rows.

        Returns:
            The batches and their loader.
        """
        mode = ModuleMode.PRECONDITION_GRADIENT
        set_mode(model=self.model, mode=mode, tracked_module_names=self.task.names, release_memory=True)
        torch.manual_seed(0)
        for module in self.modules:
            query = self.r[module.name][None].to(device_of(self.model))
            module._trackers[mode]._process_preconditioned_gradient(query)
            module.accumulate_iterations()
        pairs: Any = [tensors(batch, self.model) for batch in batches]
        return batches, DataLoader(pairs, batch_size=None)

    def score(self, prepared: tuple[list[Batch], Any]) -> Scores:
        """Score through kronfluence's own loop.

        Args:
            prepared: from `prepare`.

        Returns:
            Row's position -> score.
        """
        batches, loader = prepared
        scores = compute_dot_products_with_loader(
            model=self.model,
            task=self.task,
            state=self.state,
            train_loader=loader,
            factor_args=self.factors,
            score_args=self.arguments,
            tracked_module_names=self.task.names,
            scaler=torch.amp.GradScaler(enabled=False),
            disable_tqdm=True,
        )
        return by_position(batches, [scores[ALL_MODULE_NAME][0]])


class Rank16(Exact):
    """Its low-rank query at rank 16."""

    rank = 16
