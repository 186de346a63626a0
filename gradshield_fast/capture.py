"""`with capture(model, sites, ...)`: a forward hook keeps a, a tensor hook brings g; removed even on error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradshield_fast.errors import BackendUnavailable, InputError, ScoringError, is_out_of_memory
from gradshield_fast.matrix_rules import MatrixRule
from gradshield_fast.rule import Rule
from gradshield_fast.tally import Tally
from gradshield_fast.universal import Call, MethodFailed, UniversalRule, detached

Key = tuple[str, str]


@dataclass
class Site:
    """A module that the scorer listens to, with the rules of its weights.

    Attributes:
        name: the module's name in the model.
        module: the module.
        rules: site's key -> rule for a weight that the module applies itself.
        universals: universal rules for weights in the module's subtree, one for each method in use.
    """

    name: str
    module: torch.nn.Module
    rules: dict[Key, list[Rule]] = field(default_factory=dict)
    universals: list[UniversalRule] = field(default_factory=list)

    @property
    def matrices(self) -> list[str]:
        """Weights of linear layers here."""
        return [rule.weight for rules in self.rules.values() for rule in rules if type(rule) is MatrixRule]


class Capture:
    """The hooks of one scorer. Nothing is stored here but the tally: what a call keeps lives in its output's hook.

    So a module that is called twice has two records, a checkpointed module's recomputation makes records that nobody
    reads, and everything is freed with the graph, layer by layer, while the backward pass runs.

    Attributes:
        tally: where the sums of the batch at hand go; None between batches, when the hooks do nothing.
    """

    def __init__(self) -> None:
        """Start with no hooks."""
        self.tally: Tally | None = None
        self._recomputing = False

    def forward_hook(self, site: Site) -> Any:
        """Make the forward hook of a site.

        Args:
            site: the site.

        Returns:
            A function for `register_forward_hook(..., with_kwargs=True)`.
        """

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.tally is None or self._recomputing or not torch.is_grad_enabled():
                return None
            output, changed = _with_grad(output)
            if site.rules and isinstance(output, torch.Tensor):
                self._listen(site, module, args, kwargs, output)
            if site.universals and not isinstance(output, torch.Tensor):
                output, changed = _apart(output), True
            for rule in site.universals:
                self._listen_universal(rule, args, kwargs, output)
            return output if changed else None

        return hook

    def _listen(
        self,
        site: Site,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> None:
        tally = self.tally
        a = args[0] if args else next(iter(kwargs.values()))
        version = a._version
        if tally is not None and tally.by_weight is not None:
            tally.inputs += [(weight, a) for weight in site.matrices]
        kept = []
        for key, rules in site.rules.items():
            with _failing_as(key):
                kept += [(key, rule, rule.keep(module, a)) for rule in rules]

        def arrive(g: torch.Tensor) -> None:
            if tally is None or self.tally is not tally:
                return  # a graph that outlived its batch
            if a_lives and a._version != version:
                raise ScoringError(
                    f"module '{site.name}': its input was changed in place after the call, so that its activation is "
                    "lost; leave the weights of this module out of the direction"
                )
            g = g.detach()
            for key, rule, saved in kept:
                layout = tally.layout(key, tuple(g.shape[:-1]))
                with _failing_as(key):
                    rule.add(saved, g, layout, tally)

        # a projection made in the forward pass is safe from later changes of the input
        a_lives = any(_holds(saved, a) for _, _, saved in kept)
        if not a_lives:
            del a
        output.register_hook(arrive)

    def _listen_universal(
        self, rule: UniversalRule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        tally = self.tally
        call = Call(detached(args), detached(kwargs))
        inputs = [x for x in tree_flatten((call.args, call.kwargs))[0] if isinstance(x, torch.Tensor)]
        versions = [x._version for x in inputs]

        def listen(place: int, y: torch.Tensor) -> None:
            def arrive(g: torch.Tensor) -> None:
                if tally is None or self.tally is not tally:
                    return
                if [x._version for x in inputs] != versions:
                    raise ScoringError(
                        f"module '{rule.key[0]}': an input was changed in place after the call; leave the weights "
                        f"{', '.join(rule.weights)} out of the direction"
                    )
                layout = tally.layout(rule.key, tuple(g.shape[:-1]))
                self._recomputing = True
                try:
                    rule.add(call, place, g.detach(), layout, tally)
                finally:
                    self._recomputing = False

            y.register_hook(arrive)

        flat = tree_flatten(output)[0]
        live = [(i, y) for i, y in enumerate(flat) if isinstance(y, torch.Tensor) and y.requires_grad]
        call.outputs = len(live)
        for i, y in live:
            listen(i, y)


@contextmanager
def _failing_as(key: Key) -> Iterator[None]:
    """Turn an op's refusal of a module's tensors into the failure of a rule guessed from the module's class."""
    try:
        yield
    except (InputError, RuntimeError) as error:
        # a named backend that cannot run is the user's to hear, not a reason to score by another rule
        if isinstance(error, (ScoringError, BackendUnavailable)) or is_out_of_memory(error):
            raise
        raise MethodFailed(key, error) from error


def _holds(saved: Any, a: torch.Tensor) -> bool:
    """Say whether a rule kept the input itself."""
    found = tree_flatten(saved)[0]
    return any(isinstance(x, torch.Tensor) and x.data_ptr() == a.data_ptr() for x in found)


def _with_grad(output: Any) -> tuple[Any, bool]:
    """Make a frozen model's output require a gradient, so that hooks fire; below the first such module nothing runs.

    The copy keeps a later in-place operation of the model from meeting a leaf.

    Args:
        output: a module's output, any nesting.

    Returns:
        The output, and whether it was replaced.
    """
    if isinstance(output, torch.Tensor):
        if output.requires_grad or not output.is_floating_point():
            return output, False
        return output.detach().requires_grad_().clone(), True
    flat, spec = tree_flatten(output)
    floats = [y for y in flat if isinstance(y, torch.Tensor) and y.is_floating_point()]
    if not floats or any(y.requires_grad for y in floats):
        return output, False
    return tree_unflatten([_with_grad(y)[0] for y in flat], spec), True


def _apart(output: Any) -> Any:
    """Give each of several outputs a node of its own, so that its gradient is what came from outside the module.

    A router that returns its logits and the weights made from them would otherwise count the logits twice.

    Args:
        output: a module's output, any nesting.

    Returns:
        The same values.
    """
    flat, spec = tree_flatten(output)
    apart = [y.view_as(y) if isinstance(y, torch.Tensor) and y.requires_grad else y for y in flat]
    return tree_unflatten(apart, spec)


@contextmanager
def capture(model: torch.nn.Module, sites: Sequence[Site]) -> Iterator[Capture]:
    """Put the hooks of a plan on a model, with its weights frozen, and take everything back at the end.

    Weights that require no gradient make the backward pass stop at activations, which is all that scoring needs.

    Args:
        model: the model.
        sites: where to listen.

    Yields:
        The capture, whose `tally` is set for each batch.
    """
    state = Capture()
    handles = []
    try:
        for site in sites:
            handles.append(site.module.register_forward_hook(state.forward_hook(site), with_kwargs=True))
        yield state
    finally:
        state.tally = None
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode with every weight frozen, and give back its modes, flags and gradients.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {weight: weight.requires_grad for weight in model.parameters()}
    try:
        model.eval()
        for weight in flags:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, flag in flags.items():
            weight.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
