"""Laws of every method that prunes while training, found through `during.__all__`.

Exact sparsity, clean zeros, bits that survive a kill, steps that can be recorded as a CUDA graph.
"""

from __future__ import annotations

import copy
import doctest
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from prunus import during
from prunus.during.choose import keep_allocated, keep_global
from prunus.during.schedule import cubic, sparsity_after
from prunus.during.topology import exchange
from prunus.frankwolfe import SFW, ProximalSGD, k_support
from prunus.layers import View, find_layers
from prunus.masks import Masks
from prunus.patterns.selection import kept_of
from prunus.recipe.names import methods
from prunus.score import erk, global_, lamp, owl, uniform_plus
from prunus.score.allocations import uniform
from prunus.soup import distance, finish
from prunus.train.hooks import During, Plan, masks_by_magnitude
from prunus.train.train import classification_loss, train

# All but what learns no weights and takes one sparsity alone, which tests/papers/test_maskllm.py is for.
METHODS = [each.__name__ for each in methods.members().values() if each is not during.MaskLLM]
STEPS = 20
QUICK: dict[str, dict[str, Any]] = {  # what the defaults would not show in so few steps
    "RigL": {"delta": 4},
    "SET": {"delta": 6},
    "DPF": {"refresh": 3},
    "ELSA": {"interval": 4},
    "STR": {"init": -3.0},
    "CS": {"penalty": 1e-3},
    "DST": {"penalty": 1e-2},
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-3, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=5e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=5e-3),
}
loss = classification_loss()


def make_method(name: str, sparsity: float = 0.75, **changes: Any) -> During:
    return getattr(during, name)(sparsity, **(QUICK.get(name, {}) | changes))


