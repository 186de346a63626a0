"""Which rule scores which weight, settled by trial: every plan is held against autograd before it is used.

A model can apply a weight where no rule looks: a functional call, a fused kernel, a subclass that does more than its
parent. So the plan starts from the modules' classes and scores three short rows with it; autograd scores the same
rows. Where a weight disagrees, its rule gives way to a more general one, nearer to the root:

    rule by class  ->  universal rule at the same module  ->  universal rule at the parent, and so on to the model

A plan that agrees is exact for every weight, and one that cannot be made to agree raises and names the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from gradshield_fast.capture import Site
from gradshield_fast.direction import Direction, Entry
from gradshield_fast.layers import make_rule, method_of
from gradshield_fast.layout import Layout
from gradshield_fast.matrix_rules import HeadRule, MatrixRule, SharedInput
from gradshield_fast.rule import Context
from gradshield_fast.universal import CHAIN, UniversalRule

Key = tuple[str, str]
FUSED = "fused head"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Plan:
    """Sites of every weight of a direction.

    Attributes:
        model: the model.
        direction: the direction.
        context: what the rules share.
        sites_of: weight's name -> the (module name, method) pairs that together cover its uses.
        known_layouts: what calibration saw, by site; None before.
        expected_uses: what calibration saw, by weight; None before.
        shared: weights whose layers were given the very same activation in calibration, in the order of their calls.
    """

    model: nn.Module
    direction: Direction
    context: Context
    sites_of: dict[str, list[Key]] = field(default_factory=dict)
    known_layouts: dict[Key, set[Layout]] | None = None
    expected_uses: dict[str, int] | None = None
    shared: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with the rule of each owning module's class."""
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        owners: dict[int, list[tuple[str, str]]] = {}
        seen: set[tuple[int, str]] = set()
        for name, module in self.modules.items():
            for local, weight in module._parameters.items():
                # one module reached by two names is one owner
                if weight is not None and (id(module), local) not in seen:
                    seen.add((id(module), local))
                    owners.setdefault(id(weight), []).append((name, local))
        self._owners = {name: owners[id(parameters[name])] for name in self.direction.names}
        self._parameters = {name: parameters[name] for name in self.direction.names}
        for name, places in self._owners.items():
            self.sites_of[name] = self._tidy(
                [self._callable(module, method_of(self.modules[module], local)) for module, local in places]
            )

    def _callable(self, module: str, method: str) -> Key:
        """Go up from containers, which are never called, to a module that is."""
        while module and isinstance(self.modules[module], CONTAINERS):
            module, method = module.rpartition(".")[0], CHAIN[0]
        return (module, method)

    @staticmethod
    def _tidy(keys: list[Key]) -> list[Key]:
        """Drop repeats, and sites inside the subtree of a universal site, which covers their uses."""
        keys = list(dict.fromkeys(keys))
        covers = [k for k in keys if k[1] in CHAIN]
        inside = {
            k for k in keys for c in covers if k != c and (k[0] == c[0] or c[0] == "" or k[0].startswith(c[0] + "."))
        }
        # two universal methods at one module: the later in the chain stays
        return [k for k in keys if k not in inside] or keys[-1:]

    def promote(self, weight: str, site: Key, *, same_module: bool) -> bool:
        """Replace one site of a weight by a more general one.

        Args:
            weight: the weight's name.
            site: the site that failed.
            same_module: try what is left of the universal rule's ways at the same module before its parent.

        Returns:
            Whether there was something more general left.
        """
        module, method = site
        ways = CHAIN if method not in CHAIN else CHAIN[CHAIN.index(method) + 1 :]
        if same_module and ways:
            new = (module, ways[0])
        elif module == "":
            return False
        else:
            new = self._callable(module.rpartition(".")[0], CHAIN[0])
        self.sites_of[weight] = self._tidy([new if key == site else key for key in self.sites_of[weight]])
        return True

    def next_method(self, site: Key) -> bool:
        """Move every weight of a site on to the next way of the universal rule, or to the parent after the last.

        Args:
            site: the site whose method an operator does not support.

        Returns:
            Whether there was something left for each.
        """
        return all_of([self.promote(weight, site, same_module=True) for weight in self.weights_at(site)])

    def fuse_head(self, name: str) -> str | None:
        """Let the fused loss score the output head's weight, where the direction has it.

        Args:
            name: the head's name in the model.

        Returns:
            The reason why it cannot, or None; the plan is changed only in the latter case.
        """
        around = [m for keys in self.sites_of.values() for m, method in keys if method in CHAIN and _inside(name, m)]
        if around:
            return f"weights are scored by the universal rule at '{around[0] or 'the model'}', which holds the head"
        weights = self.weights_at((name, "linear"))
        if weights and self._head_rule(weights[0]).mixed:
            return "some directions are dense on its weight and some low-rank"
        for weight in weights:
            self.sites_of[weight] = [(name, FUSED) if k == (name, "linear") else k for k in self.sites_of[weight]]
        return None

    def unfuse_head(self) -> None:
        """Take back what `fuse_head` changed."""
        for weight, keys in self.sites_of.items():
            self.sites_of[weight] = [(module, "linear" if method == FUSED else method) for module, method in keys]

    def head_rule(self) -> HeadRule | None:
        """Make the rule of the fused head's weight.

        Returns:
            The rule, or None where the head is not fused or the direction does not have its weight.
        """
        weights = [weight for weight, keys in self.sites_of.items() if any(method == FUSED for _, method in keys)]
        return self._head_rule(weights[0]) if weights else None

    def _head_rule(self, weight: str) -> HeadRule:
        rule = HeadRule(weight, self.entries(weight), self._parameters[weight].device, self.context)
        rule.tied = len(self.sites_of[weight]) > 1
        return rule

    @property
    def needs_rows(self) -> str | None:
        """Why a rule needs a row axis, which packed rows do not have, or None where every rule goes by positions."""
        general = [method for keys in self.sites_of.values() for _, method in keys if method in CHAIN]
        if "row_vjp" in general or (general and self.context.norms):
            return "some weights are scored by one vjp a row, which takes padded rows"
        return None

    def weights_at(self, site: Key) -> list[str]:
        """List the weights that a site scores.

        Args:
            site: its key.

        Returns:
            Their names.
        """
        return [weight for weight, keys in self.sites_of.items() if site in keys]

    def methods(self) -> dict[str, list[str]]:
        """Say which rule scores which weight, for the record of a run.

        Returns:
            "method @ module" of each use, by weight.
        """
        return {
            weight: [f"{method} @ {module or '(model)'}" for module, method in keys]
            for weight, keys in self.sites_of.items()
        }

    def entries(self, weight: str) -> list[Entry | None]:
        """Give a weight's entry in each direction.

        Args:
            weight: its name.

        Returns:
            One entry or None for each direction.
        """
        return [part.get(weight) for part in self.direction.parts]

    def sites(self, *, split: bool = False) -> list[Site]:
        """Build the sites with their rules.

        Args:
            split: give each weight of a universal site a rule of its own, so that its share can be told apart.

        Returns:
            One site for each module that the scorer listens to.
        """
        sites: dict[str, Site] = {}
        universal: dict[Key, dict[str, str]] = {}
        for weight, keys in self.sites_of.items():
            for module, method in keys:
                if method == FUSED:
                    continue
                site = sites.setdefault(module, Site(module, self.modules[module]))
                if method in CHAIN:
                    universal.setdefault((module, method), {})[weight] = self._local(weight, module)
                else:
                    device = self._parameters[weight].device
                    rule = make_rule(method, weight, self.entries(weight), device, self.context)
                    site.rules.setdefault((module, method), []).append(rule)
        for key, weights in universal.items():
            for group in [{weight: local} for weight, local in weights.items()] if split else [weights]:
                entries = {weight: self.entries(weight) for weight in group}
                rule = UniversalRule(key, self.modules[key[0]], group, entries, self.context)
                sites[key[0]].universals.append(rule)
        self._share(sites)
        return list(sites.values())

    def _share(self, sites: dict[str, Site]) -> None:
        """Let low-rank rules on one activation project it together."""
        rules: dict[str, list[MatrixRule]] = {}
        for site in sites.values():
            for group in site.rules.values():
                for rule in group:
                    if type(rule) is MatrixRule and rule.q is not None:
                        rules.setdefault(rule.weight, []).append(rule)
        for weights in self.shared:
            together = [rules[weight][0] for weight in weights if len(rules.get(weight, ())) == 1]
            if len(together) > 1 and len({rule.q.device for rule in together if rule.q is not None}) == 1:
                SharedInput(together)

    def _local(self, weight: str, module: str) -> str:
        """Name of a weight inside a module's subtree."""
        prefix = f"{module}." if module else ""
        for owner, local in self._owners[weight]:
            path = f"{owner}.{local}" if owner else local
            if path.startswith(prefix):
                return path[len(prefix) :]
        raise AssertionError(f"{weight} is not inside {module}")


def _inside(module: str, ancestor: str) -> bool:
    return ancestor in ("", module) or module.startswith(f"{ancestor}.")


def all_of(results: list[bool]) -> bool:
    """Say whether every one of several promotions was made; a list, since each must be tried whatever came before.

    Args:
        results: what each returned.

    Returns:
        Whether all are true.
    """
    return all(results)
