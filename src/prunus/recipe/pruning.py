"""Which weights go: the section `prune` of either task, and methods that prune while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, model_validator

from prunus.patterns import Pattern, check_sparsity
from prunus.recipe.names import (
    AllocationName,
    CriterionName,
    PatternName,
    allocations,
    criteria,
    fixed_sparsity,
    methods,
    pattern_of,
)
from prunus.recipe.plain import Strict
from prunus.recipe.values import Count, Globs
from prunus.score import Allocation, Criterion, allocation_of, check_comparable, compared, criterion_of, global_
from prunus.soup import Ramp, phase_sparsities

__all__ = ["ClassifierPrune", "Kind", "MethodName", "Prune", "check_during"]

Kind = Literal["zeros", "filters", "low_rank"]


class Prune(Strict):
    """Which weights go: a criterion, a pattern, and a sparsity (the share of zeros, in [0, 1)), in how many phases."""

    criterion: CriterionName = "admm"
    """How weights are scored, or layers solved."""
    pattern: PatternName = "unstructured"
    """unstructured, N:M (at most N nonzeros of M) such as 2:4, block RxC, filters."""
    sparsity: float = 0.5
    """Share of zeros, in [0, 1)."""
    scope: Literal["row", "layer", "model"] | None = None
    """Which scores compete."""
    allocation: AllocationName = "uniform"
    """How many weights each layer keeps."""
    phases: Count = 1
    """Prune and retrain that many times."""
    ramp: Ramp = "geometric"
    """How the sparsity rises over the phases: geometric or cubic."""
    include: Globs = ()
    """Globs of layers: only these are pruned."""
    exclude: Globs = ()
    """Globs of layers that stay dense."""

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, value: Any) -> Any:
        """An N:M pattern says its own sparsity; by it, a scope or another kind every layer keeps alike."""
        if not isinstance(value, dict):
            return value
        fixed = fixed_sparsity(value)
        alike = fixed is not None or value.get("scope") is not None or value.get("kind", "zeros") != "zeros"
        implied = ({} if fixed is None else {"sparsity": fixed}) | ({"allocation": "uniform"} if alike else {})
        return implied | value

    @model_validator(mode="after")
    def _check(self) -> Prune:
        pattern, criterion, allocation = pattern_of(self.pattern), self.how(), self.sharing()
        check_sparsity(pattern, self.sparsity)
        if self.scope == "model" and allocations.make(self.allocation).reads:
            raise ValueError("scope 'model' is an allocation already: leave out allocation")
        asked = [key for key in ("scope", "allocation", "phases") if getattr(self, key) not in (None, "uniform", 1)]
        if pattern.sparsity is not None and asked:
            raise ValueError(f"pattern {self.pattern!r} fixes the share of zeros in every group: leave out {asked[0]}")
        check_comparable(criterion, allocation)
        if not criterion.stays and self.phases > 1:
            raise ValueError(
                f"{criterion.name} cannot stay within the masks of an earlier phase: leave out phases, or take a "
                "criterion with a score"
            )
        if allocation.reads == "loss" and self.phases > 1:
            raise ValueError(f"{allocation.name} solves whole layers, and later phases have none: leave out phases")
        if allocation.reads == "inputs":
            self._check_targets(allocation)
        return self

    def how(self, seed: int = 0) -> Criterion:
        """The criterion; seed: of one that draws, unless the recipe gives it its own."""
        return criterion_of(criteria.make(self.criterion, seed=seed))

    def sharing(self) -> Allocation:
        """The allocation; scope model is that of one selection over all layers."""
        return allocation_of(global_ if self.scope == "model" else allocations.make(self.allocation))

    def where(self) -> Pattern:
        """The pattern, with the scope that is asked for, or that the criterion and the allocation imply."""
        own = compared(self.how(), self.sharing()) if self.scope is None else self.scope
        return pattern_of(self.pattern, "row" if own == "row" else "layer")

    def _check_targets(self, allocation: Allocation) -> None:
        """Refuse sparsities that the allocation cannot spread, before anything is measured for it."""
        for sparsity in phase_sparsities(self.sparsity, self.phases, self.ramp):
            allocation({"layer": torch.ones(1, 8)}, sparsity)


class ClassifierPrune(Prune):
    """The same with what is usual for classifiers, and what becomes of the network.

    kind: "zeros" leaves a network of the same size, sparsity being the share of zeros; "filters" removes that share of
    the filters, of each layer (allocation uniform) or of all (global); "low_rank" decomposes layers, dropping that
    share of the ranks of each (uniform) or of the weights of all (global).
    """

    criterion: CriterionName = "magnitude"
    sparsity: float = 0.9
    allocation: AllocationName = "global"
    kind: Kind = "zeros"
    """Of classifiers: what becomes of the network, zeros or a smaller one."""
    ranking: Literal["norms", "taylor"] = "norms"
    """Of filters: by norms of their scores, or by what the loss would change by without them."""

    @model_validator(mode="after")
    def _check_kind(self) -> ClassifierPrune:
        if self.ranking == "taylor" and (self.kind != "filters" or self.criterion != "magnitude"):
            strange = "prune.criterion" if self.kind == "filters" else "prune.ranking, or set prune.kind: filters"
            raise ValueError(f"ranking taylor is of filters, by the loss alone: leave out {strange}")
        if self.kind == "zeros":
            return self
        criterion = self.how()
        fixed = {"pattern": "unstructured", "phases": 1, "scope": None}
        fixed |= {"criterion": "magnitude"} if self.kind == "low_rank" else {}
        strange = [key for key, value in fixed.items() if getattr(self, key) != value]
        if strange:
            raise ValueError(f"kind {self.kind} makes the network smaller at once: leave out {strange[0]}")
        if self.kind == "filters" and (criterion.score is None or criterion.needs):
            raise ValueError(
                f"kind filters ranks them by the scores of their weights, and {criterion.name} "
                + ("has none" if criterion.score is None else "needs what layers receive")
                + ": take a criterion of weights alone, such as magnitude"
            )
        if self.allocation not in ("uniform", "global"):
            raise ValueError(f"kind {self.kind} knows the allocations uniform and global; got {self.allocation!r}")
        return self


def _during(value: Any) -> Any:
    """One method by name with the options that its class takes."""
    if value is None:
        return None
    choice = methods.check(value)
    return {choice: {}} if isinstance(choice, str) else choice


MethodName = Annotated[
    dict[str, dict[str, Any]] | None,
    BeforeValidator(_during, json_schema_input_type=str | dict[str, dict[str, Any] | None] | None),
]


def _is_set(section: BaseModel, key: str) -> bool:
    return getattr(section, key) != type(section).model_fields[key].default


def check_during(
    during: Mapping[str, Mapping[str, Any]],
    prune: Prune,
    own: Sequence[str],
    others: Sequence[str] = (),
    *,
    decay: float,
) -> None:
    """Refuse what a method chooses itself, the keys `own` of prune and others; a pattern, where it knows none; what it
    does not take, by making it; and a penalty that stands for a weight decay of 0."""
    found = [*others, *(f"prune.{key}" for key in own if _is_set(prune, key))]
    if found:
        raise ValueError(f"{found[0]}: a method that prunes during training chooses itself; leave it out")
    name, options = next(iter(during.items()))
    if "pattern" in options:
        raise ValueError(f"during.{name}.pattern: a run says it of its model, too: set prune.pattern in place of it")
    knows = methods.knows(name, "pattern")
    if _is_set(prune, "pattern") and not (knows and isinstance(prune.pattern, str)):
        raise ValueError(f"prune.pattern: {name} prunes single entries; leave it out")
    if not decay and methods.knows(name, "mu") and options.get("mu") is None:
        raise ValueError(
            f"during.{name}: its penalty is the weight decay, and train.weight_decay is 0: give it, or during.{name}.mu"
        )
    try:
        methods.make({name: dict(options)}, prune.sparsity, pattern=prune.pattern)
    except TypeError as error:
        raise ValueError(f"during.{name}: {error}") from None