def make_model(seed: int = 0) -> nn.Sequential:
    """285 prunable weights: a convolution, a transposed and an ordinary linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            Conv1D(12, 5),
            nn.Linear(12, 15),
        )
        nn.init.normal_(model[5].weight, std=0.3)
        return model


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def run(model: nn.Module, method: During, optimizer: str = "sgd", steps: int = STEPS, served=batches, **options: Any):
    made = OPTIMIZERS[optimizer](model.parameters())
    options = {"epoch_steps": 6, "loss": loss, "lr": lambda step: 1 - step / steps} | options
    train(model, served, made, steps=steps, during=[method], **options)
    return made


def prunable(model: nn.Module) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(view.parameter for view in find_layers(model))
    return {name: model.get_parameter(name).detach() for name in names}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_the_end_has_exactly_the_sparsity_asked_for(name, optimizer):
    for sparsity in (0.0, 0.37, 0.75):
        model, method = make_model(), make_method(name, sparsity)
        keys = list(model.state_dict())
        made = run(model, method, optimizer)
        masks = method.finish()
        weights = prunable(model)
        assert masks.keys() == weights.keys()
        total = sum(weight.numel() for weight in weights.values())
        assert sum(kept for kept, _ in masks.table().values()) == kept_of(total, sparsity)
        assert list(model.state_dict()) == keys
        for key, mask in masks.items():
            pruned = weights[key][~mask]
            assert not pruned.any(), f"{key} is not zero where its mask prunes"
            assert not pruned.signbit().any(), f"{key} has a negative zero"
            for value in made.state[model.get_parameter(key)].values():
                assert value.ndim == 0 or not value[~mask].any(), f"{key} has optimizer state where its mask prunes"


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_as_ever(name):
    """A method that prunes almost nothing learns what can be learnt: one batch by heart."""
    model = make_model()
    with torch.no_grad():
        before = loss(model, batches(0)).item()
    method = make_method(name, 0.01)
    run(model, method, steps=40, served=lambda step: batches(0), lr=lambda step: 1.0)
    method.finish()
    assert loss(model, batches(0)).item() < 0.5 * before


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_with_the_same_bits(name, tmp_path):
    def broken(step: int):
        if step == 13:
            raise KeyboardInterrupt
        return batches(step)

    whole, method = make_model(), make_method(name)
    run(whole, method)
    masks = method.finish()
    with pytest.raises(KeyboardInterrupt):
        run(make_model(), make_method(name), served=broken, checkpoint=tmp_path / "c.pt", save_seconds=0)
    resumed, again = make_model(seed=3), make_method(name)
    run(resumed, again, checkpoint=tmp_path / "c.pt")
    assert again.finish() == masks
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_run_can_be_finished_again(name, tmp_path):
    model, method = make_model(), make_method(name)
    run(model, method, checkpoint=tmp_path / "c.pt")
    masks = method.finish()
    again, later = make_model(seed=4), make_method(name)
    run(again, later, checkpoint=tmp_path / "c.pt", served=lambda step: pytest.fail("no batch is needed"))
    assert later.finish() == masks
    for key, value in prunable(model).items():
        assert torch.equal(value, prunable(again)[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_a_second_finish_changes_nothing(name):
    model, method = make_model(), make_method(name)
    run(model, method)
    masks, weights = method.finish(), copy.deepcopy(model.state_dict())
    assert method.finish() == masks
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_what_the_masks_of_the_training_prune_is_not_kept(name):
    model, method = make_model(), make_method(name)
    given = masks_by_magnitude(prunable(model), 0.5)
    run(model, method, masks=given)
    masks = method.finish()
    assert sum(kept for kept, _ in masks.table().values()) == kept_of(285, 0.75)
    assert masks == masks & given


@pytest.mark.parametrize("name", METHODS)
def test_a_sparsity_below_that_of_the_masks_of_the_training_is_refused_before_it(name):
    model = make_model()
    given = masks_by_magnitude(prunable(model), 0.5)
    with pytest.raises(ValueError, match="214 entries should stay, but earlier masks left only 143: raise"):
        run(model, make_method(name, 0.25), masks=given, served=lambda step: pytest.fail("no batch is needed"))


@pytest.mark.parametrize("name", METHODS)
def test_masks_of_another_model_are_refused(name):
    with pytest.raises(ValueError, match=r"'6.weight'.* \(12, 15\).* another model"):
        run(make_model(), make_method(name), masks=Masks({"6.weight": torch.ones(12, 15, dtype=torch.bool)}))


def uneven(model: nn.Module) -> Masks:
    """Masks that prune nearly all of the largest layer, which `uniform` would keep a quarter of, and nothing else."""
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}
    masks["6.weight"].flatten()[10:] = False
    return Masks(masks)


@pytest.mark.parametrize(
    "method",
    [
        during.GMP(0.75, allocation=uniform),
        during.GMP(0.75, allocation=uniform, variant="recover"),
        during.ELSA(0.75, interval=4),
        during.RigL(0.75, topology=uniform, delta=4),
        during.CS(0.75, init=-3.0),
        during.STR(0.75, exact=False),
    ],
)
def test_shares_of_layers_stay_within_the_masks_of_the_training(method):
    model = make_model()
    given = uneven(model)
    run(model, method, masks=given)
    masks = method.finish()
    assert masks == masks & given
    if getattr(method, "exact", True):
        assert sum(kept for kept, _ in masks.table().values()) == kept_of(285, 0.75)


def test_patterns_that_the_masks_of_the_training_leave_no_room_for_are_refused():
    model = nn.Sequential(nn.Linear(8, 3))
    given = Masks({"0.weight": torch.eye(8, dtype=torch.bool)[:3]})
    for method, said in [
        (during.ELSA(0.5, pattern="2:4"), "2:4 cannot keep 12 entries of '0' within the earlier masks"),
        (during.MaskLLM(0.5), "prune some of '0.weight' already: leave them out"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(model, method, masks=given, served=lambda step: pytest.fail("no batch is needed"))


@pytest.mark.parametrize("name", METHODS)
def test_an_end_before_the_training_says_what_is_missing(name):
    with pytest.raises(AttributeError, match=r"from its training on: call train\(\.\.\., during=\[method\]\) first"):
        make_method(name).finish()


@pytest.mark.parametrize("name", METHODS)
def test_an_optimizer_goes_on_where_its_run_was_stopped(name, tmp_path):
    """The cell of a notebook, stopped and run again: the optimizer has the groups and parameters that it came with."""

    def broken(step: int):
        if step == 13:
            raise KeyboardInterrupt
        return batches(step)

    whole, model = make_model(), make_model()
    run(whole, make_method(name))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    groups = [list(group["params"]) for group in optimizer.param_groups]
    told: dict[str, Any] = {"steps": STEPS, "epoch_steps": 6, "loss": loss, "checkpoint": tmp_path / "c.pt"}
    rate = lambda step: 1 - step / STEPS  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        train(model, broken, optimizer, rate, during=[make_method(name)], save_seconds=0, **told)
    train(model, batches, optimizer, rate, during=[make_method(name)], **told)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, g)) for g in groups]
    assert optimizer.state.keys() <= set(model.parameters())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at that of substituted weights
@pytest.mark.parametrize("views", [None, find_layers])
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_masks_of_a_wrapped_model_bear_the_ordinary_names(wrap, views):
    for name in ("GMP", "DPF", "RigL"):
        plain, inner = make_model(), make_model()
        masks = []
        for model in (plain, wrap(inner)):
            method = make_method(name)
            run(model, method, views=None if views is None else views(model))
            masks.append(method.finish())
        assert masks[0] == masks[1]
        masks[1].check(inner)
        run(wrap(inner), make_method(name), views=find_layers(inner), steps=STEPS)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_run_twice_is_the_same(name):
    models = [make_model(), make_model()]
    for model in models:
        method = make_method(name)
        run(model, method)
        method.finish()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


class Record(TorchDispatchMode):
    """Writes operations down with the shapes and numbers they are given; refuses those that wait for a device."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "bincount",
        "_unique",
        "lift_fresh",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(each is None or each.dtype == torch.int64 for each in args[1]), (
                "a bool index waits for the device"
            )
        self.seen.append(f"{name}{self._plain(args)}{self._plain(kwargs or {})}")
        return func(*args, **(kwargs or {}))

    def _plain(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, dict):
            return {key: self._plain(each) for key, each in value.items()}
        return [self._plain(each) for each in value] if isinstance(value, list | tuple) else value


