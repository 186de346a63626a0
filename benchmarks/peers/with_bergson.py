"""bergson (PyPI): its collector's per-row gradients of linear layers against our direction as its query.

Its own loop is used (`CollectorComputer`, `InMemoryCollector`, `Scorer`), with the frozen model and the trainable
embedding that its `score` command sets up; only the query, which it would read from disk, is put in by hand.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector  # pyright: ignore[reportMissingImports]
from bergson import Scorer as BergsonScorer  # pyright: ignore[reportMissingImports]
from bergson.data import pad_and_tensor  # pyright: ignore[reportMissingImports]
from bergson.score.output_influence import output_token_influence, query_directions  # pyright: ignore[reportMissingImports]
from bergson.score.score_writer import InMemorySequenceScoreWriter  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]

from benchmarks.peers.peer import Scores, device_of, entries_of
from benchmarks.workload import linear_weights
from gradshield_fast import Direction
from gradshield_fast.packing import Batch


class Exact:
    """Per-row gradients [rows, out, in] of each layer, in turn, times the query."""

    covers = "linear"
    batch_tokens = (512, 2048)
    projection = 0

    def __init__(self, model: Any, direction: Direction) -> None:
        """Set the model up as bergson's scoring does, and give it our direction as the query.

        Args:
            model: a causal language model.
            direction: a dense direction.
        """
        self.model = model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        folder = tempfile.mkdtemp(prefix="bergson-")
        Path(f"{folder}/run.part").mkdir()
        self.config = IndexConfig(
            run_path=f"{folder}/run", model="", loss_reduction="mean", projection_dim=self.projection
        )
        self.processor = GradientProcessor(projection_dim=self.projection or None)
        names = {id(weight): name for name, weight in model.named_parameters()}
        inside = set(linear_weights(model))
        self.targets = InMemoryCollector.discover_targets(model.base_model)
        self.query: dict[str, torch.Tensor] = {}
        empty = Dataset.from_dict({"input_ids": [], "labels": [], "length": []})
        collector = None
        for target, (_, shape, _) in self.targets.items():
            name = names[id(model.base_model.get_submodule(target).weight)]
            assert name in inside
            r = entries_of(direction)[name].to(device_of(model))
            if self.projection:
                collector = collector or InMemoryCollector(
                    model=model.base_model, data=empty, cfg=self.config, processor=self.processor
                )
                r = collector.double_sided_projection(target, r[None], self.projection, *shape)
            self.query[target] = r.reshape(1, -1)

    def _scorer(self, rows: int) -> Any:
        writer = InMemorySequenceScoreWriter(rows, 1)
        dtype = next(self.model.parameters()).dtype
        return BergsonScorer(self.query, list(self.query), writer, device_of(self.model), dtype)

    def prepare(self, batches: list[Batch]) -> tuple[Any, list[int], list[list[int]], Any]:
        """Make bergson's dataset, in the order of the batches, and its list of batches.

        Args:
            batches: packed rows.

        Returns:
            The dataset, the rows' positions, the indices of each batch, and the query in bergson's layout.
        """
        ids, labels, positions, groups = [], [], [], []
        for batch in batches:
            groups.append(list(range(len(ids), len(ids) + len(batch.positions))))
            for n, length in enumerate(batch.attention_mask.sum(1).tolist()):
                ids.append(batch.input_ids[n, :length].tolist())
                labels.append(batch.labels[n, :length].tolist())
            positions += batch.positions.tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(x) for x in ids]})
        return data, positions, groups, self._scorer(len(ids))

    def score(self, prepared: tuple[Any, list[int], list[list[int]], Any]) -> Scores:
        """Score through bergson's own loop.

        Args:
            prepared: from `prepare`.

        Returns:
            Row's position -> score.
        """
        data, positions, groups, scorer = prepared
        collector = InMemoryCollector(
            model=self.model.base_model, data=data, cfg=self.config, processor=self.processor, scorer=scorer
        )
        computer = CollectorComputer(self.model, data, collector=collector, batches=groups, cfg=self.config)
        computer.run_with_collector_hooks(desc="rows")
        return dict(zip(positions, scorer.writer.scores[:, 0].double().tolist(), strict=True))


class Projected(Exact):
    """Each layer's gradient projected to 16 x 16 at random, as its Trackstar command does: an estimate."""

    projection = 16


class OutputInfluence(Exact):
    """Its forward-mode scoring (`token_influence="output"`): exact, in the model's own type, eager attention."""

    batch_tokens = (1024, 2048, 4096)

    def __init__(self, model: Any, direction: Direction) -> None:
        """Set up as above, with eager attention as bergson does for this.

        Args:
            model: a causal language model.
            direction: a dense direction.
        """
        super().__init__(model, direction)
        model.set_attn_implementation("eager")
        self.directions = query_directions(model, self._scorer(1).query_grads_t, self.targets)

    def score(self, prepared: tuple[Any, list[int], list[list[int]], Any]) -> Scores:
        """Score batch by batch with bergson's function.

        Args:
            prepared: from `prepare`.

        Returns:
            Row's position -> score.
        """
        data, positions, groups, _ = prepared
        scores: list[float] = []
        for group in groups:
            rows = data[group]
            x, y, _, _ = pad_and_tensor(
                rows["input_ids"], labels=rows["labels"], device=device_of(self.model), sync_max_len=False
            )
            rates, _ = output_token_influence(self.model, x, y, self.directions, self.config)
            scores += rates.sum(dim=(1, 2)).double().tolist()
        return dict(zip(positions, scores, strict=True))
