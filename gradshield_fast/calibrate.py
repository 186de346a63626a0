"""Settling a plan: score three short rows, hold every weight against autograd, make what disagrees more general."""

from __future__ import annotations

import dataclasses
import warnings

import torch

from gradshield_fast.batches import IGNORE, PaddedBatch
from gradshield_fast.capture import Capture, capture
from gradshield_fast.compiled import CompiledLayers
from gradshield_fast.errors import InputError, ScoringError, is_out_of_memory
from gradshield_fast.layout import RowAxisLost
from gradshield_fast.losses import Call, accepts, row_losses
from gradshield_fast.memory import free_bytes
from gradshield_fast.oracle import Truth, autograd_truth
from gradshield_fast.plan import Plan, all_of
from gradshield_fast.step import run_step
from gradshield_fast.tally import Tally
from gradshield_fast.universal import CHAIN, MethodFailed
from gradshield_fast.widened import extra_bytes, widened

ROWS, TOKENS, SHORT = 3, 13, 9
"""Shape of the trial batch: primes, so that a row or token axis is not mistaken for another; its last row is padded."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Allowed disagreement, in units of |<G, r>| + sqrt(sum (G r)^2), by the model's dtype. A wrong rule is off by about
one such unit; a right one by the rounding of the model's dtype, since both see the same activations and gradients.
Float64 models earn 1e-6 only, as most work in float32 inside (norms, rotary angles, routers)."""

NOISE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.03}
"""The same in units of sum over positions of |g . y_dot|, for gradients that cancel to nothing (a key's bias)."""