def inside(model: nn.Module, method: During, optimizer: torch.optim.Optimizer, step: int, record: Record) -> None:
    """A step as `train` does it, its inner hooks and the backward pass watched."""
    x, y = batches(step)
    method.before_step(step)
    with record:
        weights = method.weights()
    value = nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
    with record:
        penalty = method.penalty()
    value = value if penalty is None else value + penalty
    with record:
        value.backward()
        method.gradients()
    optimizer.step()
    with record:
        method.follow()
    optimizer.zero_grad()
    method.after_step(step)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_can_be_recorded(name, optimizer):
    """Inside it nothing waits for the device, and every step does the same operations on the same plain numbers."""
    model, method = make_model(), make_method(name)
    made = OPTIMIZERS[optimizer](model.parameters())
    method.attach(model, made, Plan(STEPS, 6, tuple(find_layers(model))))
    records = []
    for step in range(STEPS):
        records.append(Record())
        inside(model, method, made, step, records[-1])
    assert records[1].seen
    for step in range(2, STEPS):
        assert records[step].seen == records[1].seen, f"step {step} is another than step 1"


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: x + torch.tensor(2.0),
    ],
)
def test_waiting_is_noticed(waiting):
    x = torch.randn(5)
    with pytest.raises(AssertionError, match="waits for the device"), Record():
        waiting(x)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_owns_its_parameters_alone(name):
    model, method = make_model(), make_method(name)
    made = OPTIMIZERS["sgd"](model.parameters())
    method.attach(model, made, Plan(STEPS, 6, tuple(find_layers(model))))
    mine, theirs = {id(each) for each in method.parameters()}, {id(each) for each in model.parameters()}
    assert not mine & theirs
    trained = {id(each) for group in made.param_groups for each in group["params"]}
    assert trained == mine | theirs


