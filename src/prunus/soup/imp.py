"""Iterative pruning: prune a little, retrain, and again; its arithmetic, and the loop itself.

    s_j = 1 - (1 - s)^(j / J)        sparsity after phase j of J: each prunes the same share of what is left
    d1  = ||W - W^p|| / (||W|| * sqrt(p))    how much a phase's pruning took away, ALLR's first signal

`imp` only calls: how weights are chosen is its `select` (see `prune.prune`), how they are retrained its `retrain` (see
`train.train`, with a schedule of `lr`). With a folder, phases that are finished are not repeated.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from prunus.machine import checksum, random_state, ranks, read_tensors, set_random_state, write_tensors
from prunus.masks import Masks, own_name, unwrapped
from prunus.patterns import kept_of

if TYPE_CHECKING:
    from prunus.train import During, Original, Trace

Select = Callable[[nn.Module, float, Masks | None], Masks]
Ramp = Literal["geometric", "cubic"]

CHANGED = "A call that was stopped has changed its model: build that one anew, and call again"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distance:
    """ALLR's two signals: `distance` is d1, what pruning took away; `share` d2, retraining steps by dense steps.

    >>> Distance(0.3, 0.1).start
    0.3
    """

    distance: float
    share: float

    @property
    def start(self) -> float:
        """The initial learning rate in units of the dense run's peak: min(1, max(d1, d2))."""
        return min(1.0, max(self.distance, self.share))


@dataclass(frozen=True)
class Phase:
    """One prune-retrain phase, as `retrain` receives it, the model being pruned.

    index: from 0; count: phases in all; sparsity: the target of this phase; masks: those to train under; distance: d1.
    """

    index: int
    count: int
    sparsity: float
    masks: Masks
    distance: float

    def signals(self, steps: int, original: Original) -> Distance:
        """ALLR's signals when this phase is retrained for `steps` steps."""
        return Distance(self.distance, min(1.0, steps / original.steps))


def phase_sparsities(sparsity: float, phases: int, ramp: Ramp = "geometric") -> list[float]:
    """The sparsity after each phase; the last is exactly s.

        geometric   1 - (1 - s)^(j / J)     each phase prunes the same share of the weights that remain
        cubic       s - s (1 - j / J)^3     most in the first, when there is most to spare (Zhu & Gupta 2017)

    Counts are taken from these absolute targets, not phase by phase, so that rounding does not drift.
    Raises ValueError for a sparsity outside [0, 1) or phases < 1.

    >>> [round(value, 7) for value in phase_sparsities(0.9, 3)]
    [0.5358411, 0.7845565, 0.9]
    >>> [round(value, 7) for value in phase_sparsities(0.9, 3, "cubic")]
    [0.6333333, 0.8666667, 0.9]
    """
    kept_of(0, sparsity)
    _check_phases(phases)
    shares = [phase / phases for phase in range(1, phases)]
    if ramp == "cubic":
        return [sparsity - sparsity * (1 - share) ** 3 for share in shares] + [sparsity]
    return [1 - (1 - sparsity) ** share for share in shares] + [sparsity]


def split_steps(total: int, phases: int) -> list[int]:
    """A budget of steps or epochs split over phases: the same number for each, the remainder to the last.

    Raises ValueError for phases < 1 or a total that leaves a phase nothing, unless the total is 0.

    >>> split_steps(11, 3)
    [3, 3, 5]
    """
    _check_phases(phases)
    if total < 0 or 0 < total < phases:
        raise ValueError(f"{total} steps cannot be split over {phases} phases: raise the budget, or use fewer phases.")
    each, rest = divmod(total, phases)
    return [each] * (phases - 1) + [each + rest]


def bimp_budget(total_steps: int, dense_steps: int, phases: int) -> list[int]:
    """The retraining steps of each phase when dense training and all phases share one total (BIMP, Zimmer et al. 2023).

    Raises ValueError when the dense run leaves nothing to retrain with, and as `split_steps`.

    >>> bimp_budget(100, 60, 3)
    [13, 13, 14]
    """
    if not 0 < dense_steps < total_steps:
        raise ValueError(
            f"BIMP needs 0 < dense steps < total steps; got {dense_steps} of {total_steps}: leave some for retraining."
        )
    return split_steps(total_steps - dense_steps, phases)