SAME_LOSS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Allowed relative difference of a row's loss alone and in a batch: rounding in another shape, no more. A float64
model earns no tighter bound, as many work in float32 inside."""

ROUNDING = 3.0
"""How many times the error of a 16-bit model's own way, by root mean square over the weights, another way may have.
Both are a few roundings carried through all the layers: the ratio was 0.4 to 1.5 in 130 trials of right ways."""

ATTEMPTS = 200


def trial_batch(batch: PaddedBatch) -> PaddedBatch:
    """Make three short rows out of a batch's own tokens, drawn with a fixed seed.

    Args:
        batch: the first batch to be scored.

    Returns:
        Three rows, the last one padded, with a loss at every token.
    """
    pool = batch.input_ids[batch.attention_mask.bool()].cpu()
    generator = torch.Generator().manual_seed(0)
    ids = pool[torch.randint(len(pool), (ROWS, TOKENS), generator=generator)]
    mask = torch.ones_like(ids)
    mask[-1, SHORT:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, 0] = IGNORE
    device = batch.input_ids.device
    source = torch.arange(TOKENS).repeat(ROWS, 1)
    return PaddedBatch(ids.to(device), mask.to(device), labels.to(device), source)


class Calibration:
    """The trial of a plan against autograd on one small batch. The model must be frozen and in evaluation mode."""

    def __init__(self, plan: Plan, batch: PaddedBatch, call: Call, *, token_scores: bool) -> None:
        """Work out autograd's answer.

        Args:
            plan: the plan, which `settle` changes.
            batch: the first batch to be scored, from which the trial's tokens are drawn.
            call: how the model is called; with an attention mask if it turns out to need one.
            token_scores: whether position terms are wanted.

        Raises:
            ScoringError: a row's loss changes with its batch mates or with padding, or autograd fails on the model.
        """
        self.plan, self.token_scores = plan, token_scores
        self.first, self.batch = batch, trial_batch(batch)
        dtypes = {p.dtype for p in plan.model.parameters() if p.is_floating_point()}
        self.tolerance = max(TOLERANCE.get(dtype, 0.1) for dtype in dtypes)
        self.same = max(SAME_LOSS.get(dtype, 0.05) for dtype in dtypes)
        self.noise = max(NOISE.get(dtype, 0.03) for dtype in dtypes)
        self.call = self._independent(call)
        try:
            self.truth: Truth = autograd_truth(plan.model, plan.direction, self.batch, self.call)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ScoringError(f"autograd itself cannot differentiate this model: {error}") from error
        self._exact: Truth | None = None

    def _independent(self, call: Call) -> Call:
        """Find a way to call the model that leaves its function as it is and in which a row's loss is its own.

        A row alone, called with nothing but its ids, says what the model's own loss is. Position ids are passed only if
        they do not change it (RoBERTa's count from 2), and a mask only where padding shows without one.

        Raises:
            ScoringError: there is none.
        """
        masks = [False, True] if accepts(self.plan.model, "attention_mask") else [False]
        own, worst = self._losses_alone(dataclasses.replace(call, positions=False, mask=False)), float("inf")
        if not bool(torch.isfinite(own).all()):
            raise ScoringError("the model's loss is not finite on a short row; are its weights damaged (NaN)?")
        for positions in dict.fromkeys([call.positions, False]):
            for mask in masks:
                choice = dataclasses.replace(call, positions=positions, mask=mask)
                alone, together = self._losses_alone(choice), self._losses(self.batch, choice)[[0, ROWS - 1]]
                off = torch.maximum((alone - own).abs(), (together - own).abs()) / (1 + own.abs())
                if bool((off <= self.same).all()):  # a NaN is a difference
                    return choice
                worst = min(worst, float(off.max()))
        raise ScoringError(
            f"the model's loss of a row depends on its batch mates or on padding (by {worst:.2g} relative, at the "
            "least); a score would not be the row's own"
        )

    def _losses_alone(self, call: Call) -> torch.Tensor:
        """Losses of the trial's first and last row, each in a batch of its own without padding."""
        rows = ((0, TOKENS), (ROWS - 1, SHORT))
        return torch.cat([self._losses(self.batch.row(n, length), call) for n, length in rows])

    def _losses(self, batch: PaddedBatch, call: Call) -> torch.Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reentrant checkpointing warns where nothing is differentiated
            return row_losses(self.plan.model, batch, call).double().cpu()

    def settle(self) -> None:
        """Change the plan until every weight agrees with autograd, and record layouts and uses.

        Raises:
            ScoringError: a weight cannot be made to agree; the message names it and both figures.
        """
        plan = self.plan
        for _ in range(ATTEMPTS):
            try:
                tally = self._trial()
            except RowAxisLost as lost:
                for weight in plan.weights_at(lost.site):
                    if not plan.promote(weight, lost.site, same_module=False):
                        raise ScoringError(f"weight '{weight}': {lost}") from lost
                continue
            except MethodFailed as failed:
                weights = plan.weights_at(failed.site)
                if not plan.next_method(failed.site):
                    raise ScoringError(f"weights {weights}: {failed}") from failed
                continue
            wrong = self._wrong(tally)
            if not wrong and not (plan.context.norms and self._split_norms(tally)):
                plan.known_layouts, plan.expected_uses = tally.layouts, tally.uses
                plan.shared = _same_inputs(tally)
                return
            stuck = [weight for weight in wrong if not self._generalise(weight, tally)]
            if stuck:
                self._give_up(stuck, tally)
        raise ScoringError(f"no rule was found for weights {wrong[:3]}; leave them out of the direction")

    def _trial(self) -> Tally:
        with capture(self.plan.model, self.plan.sites(split=True)) as hooks:
            return run_step(
                self.plan,
                self.batch,
                self.call,
                hooks,
                None,
                token_scores=self.token_scores,
                calibrated=False,
                by_weight=True,
            )[1]

    def why_not_compiled(self, call: Call, hooks: Capture, compiled: CompiledLayers) -> str | None:
        """Say why compiled layers do not give what autograd gives; compiles them.

        Args:
            call: how the model is called.
            hooks: the capture on what is not compiled.
            compiled: the layers, in place on the model.

        Returns:
            The reason, or None where losses, row's dot products and norms agree.
        """
        head = self.plan.head_rule()
        with compiled.warming():
            losses, tally = run_step(
                self.plan, self.batch, call, hooks, head, compiled, token_scores=self.token_scores, by_weight=True
            )
        truth = self.truth
        want, spread = (torch.stack(list(x.values())) for x in (truth.dot, truth.spread))
        terms = torch.stack([tally.share(name)[1].cpu() for name in tally.by_weight or {}]).sum(0)
        bound = self.tolerance * (want.sum(0).abs() + spread.square().sum(0).sqrt()) + self.noise * terms
        agree = bool(((tally.dot.cpu() - want.sum(0)).abs() <= bound).all())
        if not agree and (self._exact is None or not self._only_rounds(tally.dot.cpu(), self._exact)):
            return "a row's score differs"
        if tally.norm_sq is not None:
            norm = torch.stack(list(truth.norm_sq.values())).sum(0).sqrt()
            if not bool(((tally.norm_sq.cpu().sqrt() - norm).abs() <= self.tolerance * norm).all()):
                return "a row's norm differs"
        return self._off(losses)

    def foresee_rounding(self) -> None:
        """Work out a 16-bit model's answer in float32 too, to tell rounding from a fault in `why_not_compiled`.

        To be asked before anything of ours is in place on the model. Nothing is done where memory does not allow it.
        """
        if self.same == SAME_LOSS[torch.bfloat16] and self._room_for_float32():
            self._in_float32()

    def _in_float32(self) -> Truth:
        if self._exact is None:
            with widened(self.plan.model):
                self._exact = autograd_truth(self.plan.model, self.plan.direction, self.batch, self.call)
        return self._exact

    def _room_for_float32(self) -> bool:
        free = free_bytes(self.batch.input_ids.device)
        return free is None or free >= extra_bytes(self.plan.model)

    def _only_rounds(self, dot: torch.Tensor, exact: Truth) -> bool:
        """Whether rows' scores are off float32's by at most `ROUNDING` times what the model's own way is off.

        What its weights are off by adds up at random; their squares say how far that goes, where the few rows' own sums
        may have come out near by chance.
        """
        off_by_weight = _stacked(self.truth.dot) - _stacked(exact.dot)
        own = max(float(off_by_weight.square().sum()), float(off_by_weight.sum(0).square().sum()))
        off = float((dot - _stacked(exact.dot).sum(0)).square().sum())
        return off <= ROUNDING**2 * own

    def _off(self, losses: torch.Tensor) -> str | None:
        off = (losses.double().cpu() - self.truth.loss).abs() / (1 + self.truth.loss.abs())
        # not `>`: a NaN is a difference
        return None if bool((off <= self.same).all()) else f"a row's loss differs by {float(off.max()):.2g} (relative)"

    def why_not(self, call: Call) -> str | None:
        """Say why another way to run the model does not give what autograd gives; to be asked after `settle`.

        Args:
            call: the other way; where its head is fused, the plan must be too.

        Returns:
            The reason, or None where losses, and every weight's dot products and norms, agree.
        """
        try:
            losses, tally = self._run(call)
        except (ScoringError, MethodFailed, RowAxisLost, InputError) as error:
            return str(error)
        if (reason := self._off(losses)) is not None:
            return reason
        wrong = self._wrong(tally)
        if wrong and self.same == SAME_LOSS[torch.bfloat16]:
            return self._why_not_in_float32(call, tally)
        return f"the score of '{wrong[0]}' differs" if wrong else None

    def _run(self, call: Call) -> tuple[torch.Tensor, Tally]:
        head = self.plan.head_rule() if call.head is not None else None
        with capture(self.plan.model, self.plan.sites(split=True)) as hooks:
            return run_step(self.plan, self.batch, call, hooks, head, token_scores=self.token_scores, by_weight=True)

    def _why_not_in_float32(self, call: Call, tally: Tally) -> str | None:
        """Tell a wrong way from one that only rounds differently, for a 16-bit model.

        Another kernel for the same layer rounds other bits away, and a weight whose terms cancel may be off by all
        that is left of it. So the way is tried on the same weights in float32, where rounding hides nothing, and its
        16-bit answer is held against float32's: it may be off by `ROUNDING` times as much as the model's own way is.
        """
        if not self._room_for_float32():
            return None if self._agree_together(tally) else "its scores differ, and there is no memory for float32"
        try:
            exact = self._in_float32()
            with widened(self.plan.model):
                _, wide = self._run(call)
        except (ScoringError, MethodFailed, RowAxisLost, InputError) as error:
            return f"in float32: {error}"
        wrong = self._wrong(wide, exact, TOLERANCE[torch.float32], NOISE[torch.float32])
        if wrong:
            return f"the score of '{wrong[0]}' differs, in float32 too"
        unit = _stacked(exact.spread)
        own = (_stacked(self.truth.dot) - _stacked(exact.dot)).square().sum() / unit.square().sum()
        got = torch.stack([tally.share(weight)[0].cpu() for weight in exact.dot])
        off = (got - _stacked(exact.dot)).square().sum() / unit.square().sum()
        if bool(off <= ROUNDING**2 * own):
            return None
        return f"its rounding is {float((off / own).sqrt()):.1f} times the model's own"

    def _agree_together(self, tally: Tally) -> bool:
        """Whether all weights together agree; what is wrong in a way to run a model is wrong in every layer."""
        got = torch.stack([tally.share(weight)[0].cpu() for weight in self.truth.dot])
        off, unit = got - _stacked(self.truth.dot), _stacked(self.truth.spread)
        return bool((off.square().sum(0) <= self.tolerance**2 * unit.square().sum(0)).all())

    def _wrong(
        self, tally: Tally, truth: Truth | None = None, tolerance: float | None = None, noise: float | None = None
    ) -> list[str]:
        """Weights whose dot products or norms disagree with autograd, by the model's own bounds if not told others."""
        truth = self.truth if truth is None else truth
        tolerance = self.tolerance if tolerance is None else tolerance
        noise = self.noise if noise is None else noise
        largest = torch.stack(list(truth.norm_sq.values())).max(0).values.sqrt()
        wrong = []
        for weight in self.plan.sites_of:
            want = truth.dot[weight]
            got, terms = (x.cpu() for x in tally.share(weight))
            bound = tolerance * (want.abs() + truth.spread[weight]) + noise * terms
            # `not <=` rather than `>`: a NaN is a disagreement
            agree = bool(((got - want).abs() <= bound + 1e-14 * truth.size[weight]).all())
            if agree and tally.norm_sq is not None:
                norm = truth.norm_sq[weight].sqrt()
                off = (tally.norm_of(weight).cpu() - norm).abs()
                agree = bool((off <= tolerance * norm + noise * largest).all())
            if not agree:
                wrong.append(weight)
        return wrong

    def _generalise(self, weight: str, tally: Tally) -> bool:
        """Make one weight's sites more general, the likeliest culprits first; False where nothing is left."""
        plan = self.plan
        keys = list(plan.sites_of[weight])
        silent = [key for key in keys if key not in tally.fired]
        if silent and len(silent) < len(keys):
            return all_of([plan.promote(weight, key, same_module=False) for key in silent])
        by_class = [key for key in keys if key[1] not in CHAIN and key in tally.fired]
        if by_class:
            return all_of([plan.promote(weight, key, same_module=True) for key in by_class])
        return all_of([plan.promote(weight, key, same_module=key in tally.fired) for key in keys])

    def _split_norms(self, tally: Tally) -> bool:
        """Bring a weight's several uses under one universal site: only there does its norm include cross terms."""
        changed = False
        for weight, keys in list(self.plan.sites_of.items()):
            if tally.uses.get(weight, 0) > 1 and any(method in CHAIN for _, method in keys):
                changed |= all_of([self.plan.promote(weight, key, same_module=False) for key in keys])
        return changed

    def _give_up(self, weights: list[str], tally: Tally) -> None:
        name = weights[0]
        want = self.truth.dot[name]
        got = tally.share(name)[0].cpu()
        row = int((got - want).abs().sum(1).argmax())
        more = f" (and {len(weights) - 1} more: {', '.join(weights[1:4])})" if len(weights) > 1 else ""
        raise ScoringError(
            f"weight '{name}'{more} would be scored wrongly: every rule was tried, and the most general one gives "
            f"{float(got[row, 0]):.6g} where autograd gives {float(want[row, 0]):.6g}; leave it out of the direction"
        )


def _stacked(by_weight: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(by_weight.values()))


def _same_inputs(tally: Tally) -> list[list[str]]:
    """Group the weights of linear layers that follow each other on one activation."""
    groups: list[list[str]] = []
    before = None
    for weight, a in tally.inputs:
        if a is before and weight not in groups[-1]:
            groups[-1].append(weight)
        else:
            groups.append([weight])
        before = a
    once = {weight for weight in tally.uses if tally.uses[weight] == 1}
    return [group for group in groups if len(group) > 1 and once.issuperset(group)]