@pytest.mark.parametrize("name", METHODS)
def test_what_makes_no_sense_is_refused(name):
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="sparsity"):
            make_method(name, sparsity)
    with pytest.raises(ValueError, match=f"{name} found no prunable layer"):
        run(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)), make_method(name), views=[])


@pytest.mark.parametrize("name", METHODS)
def test_the_example_runs(name):
    names = {
        "torch": torch,
        name: getattr(during, name),
        "train": lambda *args, **options: train(*args, loss=loss, **options),
        "model": make_model(),
        "batches": batches,
    }
    heard: list[str] = []
    example = doctest.DocTestParser().get_doctest(getattr(during, name).__doc__ or "", names, name, None, 0)
    assert example.examples
    doctest.DocTestRunner(verbose=False).run(example, out=heard.append)
    assert not heard, "".join(heard)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_a_captured_run_is_the_plain_one(name):
    """On the device, recorded and replayed: the same masks, and weights as near as two plain runs are."""
    found = []
    for capture in (False, True):
        model, method = make_model().cuda(), make_method(name)
        made = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3, nesterov=True, fused=True)
        options = {"steps": STEPS, "loss": loss, "epoch_steps": 6, "during": [method], "capture": capture}
        train(model, batches, made, lambda step: 1 - step / STEPS, **options)
        found.append((method.finish(), prunable(model)))
    (plain, weights), (captured, others) = found
    differing = sum(int((plain[key] != captured[key]).sum()) for key in plain)
    assert differing <= 4
    for key, weight in weights.items():
        both = plain[key] & captured[key]
        torch.testing.assert_close(weight[both], others[key][both], rtol=1e-3, atol=1e-4)


# What some methods have of their own.


def test_the_cubic_schedule():
    events = cubic(0.9, 100, every=0.1, start=0.0, stop=0.9)
    assert list(events) == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert events[10] == pytest.approx(0.9 - 0.9 * (8 / 9) ** 3)
    assert round(events[10], 4) == 0.2679
    assert events[90] == 0.9
    crowded = cubic(0.5, 3, every=0.05)  # several fall on one step: the last of them counts, k = 9 and 16 (or 17) of 20
    assert list(crowded) == [1, 2, 3]
    assert crowded[1] == pytest.approx(0.5 - 0.5 * (11 / 20) ** 3)
    assert crowded[3] == 0.5
    assert len(cubic(0.9, 100, every=0.1, stop=0.7)) == 7  # although 0.7 / 0.1 is less than 7
    for shares in ({"every": 0.0}, {"every": 0.6, "stop": 0.5}, {"every": 0.1, "start": 0.5, "stop": 0.5}):
        with pytest.raises(ValueError, match="every"):
            cubic(0.9, 100, **shares)


@pytest.mark.parametrize("allocation", [global_, uniform, uniform_plus(), erk, lamp], ids=lambda each: each.__name__)
@pytest.mark.parametrize("variant", ["hard", "recover"])
def test_gradual_pruning_under_every_allocation(variant, allocation):
    model, method = make_model(), make_method("GMP", 0.6, variant=variant, allocation=allocation, every=0.05)
    totals, earlier = [], []
    after_step = method.after_step

    def watch(step: int) -> None:
        after_step(step)
        masks = method.masks()
        totals.append(sum(kept for kept, _ in masks.table().values()))
        earlier.append(masks)

    method.after_step = watch
    run(model, method)
    assert len(method.events) == 18
    assert totals == [kept_of(180 + 45 + 60, sparsity_after(method.events, step + 1)) for step in range(STEPS)]
    if variant == "hard":
        for before, after in pairwise(earlier):
            assert not any((after[name] & ~before[name]).any() for name in after)


def test_what_is_pruned_for_good_does_not_win_a_tie():
    model, method = nn.Linear(4, 1), make_method("GMP", 0.5, every=0.5)
    method.attach(model, OPTIMIZERS["sgd"](model.parameters()), Plan(2, 1, tuple(find_layers(model))))
    method.set_masks_({"weight": torch.tensor([[False, True, True, True]])})
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 5.0]]))
    method.after_step(0)
    assert method.masks()["weight"].tolist() == [[False, True, False, True]]


