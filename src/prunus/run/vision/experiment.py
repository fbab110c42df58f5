"""One classifier run from end to end: dense or during a method, pruned, retrained, measured at every turn.

    dense ─▶ [ prune ─▶ retrain ] * phases ─▶ settle, measure   a method during training takes the place of the first
          ─▶ smaller network ─▶ retrain ─▶ settle, measure      where filters go or ranks fall

A killed run with a work folder goes on: the training from its checkpoint, the phases from the last finished one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunus.data import CORRUPTIONS
from prunus.machine import read_json, write_json
from prunus.masks import Masks
from prunus.measure import weight_change
from prunus.run.names import methods
from prunus.run.recipe import ClassifierPrune, ClassifierRecipe, ClassifierRetrain
from prunus.run.vision import stages
from prunus.run.vision.dense import Dense, dense, losses_by_epoch
from prunus.run.vision.setting import Setting
from prunus.run.vision.smaller import Smaller, smaller
from prunus.soup import Phase, distance, imp, phase_sparsities
from prunus.train import During, Original, Trace

__all__ = ["Outcome", "experiment", "finished", "method_of"]

Bar = Callable[[str, int], AbstractContextManager[Any]]
Watch = Callable[[nn.Module, During | None], list[During]]


@dataclass(frozen=True)
class Outcome:
    """A finished run: the network, its masks (None when dense), its numbers.

    trace: learning rates as runs and losses by epoch of a training during which a method pruned; a dense training
    leaves them in its folder.
    """

    model: nn.Module
    masks: Masks | None
    result: dict[str, Any]
    trace: Mapping[str, Any] = field(default_factory=dict[str, Any])


def experiment(
    setting: Setting,
    dense_folder: Path,
    *,
    work: Path | None = None,
    bar: Bar = lambda _name, _steps: nullcontext(),
    watch: Watch = lambda _model, _method: [],
) -> Outcome:
    """Run a recipe; its dense training is read from `dense_folder`, or done and written there.

    work: a folder in which a killed run goes on. bar: (what, steps) -> a context that shows how far it is.
    watch: (network, method) -> what else looks at the network while it is trained.
    """
    notes = _Notes.read(work / "notes.json" if work is not None else None)
    return _Experiment(setting, dense_folder, work, bar, watch, notes).run()


@dataclass
class _Experiment:
    setting: Setting
    dense_folder: Path
    work: Path | None
    bar: Bar
    watch: Watch
    notes: _Notes
    reached: float | None = None
    small: Smaller | None = None
    trace: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def recipe(self) -> ClassifierRecipe:
        return self.setting.recipe

    def run(self) -> Outcome:
        started = time.perf_counter()
        before: Mapping[str, Tensor] | None = None
        masks: Masks | None = None
        if self.recipe.during is not None:
            model, phase, original = self._during(self.recipe.during)
            masks = phase.masks
            if self.recipe.retrain is not None:
                self._retrain_under(model, phase, original, self.recipe.retrain)
        else:
            found = self._dense()
            model, before = self.setting.new_model(), found.state
            model.load_state_dict(dict(found.state))
            if self.recipe.prune is not None and self.recipe.prune.kind == "zeros":
                masks = self._phases(model, found, self.recipe.prune)
            elif self.recipe.prune is not None:
                self.small = smaller(model, self.setting, self.recipe.prune, self.recipe.seed)
                model = self.small.model
                self._retrain_smaller(self.small, found.original, self.recipe.retrain)
        self._settle(model)
        result = self._result(model, masks, before) | self._corrupted(model)
        return Outcome(model, masks, result | {"seconds": time.perf_counter() - started}, self.trace)

    def _dense(self) -> Dense:
        steps = self.setting.steps(self.recipe.train.epochs)
        with self.bar("train", steps) as advance:
            found = dense(
                self.setting,
                self.dense_folder,
                checkpoint=self._checkpoint("dense"),
                on_step=_reports(advance),
                watch=lambda model: self.watch(model, None),
            )
        self.notes.stage("dense", {k: v for k, v in self._measured(found).items() if k not in ("key", "seconds")})
        self.notes.count("dense", int(found.metrics["steps"]), float(found.metrics["seconds"]))
        return found

    def _measured(self, found: Dense) -> Mapping[str, Any]:
        """The dense network's numbers, measured anew if it was measured on other images than this recipe is."""
        measured = self.recipe.images.measured
        if found.metrics.get("measured_on", measured) == measured:
            return found.metrics
        model = self.setting.new_model()
        model.load_state_dict(dict(found.state))
        return {**found.metrics, **stages.measure(model, self.setting), "measured_on": measured}

    def _during(self, asked: Mapping[str, Mapping[str, Any]]) -> tuple[nn.Module, Phase, Original]:
        """A network trained while a method prunes it."""
        setting, prune = self.setting, self.recipe.prune
        assert prune is not None
        name, options = next(iter(asked.items()))
        method = method_of(name, options, prune.sparsity, self.recipe.seed)
        model = setting.new_model()
        multiplier, warmup = stages.schedule(setting)
        steps = setting.steps(self.recipe.train.epochs)
        with self.bar(name, steps) as advance:
            trace = stages.fit(
                model,
                setting,
                multiplier,
                steps=steps,
                part=0,
                during=[method, *self.watch(model, method)],
                views=stages.views_of(model, prune),
                checkpoint=self._checkpoint(name),
                on_step=_reports(advance),
            )
        self.notes.count(name, len(trace.losses), trace.seconds)
        masks, lost = finished(method, name, model)
        alone = dict(method.named_buffers()).get("reached")
        self.reached = None if alone is None else float(alone)
        self._measure_pruned(model)
        original = Original.of(trace.lrs, warmup)
        self.trace = {"lrs": original.runs(), "losses": losses_by_epoch(trace.losses, setting.epoch_steps)}
        return model, Phase(0, 1, prune.sparsity, masks, lost), original

    def _phases(self, model: nn.Module, found: Dense, asked: ClassifierPrune) -> Masks:
        """Prune and retrain, phase by phase."""
        retrain = self.recipe.retrain
        steps = [] if retrain is None else self._budgets(retrain, asked.phases, found.original)
        rewind = found.snapshot(retrain.rewind) if retrain is not None and retrain.rewind is not None else None

        def retrained(phase: Phase) -> Trace:
            if phase.index + 1 == phase.count:
                self._measure_pruned(model)
            if retrain is None:
                self.notes.phase(phase, {})
                return Trace()
            return self._retrain(model, phase, found.original, retrain, steps[phase.index])

        seeds = {target: index for index, target in enumerate(phase_sparsities(asked.sparsity, asked.phases))}
        masks = imp(
            model,
            sparsity=asked.sparsity,
            phases=asked.phases,
            select=lambda network, sparsity, within: stages.select(
                network, sparsity, within, asked, self.recipe.seed + 7919 * seeds[sparsity], setting=self.setting
            ),
            retrain=retrained,
            rewind=rewind,
            folder=self.work / "phases" if self.work is not None and retrain is not None else None,
        )
        if retrain is not None:
            self.notes.stage("retrained", stages.measure(model, self.setting))
        return masks

    def _retrain(
        self, model: nn.Module, phase: Phase, original: Original, asked: ClassifierRetrain, steps: int
    ) -> Trace:
        signals = phase.signals(steps, original)
        multiplier = asked.multiplier(original, steps, signals.distance)
        peak = asked.lr or original.peak
        if phase.index and (last := self._checkpoint(f"phase-{phase.index - 1}")) is not None:
            last.unlink(missing_ok=True)  # the file of the phases goes further
        with self.bar(f"retrain {phase.index + 1}/{phase.count}", steps) as advance:
            trace = stages.fit(
                model,
                self.setting,
                multiplier,
                steps=steps,
                part=phase.index + 1,
                lr=peak,
                masks=phase.masks or None,
                checkpoint=self._checkpoint(f"phase-{phase.index}"),
                on_step=_reports(advance),
            )
        self.notes.count(f"phase-{phase.index}", len(trace.losses), trace.seconds)
        begun = {"initial_lr": signals.start * peak if asked.schedule == "allr" else max(trace.lrs)}
        self.notes.phase(
            phase, {"share": signals.share, **begun, "steps": steps, "epochs": steps / self.setting.epoch_steps}
        )
        return trace

    def _retrain_under(self, model: nn.Module, phase: Phase, original: Original, asked: ClassifierRetrain) -> None:
        """Retrain what a method left, under its masks."""
        (steps,) = self._budgets(asked, 1, original)
        self._retrain(model, phase, original, asked, steps)
        self.notes.stage("retrained", stages.measure(model, self.setting))

    def _retrain_smaller(self, small: Smaller, original: Original, asked: ClassifierRetrain | None) -> None:
        """Measure a network that became smaller, and retrain it: there are no masks to hold."""
        self._measure_pruned(small.model)
        phase = Phase(0, 1, small.sparsity, Masks({}), small.distance)
        if asked is None:
            self.notes.phase(phase, {})
            return
        (steps,) = self._budgets(asked, 1, original)
        self._retrain(small.model, phase, original, asked, steps)
        self.notes.stage("retrained", stages.measure(small.model, self.setting))

    def _measure_pruned(self, model: nn.Module) -> None:
        """Measure as it is, then with BatchNorm statistics counted anew; those stay in the network."""
        self.notes.stage("pruned", stages.measure(model, self.setting))
        if self.recipe.recalibrate and stages.has_batchnorm(model):
            stages.recalibrate(model, self.setting)
            self.notes.stage("recalibrated", stages.measure(model, self.setting))

    def _settle(self, model: nn.Module) -> None:
        """Count BatchNorm statistics anew where training came last: every row of a comparison ends alike."""
        if self.notes.last() != "recalibrated" and stages.settle(model, self.setting):
            self.notes.stage("settled", stages.measure(model, self.setting))

    def _corrupted(self, model: nn.Module) -> dict[str, Any]:
        asked = self.recipe.corruptions
        if asked is None:
            return {}
        with self.bar("corruptions", len(asked.names or CORRUPTIONS) * len(asked.severities)) as advance:
            return {"corrupted": stages.corrupted(model, self.setting, asked, advance)}

    def _budgets(self, asked: ClassifierRetrain, phases: int, original: Original) -> list[int]:
        return asked.budgets(phases, original.steps, self.setting.epoch_steps)

    def _checkpoint(self, name: str) -> Path | None:
        return None if self.work is None else self.work / f"{name}.pt"

    def _result(self, model: nn.Module, masks: Masks | None, before: Mapping[str, Tensor] | None) -> dict[str, Any]:
        notes = self.notes
        last = notes.stages[notes.last()]
        steps, seconds = sum(s for s, _ in notes.trained.values()), sum(s for _, s in notes.trained.values())
        result: dict[str, Any] = {"accuracy": last["top1"], **{k: last[k] for k in last if k in _KEPT}}
        result |= {
            "measured_on": self.recipe.images.measured,
            "stages": notes.stages,
            "phases": list(notes.phases.values()),
        }
        result |= {"sparsity": 0.0 if masks is None else masks.sparsity}
        result |= {"epochs": steps / self.setting.epoch_steps, "steps": steps, "train_seconds": seconds}
        result["images_per_second"] = steps * self.recipe.train.batch_size / max(seconds, 1e-9)
        if self.reached is not None:  # by the method itself, before it was brought to the sparsity asked for
            result["reached"] = self.reached
        if self.small is not None:
            result |= {**self.small.cost, "sparsity": self.small.sparsity, "by_layer": dict(self.small.by_layer)}
            result["left_alone"] = dict(self.small.left_alone)
        if masks is not None:
            result |= stages.cost_of(model, masks, self.setting)
            result["by_layer"] = {name: 1 - kept / total for name, (kept, total) in masks.table().items()}
            if before is not None:
                after = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
                result["weight_change"] = weight_change({name: before[name] for name in after}, after)
        return result


