"""Iterative pruning end to end: nested masks, rewinding, and a killed run that ends as the unbroken one."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from prunus.masks import Masks
from prunus.prune import prune
from prunus.recipe.names import retrainings
from prunus.score.criteria import random
from prunus.soup.imp import Phase, distance, imp, phase_sparsities
from prunus.train.lr import Original
from prunus.train.train import Trace, train

ORIGINAL = Original.of([0.1] * 30 + [0.01] * 10)
STEPS = 6


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
        return nn.Sequential(*layers, nn.Linear(64, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(3, (16,), generator=generator)
    x = torch.randn(16, 1, 4, 4, generator=generator)
    return x + 2 * (torch.arange(16).view(1, 1, 4, 4) % 3 == y.view(-1, 1, 1, 1)), y


def loss(model: nn.Module, xy: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(xy[0]), xy[1])


def retrainer(model: nn.Module, name: str = "allr"):
    def retrain(phase: Phase) -> Trace:
        signals = phase.signals(STEPS, ORIGINAL)
        optimizer = torch.optim.SGD(model.parameters(), lr=ORIGINAL.peak, momentum=0.9, weight_decay=1e-3)
        schedule = retrainings.make(name, ORIGINAL, STEPS, distance=signals.distance, share=signals.share)
        return train(model, batch, optimizer, schedule, steps=STEPS, loss=loss, masks=phase.masks)

    return retrain


def select(model: nn.Module, sparsity: float, within: Masks | None) -> Masks:
    return prune(model, sparsity=sparsity, within=within)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_phases_reach_their_sparsities_and_pruned_weights_stay_pruned():
    model, seen, distances = network(), [], []

    def measured(model: nn.Module, sparsity: float, within: Masks | None) -> Masks:
        before = state(model)
        masks = select(model, sparsity, within)
        distances.append(distance(before, masks, within))
        return masks

    def watch(phase: Phase, trace: Trace) -> None:
        phase.masks.check(model)
        seen.append((phase, trace))

    masks = imp(model, sparsity=0.9, phases=3, select=measured, retrain=retrainer(model), on_phase=watch)
    total = 36 + 192
    assert [phase.index for phase, _ in seen] == [0, 1, 2]
    assert [round(phase.masks.sparsity * total) for phase, _ in seen] == [
        round(sparsity * total) for sparsity in phase_sparsities(0.9, 3)
    ]
    for (earlier, _), (later, _) in itertools.pairwise(seen):
        assert not any((later.masks[name] & ~earlier.masks[name]).any() for name in masks)
    assert masks == seen[-1][0].masks
    masks.check(model)
    assert [phase.distance for phase, _ in seen] == distances
    for phase, trace in seen:
        assert 0 < phase.distance < 1
        assert max(trace.lrs) == pytest.approx(0.1 * max(phase.distance, STEPS / 40))
    assert not torch.equal(model[0].weight, network()[0].weight)


@pytest.mark.parametrize("killed", [1, 2])
@pytest.mark.parametrize("where", ["retrain", "on_phase"])
def test_a_killed_run_ends_as_the_unbroken_one(tmp_path: Path, killed: int, where: str):
    def run(kill: int | None, folder: Path | None) -> tuple[nn.Module, Masks, list[int]]:
        model, started = network(), []
        work = retrainer(model)

        def die(phase: Phase, here: str) -> None:
            if phase.index == kill and where == here:
                raise KeyboardInterrupt

        def retrain(phase: Phase) -> Trace:
            started.append(phase.index)
            trace = work(phase)
            die(phase, "retrain")  # after its weights have changed
            return trace

        masks = imp(
            model,
            sparsity=0.8,
            phases=3,
            select=select,
            retrain=retrain,
            on_phase=lambda phase, trace: die(phase, "on_phase"),
            folder=folder,
        )
        return model, masks, started

    torch.manual_seed(3)  # dropout draws from torch's own generator
    whole, masks, started = run(None, None)
    assert started == [0, 1, 2]
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path)
    torch.manual_seed(99)
    resumed, again, started = run(None, tmp_path)
    assert started == list(range(killed, 3))
    assert again == masks
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(resumed).values(), strict=True))
    finished, again, started = run(None, tmp_path)
    assert (started, again == masks) == ([], True)
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(finished).values(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["phases.safetensors"]


def test_a_folder_of_another_job_is_refused(tmp_path: Path):
    model = network()
    imp(model, sparsity=0.8, phases=1, select=select, retrain=lambda phase: Trace(), folder=tmp_path)
    for sparsity, other in ((0.7, network()), (0.8, nn.Sequential(nn.Linear(4, 4)))):
        with pytest.raises(ValueError, match="belongs to another job or model"):
            imp(other, sparsity=sparsity, phases=1, select=select, retrain=lambda phase: Trace(), folder=tmp_path)


def test_a_folder_of_other_weights_is_refused(tmp_path: Path):
    early = state(network())
    later = {name: value + 1 for name, value in early.items()}

    def go(start: dict[str, torch.Tensor], rewind: dict[str, torch.Tensor] | None) -> None:
        model = network_with(start)
        how = {"sparsity": 0.8, "phases": 1, "select": select, "folder": tmp_path, "rewind": rewind}
        imp(model, retrain=lambda phase: Trace(), **how)

    go(early, early)
    go(early, early)
    for start, rewind in ((later, early), (early, later), (early, None)):
        with pytest.raises(
            ValueError, match=r"belongs to another job or model: .*'weights'.* build that one anew, and"
        ):
            go(start, rewind)


def test_rewinding_sets_surviving_weights_back_before_each_phase():
    model = network()
    early = state(model)
    train(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), lambda step: 1.0, steps=10, loss=loss)
    trained, starts = state(model), []

    def retrain(phase: Phase) -> Trace:
        starts.append((phase, state(model)))
        return retrainer(model, "lrw")(phase)

    imp(model, sparsity=0.8, phases=2, select=select, retrain=retrain, rewind=early)
    for phase, start in starts:
        for name, value in start.items():
            expected = early[name] * phase.masks[name] if name in phase.masks else early[name]
            assert torch.equal(value, expected), name
    kept = starts[0][0].masks["5.weight"]
    chosen = prune(network_with(trained), sparsity=phase_sparsities(0.8, 2)[0])
    assert torch.equal(kept, chosen["5.weight"])  # chosen by the trained weights, not by those rewound to


def network_with(tensors: dict[str, torch.Tensor]) -> nn.Module:
    model = network()
    model.load_state_dict(tensors)
    return model


def test_a_rewind_of_another_model_is_refused_at_once():
    def never(*_: object) -> Masks:
        raise AssertionError

    for rewind, message in (
        ({"x": torch.ones(1)}, "which is not in the model"),
        ({"5.bias": torch.ones(2)}, "which has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            imp(network(), sparsity=0.5, phases=1, select=never, retrain=lambda phase: Trace(), rewind=rewind)


def test_a_selection_that_gives_weights_back_is_refused():
    seeds = itertools.count()

    def forgetful(model: nn.Module, sparsity: float, within: Masks | None) -> Masks:
        return prune(model, random(next(seeds)), sparsity=sparsity)

    with pytest.raises(ValueError, match=r"gave weights of '0.weight' back .* within=masks"):
        imp(network(), sparsity=0.8, phases=3, select=forgetful, retrain=lambda phase: Trace())


def test_a_retraining_that_moves_pruned_weights_is_refused():
    model = network()

    def careless(phase: Phase) -> Trace:
        nn.init.ones_(model[0].weight)
        return Trace()

    with pytest.raises(ValueError, match="nonzero weights under its mask"):
        imp(model, sparsity=0.8, phases=1, select=select, retrain=careless)