def test_pruned_weights_can_recover():
    back = 0
    for name in ("GMP", "DPF"):
        method = make_method(name, 0.6, every=0.05, **({"variant": "recover"} if name == "GMP" else {}))
        seen = []
        after_step = method.after_step
        method.after_step = lambda step, of=after_step, method=method, seen=seen: (
            of(step),
            seen.append(method.masks()),
        )
        run(make_model(), method)
        back += any((b[key] & ~a[key]).any() for a, b in pairwise(seen) for key in a)
    assert back == 2


def test_counts_are_mended_to_the_total():
    scores = {name: torch.rand(3, 5, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abcd")}
    masks = keep_allocated(scores, 0.5, uniform)  # 15 - round(7.5) = 7 in each are 28, and 30 are due
    assert sum(int(mask.sum()) for mask in masks.values()) == 30
    scores["a"][:, 1:] = -torch.inf
    masks = keep_allocated(scores, 0.5, uniform)
    assert int(masks["a"].sum()) == 3
    assert sum(int(mask.sum()) for mask in masks.values()) == 30


def test_the_choice_on_the_device_is_the_choice_in_chunks():
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(4, 5, generator=generator).round(),
        "b": torch.randn(3, 2, 3, generator=generator).round(),
    }
    for sparsity in (0.0, 0.3, 0.5, 0.97):
        kept = kept_of(38, sparsity)
        masks = keep_global({name: weight.abs() for name, weight in weights.items()}, kept)
        assert masks_by_magnitude(weights, sparsity) == Masks(masks)


@pytest.mark.parametrize("name", ["RigL", "SET"])
def test_exchanges_keep_every_layers_count(name):
    method = make_method(name, 0.7)
    tables, connections = [], []
    after_step = method.after_step

    def watch(step: int) -> None:
        tables.append(method.masks().table())
        connections.append(method.masks())
        after_step(step)

    method.after_step = watch
    run(make_model(), method)
    assert all(table == tables[0] for table in tables)
    changes = [step for step in range(1, STEPS) if connections[step] != connections[step - 1]]
    assert changes == ([4, 8, 12] if name == "RigL" else [6, 12, 18])


def test_exchanges_end():
    method = make_method("RigL", 0.7, alpha=1.0, delta=4, stop=0.5)
    seen = []
    after_step = method.after_step
    method.after_step = lambda step: (after_step(step), seen.append(method.masks()))
    run(make_model(), method)
    assert [step + 1 for step in range(1, STEPS) if seen[step] != seen[step - 1]] == [4, 8]


class Routed(nn.Module):
    """Two layers of which every batch goes through one, as experts that are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.each[int(x[0, 0] > 0)](x)


def test_a_layer_without_a_gradient_exchanges_nothing():
    """What it had steps before is not in a checkpoint, so a resumed run would grow others."""

    def served(step: int):
        x, labels = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)), batches(step)[1]
        x[:, 0] = -1.0 if step == 4 else 1.0
        return x, labels

    model, method, seen = Routed(), make_method("RigL", 0.5, delta=5, topology=uniform), []
    after_step = method.after_step
    method.after_step = lambda step: (after_step(step), seen.append(method.masks()))
    run(model, method, steps=12, served=served)
    unused, used = (f"each.{place}.weight" for place in (1, 0))
    assert torch.equal(seen[4][unused], seen[3][unused])
    assert not torch.equal(seen[4][used], seen[3][used])


def test_a_layer_without_a_gradient_competes_for_what_stays():
    """LC pulls on what is outside the best of all layers, also of those that a step does not reach."""
    model, method = Routed(), make_method("LC", 0.5, mu=1.0)
    with torch.no_grad():
        model.each[0].weight.fill_(1.0)
        model.each[1].weight.fill_(2.0)  # which alone is half of all weights, and larger
    made = torch.optim.SGD(model.parameters(), lr=0.5)
    method.attach(model, made, Plan(STEPS, STEPS, tuple(find_layers(model))))
    model.each[0].weight.grad = torch.zeros_like(model.each[0].weight)
    method.gradients()
    assert model.each[0].weight.grad.eq(1.0).all()
    assert model.each[1].weight.grad is None


@pytest.mark.parametrize("name", METHODS)
def test_frozen_layers_are_no_trouble(name):
    """Where no prunable weight is trained, none is but by the method: what stays of it is what it was."""
    model, method = make_model(), make_method(name)
    for weight in (model[0].weight, model[5].weight, model[6].weight):
        weight.requires_grad_(False)
    before = prunable(copy.deepcopy(model))
    run(model, method)
    masks = method.finish()
    masks.check(model)
    if name not in ("CS", "STR"):  # which train what weights are multiplied with, or shortened by
        for key, weight in prunable(model).items():
            assert torch.equal(weight, before[key] * masks[key]), key


def test_gates_learn_from_steps_that_16_bits_would_lose():
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    method, made = make_method("CS", 0.5, init=1.0, penalty=1.0), torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    train(model, lambda step: x, made, lambda step: 1.0, steps=4, loss=lambda m, x: 0 * m(x).sum(), during=[method])
    assert all(bool((gate < 0.9999).all()) for gate in method.gates)
    assert method.finish().sparsity == 0.5
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["STR", "CS"])
def test_a_beginning_may_be_a_whole_number(name):
    ends = []
    for init in (-3, -3.0):
        method = make_method(name, 0.75, init=init)
        run(make_model(), method)
        ends.append(method.finish())
    assert ends[0] == ends[1]


def test_an_exchange_does_not_take_pruned_weights_for_small_ones():
    """Connections that were grown a moment ago are zero too."""
    views = [View("a", "a", None, False, (1, 4))]
    weights, mask = {"a": torch.tensor([[0.0, 0.0, 0.0, 5.0]])}, {"a": torch.tensor([[False, True, True, True]])}
    found = exchange(views, weights, mask, {"a": torch.tensor([[1.0, 1.0, 2.0, 0.0]])}, 0.34)
    assert found["a"].tolist() == [[False, True, True, True]]


class Drift(torch.optim.Optimizer):
    """Moves every weight, whatever its gradient."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"])