_STAGES = ("dense", "pruned", "recalibrated", "retrained", "settled")
_KEPT = ("top5", "loss", "calibration_error", "maximum_calibration_error", "worst_class", "images")


@dataclass
class _Notes:
    """What was measured so far, in a file that a resumed run reads."""

    path: Path | None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    phases: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    trained: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])  # steps, seconds

    @classmethod
    def read(cls, path: Path | None) -> _Notes:
        if path is None or not path.exists():
            return cls(path)
        return cls(path, **read_json(path))

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, {"stages": self.stages, "phases": self.phases, "trained": self.trained})

    def stage(self, name: str, found: Mapping[str, Any]) -> None:
        self.stages[name] = dict(found)
        self.write()

    def last(self) -> str:
        """The name of the last stage that was measured."""
        return next(name for name in reversed(_STAGES) if name in self.stages)

    def phase(self, phase: Phase, more: Mapping[str, Any]) -> None:
        sparsity = phase.masks.sparsity if phase.masks else phase.sparsity
        row = {"phase": phase.index + 1, "sparsity": sparsity, "distance": phase.distance}
        self.phases[str(phase.index)] = row | dict(more)
        self.write()

    def count(self, name: str, steps: int, seconds: float) -> None:
        self.trained[name] = (steps, seconds)
        self.write()


def method_of(name: str, options: Mapping[str, Any], sparsity: float, seed: int) -> During:
    """The method, with the run's seed if it takes one."""
    return methods.make({name: dict(options)}, sparsity, seed=seed)


def finished(method: During, name: str, model: nn.Module) -> tuple[Masks, float]:
    """The masks that a method leaves after its training, in the weights too, and what its end took away, for ALLR."""
    own = dict(model.named_parameters()) | method.weights()
    before = {key: weight.detach().clone() for key, weight in own.items()}
    masks = method.finish()
    if masks is None:
        raise ValueError(f"during.{name}: this method leaves no masks, so nothing was pruned")
    masks.check(model)
    return masks, distance(before, masks)


def _reports(advance: Any) -> stages.OnStep | None:
    return None if advance is None else lambda done, _loss: advance.to(done)
