"""The reference direction r: dense, low-rank or stacked; preconditioned, compressed, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.fingerprint import model_fingerprint
from gradshield_fast.lowrank import LowRank, factor

if TYPE_CHECKING:
    from gradshield_fast.safety import SafetyProbes

Entry = torch.Tensor | LowRank


class Direction:
    """A direction in weight space for each of K scores: FIHS_k(x) = <grad loss(x), r_k>.

    A direction may cover any subset of the model's weights; a weight it does not name counts as zero.

    Source: arXiv:2605.14194, where r is the gradient of the safety score S.

    Attributes:
        parts: one mapping a direction, from the weight's name to its entry, dense or low-rank.
        meta: what the direction was made of (JSON values only): model and probes fingerprints, score, options.
        residual: relative Frobenius norm of what `low_rank` dropped, over all weights; 0.0 for a dense direction;
            the largest of them for a stack. Where the direction was built low-rank (`from_probes` with several
            passes) there was no gradient to measure it on, and it is an unbiased estimate of the squared norm, whose
            standard error is `meta["low_rank"]["residual_error"]`.
        residuals: the same for each weight that was compressed.
    """

    def __init__(self, tensors: Mapping[str, Entry], *, meta: Mapping[str, Any] | None = None) -> None:
        """Make a single direction.

        Args:
            tensors: name as in `model.named_parameters()` -> Float[Tensor, "<the weight's shape>"], float32 or
                float64 (lower precision is raised to float32), or `LowRank` factors.
            meta: JSON values that travel with the direction.

        Raises:
            InputError: it is empty, or an entry is not a finite floating-point tensor.
        """
        if not tensors:
            raise InputError("Direction: no tensors given; name at least one weight as in model.named_parameters()")
        part = {name: _checked(name, entry) for name, entry in tensors.items()}
        self.parts: tuple[dict[str, Entry], ...] = (part,)
        self.meta: dict[str, Any] = dict(meta or {})
        self.residual = 0.0
        self.residuals: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """Weights that at least one direction covers, in the order they were given."""
        return list(dict.fromkeys(name for part in self.parts for name in part))

    @property
    def count(self) -> int:
        """Number of directions, K."""
        return len(self.parts)

    @property
    def norm(self) -> list[float]:
        """Frobenius norm of each direction over all its weights."""
        return [math.sqrt(sum(_square(entry) for entry in part.values())) for part in self.parts]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the entry on a weight.

        Args:
            name: a name from `names`.

        Returns:
            The shape, which is the weight's.
        """
        return tuple(next(part[name].shape for part in self.parts if name in part))

    def __repr__(self) -> str:
        ranks = sorted({e.rank for part in self.parts for e in part.values() if isinstance(e, LowRank)})
        kind = f"low-rank (ranks {ranks[0]}..{ranks[-1]}, residual {self.residual:.3g})" if ranks else "dense"
        return f"Direction({len(self.names)} weights, {self.count} direction{'s' * (self.count > 1)}, {kind})"

    @classmethod
    def from_probes(
        cls,
        model: torch.nn.Module,
        tokenizer: Any,
        probes: SafetyProbes | None = None,
        *,
        score: str = "refusal_margin",
        weights: str | None = None,
        batch_tokens: int = 2048,
        allow_unaligned: bool = False,
        passes: int = 1,
        rank: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Direction:
        """Build r = grad S from probes that a safe model refuses.

            S = mean over probes of the mean log-probability of a refusal given the probe, in nats a token;
            refusal_margin subtracts the same for a compliant opening; compliance_logprob is what it subtracts alone.

        One pass over the probes gives the dense direction, one float32 tensor of its shape for each weight. Two or more
        give it low-rank from the start, and no matrix weight's gradient is ever held: with k = rank + 24 columns at
        most, 4 k (rows + cols) bytes for each matrix instead of 4 rows cols. See
        `gradshield_fast.safety_factors.safety_factors`.

        Args:
            model: a causal language model of transformers, or a PEFT model around one.
            tokenizer: its tokenizer.
            probes: what to ask and how a refusal reads; None: the bundled probes.
            score: "refusal_margin", "refusal_logprob" or "compliance_logprob".
            weights: regular expression that selects weights by name; None: those that training would change.
            batch_tokens: tokens a forward pass may hold.
            allow_unaligned: go on although the score would mislead on this model; the meta says so.
            passes: 1: dense. 2 or more: low-rank, in that many passes over the probes; 3 comes close to the best.
            rank: columns of the factors, with several passes; None: 16.
            progress: called with (answers done, answers in all).

        Returns:
            A direction with its origin in `meta`; dense, or with several passes low-rank but for vectors, stacks of
            matrices and what `meta["safety"]["dense_weights"]` names. `residual` is then an estimate.

        Raises:
            UnalignedModelError: the model does not refuse its probes, so that the score would reverse the order.
            InputError: an option, a probe or a weight name is wrong, or the gradient is not finite.

        Source: arXiv:2605.14194.
        """
        from gradshield_fast.probes import SafetyProbes

        if passes < 1 or (rank is not None and (passes == 1 or rank < 1)):
            raise InputError(
                f"Direction.from_probes: a rank needs passes >= 2, got rank {rank} and {passes} passes; one pass gives "
                "a dense direction, which low_rank() compresses"
            )
        probes = SafetyProbes.default() if probes is None else probes
        options: dict[str, Any] = {
            "score": score,
            "weights": weights,
            "batch_tokens": batch_tokens,
            "allow_unaligned": allow_unaligned,
            "progress": progress,
        }
        meta = {
            "model": model_fingerprint(model),
            "probes": probes.fingerprint(),
            "options": {"score": score, "weights": weights, "allow_unaligned": allow_unaligned},
        }
        if passes == 1:
            from gradshield_fast.safety import safety_gradient

            gradient, report = safety_gradient(model, tokenizer, probes, **options)
            return cls(gradient, meta={**meta, "safety": report.to_dict()})
        from gradshield_fast.safety_factors import safety_factors

        rank = 16 if rank is None else rank
        found, report = safety_factors(model, tokenizer, probes, rank=rank, passes=passes, **options)
        low_rank = {"rank": rank, "passes": passes, "residual": found.residual, "residual_error": found.residual_error}
        out = cls(found.entries, meta={**meta, "safety": report.to_dict(), "low_rank": low_rank})
        out.residual, out.residuals = found.residual, found.residuals
        return out

    @classmethod
    def stack(cls, directions: list[Direction]) -> Direction:
        """Put several directions side by side, to be scored in one pass.

        Args:
            directions: K directions (stacks count as many as they hold), on the same model.

        Returns:
            A direction with their sum of counts, in order.

        Raises:
            InputError: the list is empty, a weight's shapes differ, or they were made for different models.
        """
        if not directions:
            raise InputError("Direction.stack: give at least one direction, got an empty list")
        models = {d.meta["model"] for d in directions if d.meta.get("model")}
        if len(models) > 1:
            raise InputError("Direction.stack: the directions were made for different models; make them on one model")
        out = cls(directions[0].parts[0])
        out.parts = tuple(part for d in directions for part in d.parts)
        for name in out.names:
            shapes = {tuple(part[name].shape) for part in out.parts if name in part}
            if len(shapes) > 1:
                raise InputError(f"Direction.stack: weight '{name}' has different shapes: {sorted(shapes)}")
        out.meta = {"model": models.pop() if models else None, "stack": [d.meta for d in directions]}
        out.residual = max(d.residual for d in directions)
        out.residuals = {
            name: max(d.residuals.get(name, 0.0) for d in directions) for d in directions for name in d.residuals
        }
        return out

    def low_rank(self, rank: int | None = None, *, energy: float | None = None) -> Direction:
        """Compress every matrix weight's entry to low rank; vectors and stacks of matrices stay dense.

            r ~ p q^T,  residual = ||r - p q^T||_F / ||r||_F over all weights

        An entry for which factors would take more memory than the matrix stays dense.

        Args:
            rank: columns of p and q for each weight.
            energy: share of each weight's squared norm to keep, in (0, 1]; the smallest rank that keeps it.

        Returns:
            The compressed direction; `residual` and `residuals` say what was dropped.

        Raises:
            InputError: not exactly one of `rank` and `energy` is given, or it is out of range.
        """
        if (rank is None) == (energy is None):
            raise InputError("Direction.low_rank: give either rank or energy")
        if rank is not None and rank < 1:
            raise InputError(f"Direction.low_rank: rank must be at least 1, got {rank}")
        if energy is not None and not 0 < energy <= 1:
            raise InputError(f"Direction.low_rank: energy must be in (0, 1], got {energy}")
        if any(isinstance(e, LowRank) for part in self.parts for e in part.values()):
            raise InputError("Direction.low_rank: it is low-rank already; compress the dense direction instead")
        parts: list[dict[str, Entry]] = []
        worst, by_name = 0.0, {}
        for part in self.parts:
            small: dict[str, Entry] = {}
            lost = total = 0.0
            for name, entry in part.items():
                assert isinstance(entry, torch.Tensor)
                square = _square(entry)
                total += square
                small[name] = entry
                if entry.ndim != 2 or square == 0:
                    continue
                factors, dropped = factor(entry, rank=rank, energy=energy)
                if factors.rank * sum(factors.shape) < entry.numel():
                    small[name] = factors
                    lost += dropped
                    by_name[name] = max(by_name.get(name, 0.0), math.sqrt(dropped / square))
            parts.append(small)
            worst = max(worst, math.sqrt(lost / total) if total > 0 else 0.0)
        out = Direction(parts[0], meta={**self.meta, "low_rank": {"rank": rank, "energy": energy, "residual": worst}})
        out.parts, out.residual, out.residuals = tuple(parts), worst, by_name
        return out

    def precondition(self, second_moment: Mapping[str, torch.Tensor] | str | Path, eps: float = 1e-8) -> Direction:
        """Divide by Adam's denominator, so that the score is that of an Adam step: r / (sqrt(v) + eps).

        FIHS is linear in r, so scoring costs the same. eps is added after the root, as torch.optim.Adam does; v is
        taken as given (divide by 1 - beta2^t yourself where the bias correction matters).

        Args:
            second_moment: weight's name -> Tensor of its shape (Adam's exp_avg_sq), or a safetensors file of them.
                It must cover every weight of the direction.
            eps: Adam's epsilon.

        Returns:
            The preconditioned dense direction.

        Raises:
            InputError: a weight is missing, a shape differs, a value is negative or not finite, or the direction is
                low-rank (precondition first, compress after).
        """
        moments, source = _load_moments(second_moment)
        parts: list[dict[str, Entry]] = []
        for part in self.parts:
            done: dict[str, Entry] = {}
            for name, entry in part.items():
                if isinstance(entry, LowRank):
                    raise InputError(
                        "Direction.precondition: the direction is low-rank; precondition it, then compress"
                    )
                v = moments.get(name)
                if v is None:
                    raise InputError(f"Direction.precondition: {source} has no entry for weight '{name}'")
                if v.shape != entry.shape:
                    raise InputError(
                        f"Direction.precondition: weight '{name}' is {tuple(entry.shape)}, "
                        f"but its entry in {source} is {tuple(v.shape)}"
                    )
                v = v.to(device=entry.device, dtype=entry.dtype)
                if not bool(torch.isfinite(v).all()) or bool((v < 0).any()):
                    raise InputError(f"Direction.precondition: {source} is negative or not finite in weight '{name}'")
                done[name] = entry / (v.sqrt() + eps)
            parts.append(done)
        out = Direction(parts[0], meta={**self.meta, "preconditioned": {"eps": eps, "source": source}})
        out.parts = tuple(parts)
        return out

    def check(self, model: torch.nn.Module) -> None:
        """Check that this direction fits a model: every name exists, every shape agrees, the fingerprint is equal.

        Args:
            model: the model that will be scored.

        Raises:
            InputError: it does not fit; the message names the weight.
        """
        weights = dict(model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name in self.names:
            if name not in weights:
                close = [n for n in weights if n.endswith(name) or name.endswith(n)][:1] or list(weights)[:1]
                raise InputError(
                    f"direction: the model has no weight '{name}'; names must be those of model.named_parameters(), "
                    f"such as '{close[0]}'"
                )
            if tuple(weights[name].shape) != self.shape(name):
                raise InputError(
                    f"direction: weight '{name}' is {tuple(weights[name].shape)} in the model, "
                    f"but {self.shape(name)} in the direction"
                )
            other = first.setdefault(id(weights[name]), name)
            if other != name:
                raise InputError(f"direction: '{other}' and '{name}' are one weight in the model; name it once")
        made_for = self.meta.get("model")
        if made_for and made_for != model_fingerprint(model):
            raise InputError(
                "direction: it was made for a model with other weights (fingerprints differ); "
                "make it again on this model"
            )

    def save(self, path: str | Path) -> None:
        """Write the direction as safetensors, atomically, with its origin as metadata.

        Args:
            path: the file to write; an existing one is replaced at the end.

        Raises:
            InputError: the file cannot be written.
        """
        from gradshield_fast.direction_file import write

        head = {"count": self.count, "residual": self.residual, "residuals": self.residuals, "meta": self.meta}
        write(Path(path), self.parts, head)

    @classmethod
    def load(cls, path: str | Path, model: torch.nn.Module | None = None) -> Direction:
        """Read a direction that `save` wrote, or any safetensors file of weight name -> tensor.

        Args:
            path: the file.
            model: the model it will be used on; names, shapes and fingerprint must agree.

        Returns:
            The direction.

        Raises:
            InputError: the file is missing or not of that form, or it was made for another model.
        """
        from gradshield_fast.direction_file import read

        parts, head = read(Path(path))
        out = cls(parts[0], meta=head.get("meta"))
        out.parts = tuple({name: _checked(name, entry) for name, entry in part.items()} for part in parts)
        out.residual, out.residuals = head.get("residual", 0.0), head.get("residuals", {})
        if model is not None:
            try:
                out.check(model)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
        return out


def _checked(name: str, entry: Entry) -> Entry:
    """Raise an entry to float32 and refuse what is not finite."""
    pieces = (entry.p, entry.q) if isinstance(entry, LowRank) else (entry,)
    for x in pieces:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise InputError(f"Direction: the entry of weight '{name}' must be a floating-point tensor, got {x!r:.60}")
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"Direction: the entry of weight '{name}' has NaN or infinite values")
    if isinstance(entry, LowRank):
        return entry
    entry = entry.detach()
    return entry if entry.dtype in (torch.float32, torch.float64) else entry.float()


def _square(entry: Entry) -> float:
    return entry.square() if isinstance(entry, LowRank) else float(entry.double().square().sum())


def _load_moments(source: Mapping[str, torch.Tensor] | str | Path) -> tuple[Mapping[str, torch.Tensor], str]:
    if isinstance(source, Mapping):
        return source, "the second moment"
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(source)), str(source)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{source}: cannot read the second moment as safetensors: {error}") from error