@pytest.mark.parametrize("name", ["GMP", "RigL", "SET"])
def test_zeros_are_held_whatever_the_optimizer_does(name):
    model, method = make_model(), make_method(name, 0.7)
    after_step = method.after_step

    def watch(step: int) -> None:
        weights = prunable(model)
        assert not any(weights[key][~mask].any() for key, mask in method.masks().items())
        after_step(step)

    method.after_step = watch
    options = {"steps": STEPS, "loss": loss, "epoch_steps": 6, "during": [method]}
    train(model, batches, Drift(model.parameters()), lambda step: 1.0, **options)


@pytest.mark.parametrize("name", ["RigL", "SET"])
def test_topologies(name):
    for topology, shares in ((uniform, (0.4, 0.4, 0.4)), (erk, None)):
        method, model = make_method(name, 0.6, topology=topology), make_model()
        made = OPTIMIZERS["sgd"](model.parameters())
        method.attach(model, made, Plan(STEPS, 6, tuple(find_layers(model))))
        table = method.masks().table()
        if shares is not None:
            assert [kept / total for kept, total in table.values()] == pytest.approx(shares, abs=0.03)
        else:  # 12 entries a filter of 45 (5 + 1 + 3 + 3), 17 of 60, 27 of 180: in proportion, or all
            assert table["0.weight"][0] / 12 == pytest.approx(table["6.weight"][0] / 27, abs=0.1)
        other = make_method(name, 0.6, topology=topology, seed=1)
        other.attach(model, made, Plan(STEPS, 6, tuple(find_layers(model))))
        assert other.masks() != method.masks()
    with pytest.raises(ValueError, match="owl looks at what the layers receive"):
        make_method(name, topology=owl())
    with pytest.raises(ValueError, match="smaller"):
        run(make_model(), make_method(name, delta=20))