@torch.no_grad()
def finish(method: During, model: nn.Module) -> tuple[Masks, float]:
    """The masks that a method leaves after its training, in the weights too, and what its end took away, for ALLR.

    Raises ValueError for a method that leaves none.

    >>> masks, lost = finish(GMP(0.9), model)
    """
    own = {own_name(name): weight for name, weight in model.named_parameters()} | method.weights()
    before = {name: weight.detach().clone() for name, weight in own.items()}
    masks = method.finish()
    if masks is None:
        raise ValueError(f"{type(method).__name__} leaves no masks, so nothing was pruned")
    masks.check(model)
    return masks, distance(before, masks)


@torch.no_grad()
def distance(before: Mapping[str, Tensor], masks: Masks, within: Masks | None = None) -> float:
    """d1 = ||W - W^p|| / (||W|| * sqrt(p)), p the share that this pruning removed of what was left.

    before: parameter name -> weights just before it; masks: the new ones; within: those of the phase before. Pruning by
    magnitude removes at most the share p of the energy, so d1 <= 1, and 1 when all magnitudes are equal; other criteria
    can exceed 1. It is 0 when nothing was removed.

    Source: ALLR (Zimmer et al. 2023). The removed energy is summed up itself, in float64, over the masked parameters
    only; the authors' code subtracts two float32 norms over all parameters, biases and norms included.

    >>> distance({"weight": torch.tensor([3.0, 1.0])}, Masks({"weight": torch.tensor([True, False])}))
    0.4472135954999579
    """
    energy = lost = 0.0
    left = removed = 0
    for name, mask in masks.items():
        weight = before[name].detach()
        alive = torch.ones_like(mask) if within is None or name not in within else within[name].to(mask.device)
        gone = alive & ~mask
        squares = weight.double().square()
        energy += float(squares[alive.to(weight.device)].sum())
        lost += float(squares[gone.to(weight.device)].sum())
        left += int(alive.sum())
        removed += int(gone.sum())
    if removed == 0 or lost == 0:
        return 0.0
    return math.sqrt(lost / energy) / math.sqrt(removed / left)


def imp(
    model: nn.Module,
    *,
    sparsity: float,
    phases: int,
    select: Select,
    retrain: Callable[[Phase], Trace],
    rewind: Mapping[str, Tensor] | None = None,
    on_phase: Callable[[Phase, Trace], None] | None = None,
    folder: Path | None = None,
) -> Masks:
    """Prune and retrain in place, `phases` times, to exactly the sparsity that `select` gives the last; its masks.

    select: (model, sparsity, masks of the phase before or None) -> masks, as `prune` with `within` does it.
    retrain: trains the pruned model under `phase.masks`. It makes the optimizer, a fresh one each time unless the
        caller keeps one: `Masks.hold` zeroes its state where the new masks prune.
    rewind: parameter and buffer name -> values of an earlier step. What they name is set back to them, the pruned
        weights to zero, before each retraining (weight rewinding, Frankle et al. 2019).
    on_phase: called after each retraining; in a resumed run again for a phase that was killed while it ran.
    folder: keeps the state after the last finished phase, with torch's random state. A killed call that is repeated
        with the same weights goes on from there, and ends as the unbroken one if select and retrain, which are not
        compared, depend on model, phase and torch's generators alone.

    Source: Han et al. 2015; the sparsities of Zimmer et al. 2023.
    Raises ValueError for a sparsity outside [0, 1), phases < 1, a rewind that does not fit the model, a folder of
    another job, masks that give pruned weights back, and a retraining that moved pruned weights.

    >>> from prunus.train import Trace
    >>> model, select = nn.Linear(8, 4), lambda model, s, within: prune(model, sparsity=s, within=within)
    >>> imp(model, sparsity=0.75, phases=2, select=select, retrain=lambda phase: Trace())  # put train(...) there
    Masks(1 parameter, sparsity 0.7500)
    """
    targets = phase_sparsities(sparsity, phases)
    _check_rewind(model, rewind or {})
    store = None if folder is None else _Store.of(folder, model, rewind, sparsity=sparsity, phases=phases)
    done, masks = store.restore_(model) if store is not None else (0, None)
    for index in range(done, phases):
        before = {name: parameter.detach().clone() for name, parameter in unwrapped(model).named_parameters()}
        chosen = select(model, targets[index], masks)
        check_nested(chosen, masks)
        phase = Phase(index, phases, targets[index], chosen, distance(before, chosen, masks))
        del before
        _rewind_(model, rewind or {})
        chosen.apply_(model)
        _logger.info("Phase %d of %d: sparsity %.4f, distance %.4f.", index + 1, phases, targets[index], phase.distance)
        trace = retrain(phase)
        chosen.check(model)
        if on_phase is not None:
            on_phase(phase, trace)
        masks = chosen
        if store is not None:
            store.save(model, masks, index + 1)
    assert masks is not None
    return masks