@pytest.mark.parametrize("name", ["STR", "CS", "DST"])
def test_what_is_learnt_is_reported(name):
    method = make_method(name, 0.75, exact=False)
    run(make_model(), method)
    masks = method.finish()
    assert float(method.reached) == pytest.approx(masks.sparsity)
    assert 0 < masks.sparsity < 1
    exact = make_method(name, 0.75)
    run(make_model(), exact)
    assert exact.finish().sparsity != masks.sparsity
    assert float(exact.reached) == pytest.approx(masks.sparsity)


@pytest.mark.parametrize("name", ["STR", "CS", "DST"])
def test_what_an_optimizer_does_to_weights_is_not_done_to_what_is_learnt(name):
    """Decoupled decay, proximal steps and feasible sets are of weights; STR's thresholds decay as its weights do."""
    makers = {
        "decoupled": lambda p: SFW(p, lr=0.1, decoupled_decay=0.5),
        "proximal": lambda p: ProximalSGD(p, lr=0.1, proximal="groups", strength=10.0),
        "feasible": lambda p: SFW(p, lr=0.1, constraint=k_support(0.5, radius=1.0), joint=True),
    }
    for kind, make in makers.items():
        model = make_model()
        optimizer, method = make(model.parameters()), make_method(name)
        method.attach(model, optimizer, Plan(STEPS, STEPS, tuple(find_layers(model))))
        for each in method.parameters():
            each.data.fill_(1.0)
            each.grad = torch.zeros_like(each)
        optimizer.step()
        left = 1 - 0.1 * 0.5 if (name, kind) == ("STR", "decoupled") else 1.0
        assert all(each.eq(left).all() for each in method.parameters()), kind


def test_an_empty_layer_starts_anew():
    model, method = make_model(), make_method("DST")
    made = OPTIMIZERS["sgd"](model.parameters())
    method.attach(model, made, Plan(STEPS, 6, tuple(find_layers(model))))
    assert method.t.shape == (5 + 12 + 15,)
    with torch.no_grad():
        method.t.fill_(0.01)
        method.t[5:17] = 100.0  # the transposed layer keeps nothing
    method.follow()
    assert method.t.tolist() == pytest.approx([0.01] * 5 + [0.0] * 12 + [0.01] * 15)


def test_thresholds_belong_to_output_rows():
    model, method = make_model(), make_method("DST")
    made = OPTIMIZERS["sgd"](model.parameters())
    method.attach(model, made, Plan(STEPS, 6, tuple(find_layers(model))))
    with torch.no_grad():
        method.t[5 + 3] = 100.0  # the fourth output of the transposed layer, stored (in, out)
        method.t[2] = 100.0  # the third filter
    weights = method.weights()
    assert not weights["5.weight"][:, 3].any()
    assert not weights["0.weight"][2].any()
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == 5 + 9


def test_what_the_end_takes_away_is_measured():
    """ALLR goes by it: LC prunes at the end alone, GMP has long pruned what is small by then."""
    for name, expected in (("LC", True), ("GMP", False)):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        method, made = make_method(name), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        method.attach(model, made, Plan(STEPS, 6, tuple(find_layers(model))))
        for step in range(STEPS):
            method.before_step(step)
            method.after_step(step)
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        masks, lost = finish(method, model)
        assert lost == distance(before, masks)
        assert (lost > 0) == expected


def test_part_of_a_stack_is_refused():
    class Stack(nn.Module):
        is_transposed = False

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 5))

    with pytest.raises(ValueError, match=r"'experts' is prunable in part \(40 of 60"):
        run(Stack(), make_method("GSM"), views=find_layers(Stack())[:2])


def test_decay_that_is_not_there_is_refused():
    model = make_model()
    plan = Plan(STEPS, 6, tuple(find_layers(model)))
    with pytest.raises(ValueError, match="give the optimizer one, or LC a mu"):
        make_method("LC").attach(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    make_method("LC", mu=0.1).attach(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