class _Store:
    """The model and its masks after the last finished phase, in one file that is complete or absent."""

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path, self.job = path, dict(job)

    @classmethod
    def of(cls, folder: Path, model: nn.Module, rewind: Mapping[str, Tensor] | None, **asked: float) -> _Store:
        """The file of the job that begins with these weights; of several processes, with those of the main one."""
        weights = {"weights": checksum(model.state_dict()), "rewind": None if rewind is None else checksum(rewind)}
        return cls(Path(folder) / "phases.safetensors", asked | ranks.agree(weights))

    def save(self, model: nn.Module, masks: Masks, done: int) -> None:
        """Write the state after phase `done`; under several processes one writes, and all wait for it."""
        if ranks.is_main():
            tensors = {f"state:{name}": tensor.detach() for name, tensor in model.state_dict().items()}
            tensors |= {f"mask:{name}": mask for name, mask in masks.items()}
            tensors |= {f"random:{kind}": state for kind, state in random_state(model).items()}
            write_tensors(self.path, tensors, {"job": json.dumps(self.job), "done": str(done)})
        ranks.wait()

    def restore_(self, model: nn.Module) -> tuple[int, Masks | None]:
        """Phases done and their last masks, after the model took the weights of that time; (0, None) at a start.

        Raises ValueError for the file of another job or model, and for a damaged one.
        """
        if not self.path.exists():
            return 0, None
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "mask": {}, "random": {}}
        tensors, metadata = read_tensors(self.path)
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            parts[kind][name] = tensor
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        job = json.loads(metadata["job"])
        if job != self.job or shapes != {name: tensor.shape for name, tensor in parts["state"].items()}:
            raise ValueError(
                f"{self.path} belongs to another job or model: it has {job} and {len(parts['state'])} tensors, this "
                f"one {self.job} and {len(shapes)}. Delete it to start anew, or give this job a folder of its own. "
                f"{CHANGED}."
            )
        model.load_state_dict(parts["state"])
        set_random_state(parts["random"], model)
        _logger.info("Going on from %s after phase %s.", self.path, metadata["done"])
        return int(metadata["done"]), Masks(parts["mask"])


@torch.no_grad()
def _rewind_(model: nn.Module, rewind: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    for name, value in rewind.items():
        state[name].copy_(value)


def _check_rewind(model: nn.Module, rewind: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    for name, value in rewind.items():
        if name not in state or state[name].shape != value.shape:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is not in the model"
            raise ValueError(
                f"rewind has '{name}' of shape {tuple(value.shape)}, which {found}: rewind to an earlier state of the "
                "same model."
            )


def check_nested(masks: Masks, within: Masks | None) -> None:
    """Raise ValueError for masks that give weights back which those of the phase before pruned."""
    for name, earlier in (within or {}).items():
        later = masks.get(name)
        if later is None or bool((later & ~earlier.to(later.device)).any()):
            raise ValueError(
                f"select gave weights of '{name}' back that an earlier phase pruned: hand its third argument on, as in "
                "prune(..., within=masks)."
            )


def _check_phases(phases: int) -> None:
    if phases < 1:
        raise ValueError(f"Pruning takes at least 1 phase; got {phases}.")
