"""ELSA whose variable is W + s BA: against an alternation in float64 written out over A and B, and what it takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from prunus.adapt import adapt, adapted, effective
from prunus.during import ELSA, GMP
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.patterns import Pattern, parse
from prunus.soup import finish
from prunus.train import Plan, classification_loss, lighten_, train

loss = classification_loss()


def textbook(W: Tensor, A: Tensor, x: Tensor, y: Tensor, chosen: Pattern, kept: int, how: dict[str, float]):
    """Weights and mask after 33 steps on mean (x w^T - y)^2, w = W + s B A; Adam, clipping and gradients by hand."""
    s, lam, move, size = how["s"], how["lam"], how["move"], y.numel()
    B = torch.zeros(len(W), len(A), dtype=torch.float64)
    first = {"A": torch.zeros_like(A), "B": torch.zeros_like(B)}
    second = {name: torch.zeros_like(each) for name, each in first.items()}
    mask = chosen.choose((W**2).float(), kept)
    z, u = W * mask, torch.zeros_like(W)

    def best(values: Tensor) -> Tensor:
        rows, columns = second["B"].mean(1), second["A"].mean(0)
        return chosen.choose((values**2 * rows[:, None] * columns[None] / columns.mean()).float(), kept)

    for step in range(1, 34):
        G = 2 / size * (x @ (W + s * B @ A).T - y).T @ x
        grads = {"A": s * B.T @ G, "B": s * G @ A.T}
        norm = sum(float((each**2).sum()) for each in grads.values()) ** 0.5
        R = lam * (W + s * B @ A - z + u)
        pulls = {"A": s * B.T @ R, "B": s * R @ A.T}
        moved = {}
        for name, each in (("A", A), ("B", B)):
            grad = grads[name] * min(1.0, how["clip"] / (norm + 1e-6)) + pulls[name]
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            size_of = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            moved[name] = each - how["lr"] * first[name] / (1 - 0.9**step) / size_of
        A, B = moved["A"], moved["B"]
        if step % 5 == 0:
            W = W - move * (W + s * B @ A - z + u)
            both = W + s * B @ A + u
            mask = best(both)
            z, u = both * mask, both * ~mask
    w = W + s * B @ A
    mask = best(w)
    return w * mask, mask


@pytest.mark.parametrize(("lam", "move"), [(0.3, 0.0), (0.3, 0.3), (0.0, 0.3)])
@pytest.mark.parametrize(("pattern", "rank"), [("unstructured", 4), ("unstructured", 2), ("2:4", 4), ("block 1x2", 1)])
def test_it_is_the_alternation_over_both_factors(pattern: str, rank: int, lam: float, move: float):
    generator = torch.Generator().manual_seed(0)
    start, x, y = (torch.randn(size, generator=generator) for size in ((4, 8), (40, 8), (40, 4)))
    x = x * torch.linspace(0.2, 2, 8)
    model = nn.Linear(8, 4, bias=False)
    model.weight.data.copy_(start)
    views = find_layers(nn.Sequential(model))
    holder = nn.Sequential(model)
    adaptation = adapt(holder, ["lora"], masks=None, views=views, rank=rank, alpha=2.0 * rank)
    A = adaptation.groups["lora"][0].detach().double()
    method = ELSA(0.5, pattern=pattern, lam=lam, interval=5, move=move)
    optimizer = torch.optim.Adam(adaptation.param_groups(0.1))
    options: dict[str, Any] = {"steps": 33, "clip": 0.1, "during": [method], "views": views}
    train(holder, lambda _: x, optimizer, lambda _: 1.0, loss=lambda m, _: (m(x) - y).square().mean(), **options)
    masks = method.finish()
    adaptation.merge_()

    how = {"s": 2.0, "lam": lam, "move": move, "clip": 0.1, "lr": 0.1}
    w, mask = textbook(start.double(), A, x.double(), y.double(), parse(pattern, "layer"), 16, how)
    assert torch.equal(masks["0.weight"], mask)
    torch.testing.assert_close(holder[0].weight.detach(), w.float(), rtol=1e-3, atol=1e-4)
    assert holder[0] is model
    if not move:  # training had a say; with it, what is pruned first is soon zero
        assert not torch.equal(mask, parse(pattern, "layer").choose(start.abs(), 16))


def make_model(seed: int = 0) -> nn.Sequential:
    """A convolution, a transposed and an ordinary linear layer: adapted on the parameter, and as modules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), Conv1D(12, 32), nn.Linear(12, 16))
        model = nn.Sequential(*layers)
        nn.init.normal_(model[3].weight, std=0.3)
        return model


def batches(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def run(model: nn.Module, method: ELSA, served: Any = batches, dtype: torch.dtype = torch.float32, **options: Any):
    views = find_layers(model)
    model.to(dtype)
    adaptation = adapt(model, ["lora", "biases"], masks=None, views=views, rank=2)
    optimizer = torch.optim.Adam(adaptation.param_groups(0.02))
    options = {"steps": 20, "clip": 1.0, "during": [method], "views": views, "loss": loss} | options
    train(model, served, optimizer, lambda step: 1 - step / 20, **options)
    return adaptation, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pattern", "bits", "exclude"), [("unstructured", 32, ()), ("2:4", 16, ("0",)), ("block 1x4", 8, ("0",))]
)
def test_the_end_is_exactly_sparse_and_merging_fills_nothing(pattern: str, bits: Any, exclude: Any, dtype: torch.dtype):
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    views = find_layers(model, exclude=exclude)
    model.to(dtype, memory_format=torch.channels_last)  # of which a convolution's matrix would be a copy
    adaptation = adapt(model, ["lora"], masks=None, views=views, rank=2)
    start = {name: each.parameter.detach().clone() for name, each in adapted(model).items()}
    method = ELSA(0.5, pattern=pattern, interval=4, bits=bits)
    optimizer = torch.optim.Adam(adaptation.param_groups(0.02))

    def typed(step: int) -> tuple[Tensor, Tensor]:
        x, labels = batches(step)
        return x.to(dtype), labels

    options: dict[str, Any] = {"steps": 20, "during": [method], "views": views, "loss": loss}
    train(model, typed, optimizer, lambda _: 1.0, **options)
    before = {name: each.value() for name, each in adapted(model).items()}
    masks, lost = finish(method, model)  # before adapters are merged, as recipes do
    gone = [each[~adapted(model)[name].matrices(masks[name])] for name, each in before.items()]
    energy, all_ = (sum(float(each.square().sum()) for each in of) for of in (gone, before.values()))
    assert lost == pytest.approx((energy / all_ / 0.5) ** 0.5, rel=1e-3)
    x = typed(0)[0]
    before = model(x)
    report = adaptation.merge_()
    assert torch.equal(model(x), before)
    assert not any(report.difference.values())
    assert [name for name, _ in model.named_parameters()] == names
    assert set(masks) == {view.parameter for view in views}
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight.dtype == dtype
        assert not torch.equal(weight[mask], start[name][mask])
        assert not weight[~mask].any()
        assert not weight[~mask].signbit().any()
        assert int(mask.sum()) == mask.numel() // 2
        view = next(each for each in views if each.parameter == name)
        if pattern != "unstructured":
            assert (view.matrix(mask).reshape(-1, 4).sum(1) == 2).all() or pattern != "2:4"
            assert (view.matrix(mask).reshape(-1, 4).sum(1) % 4 == 0).all() or pattern == "2:4"


@pytest.mark.parametrize("bits", [32, 8])
def test_a_killed_run_ends_with_the_same_bits(bits: Any, tmp_path: Any):
    def broken(step: int) -> tuple[Tensor, Tensor]:
        if step == 13:
            raise KeyboardInterrupt
        return batches(step)

    def end(model: nn.Module, **options: Any) -> tuple[Masks, dict[str, Tensor]]:
        method = ELSA(0.75, lam=0.01, interval=4, bits=bits)
        adaptation, _ = run(model, method, **options)
        masks = method.finish()
        adaptation.merge_()
        return masks, model.state_dict()

    masks, weights = end(make_model())
    with pytest.raises(KeyboardInterrupt):
        end(make_model(), served=broken, checkpoint=tmp_path / "c.pt", save_seconds=0)
    for served in (batches, lambda _: pytest.fail("no batch is needed")):  # then the finished run, finished again
        others, found = end(make_model(seed=0), served=served, checkpoint=tmp_path / "c.pt")
        assert others == masks
        assert all(torch.equal(value, found[name]) for name, value in weights.items())


class Formed(TorchDispatchMode):
    """The most entries that an operation gave new memory to."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.most = max(self.most, each.untyped_storage().nbytes() // each.element_size())
        return found


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_nothing_of_the_weights_size_is_formed_or_held_but_what_it_is_pulled_to(bits: Any, monkeypatch: Any):
    monkeypatch.setattr(effective, "_TILE", 512)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 64, bias=False))
    views, size = find_layers(model), 64 * 96
    adaptation = adapt(model, ["lora"], masks=None, views=views, rank=2)
    optimizer, method = torch.optim.Adam(adaptation.param_groups(0.01)), ELSA(0.5, lam=0.1, interval=4, bits=bits)
    method.attach(model, optimizer, Plan(20, 20, tuple(views)))
    x, formed = torch.randn(4, 64), Formed()
    for _ in range(2):  # the first has B = 0
        optimizer.zero_grad()
        with formed:
            model(x).square().mean().backward()
            method.gradients()
        optimizer.step()
    assert 0 < formed.most <= 1024 < size
    assert all(each.grad is None for each in model.parameters() if each.numel() == size)
    assert max(value.numel() for state in optimizer.state.values() for value in state.values()) == 2 * 96
    assert sum(each.nbytes for each in method.goals.buffers()) == 2 * (size * bits // 8 + (bits == 8) * size // 128 * 4)
    assert sum(each.nbytes for each in method.kept.buffers()) == 2 * size // 8
    mine = {each.data_ptr() for each in method.moved.buffers()}
    assert mine == {each.parameter.data_ptr() for each in adapted(model).values()}  # no copy: what a checkpoint holds


def test_tiles_of_what_it_is_pulled_to_are_its_rows():
    model = nn.Linear(6, 10, bias=False)  # rows of 6 in blocks of 4
    holder = nn.Sequential(model)
    views = find_layers(holder)
    adaptation = adapt(holder, ["lora"], masks=None, views=views, rank=2)
    method = ELSA(0.5, bits=8)
    method.attach(holder, torch.optim.Adam(adaptation.param_groups(0.01)), Plan(20, 20, tuple(views)))
    (goal,) = method.goals
    goal.write_(torch.randn(10, 6))
    whole = goal.read()
    for start in range(10):
        for stop in range(start + 1, 11):
            assert torch.equal(goal.read(slice(start, stop)), whole[start:stop])


def test_a_teacher_that_shares_the_dense_weights_keeps_them():
    model = make_model()
    dense = copy.deepcopy(model)
    teacher = copy.deepcopy(model).requires_grad_(False)
    views = find_layers(model)
    adaptation = adapt(model, ["lora"], masks=None, views=views, rank=2)
    lighten_(teacher, model)
    assert teacher[4].weight.data_ptr() == model[4].weight.data_ptr()
    method, optimizer = ELSA(0.5, interval=4), torch.optim.Adam(adaptation.param_groups(0.02))
    options: dict[str, Any] = {"steps": 9, "during": [method], "views": views, "loss": loss}
    train(model, batches, optimizer, lambda _: 1.0, **options)
    method.finish()
    for name, value in dense.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name


def test_stacked_experts_are_pulled_and_pruned():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x @ self.up_proj[place].T for place in range(3)]).mean(0)

    model = nn.Sequential(Experts())
    views = find_layers(model, include=["*"])
    adaptation = adapt(model, ["lora"], masks=None, views=views, rank=2)
    method, optimizer = ELSA(0.5, pattern="2:4", interval=2), torch.optim.Adam(adaptation.param_groups(0.02))
    options: dict[str, Any] = {"steps": 6, "during": [method], "views": views}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    train(model, lambda _: x, optimizer, lambda _: 1.0, loss=lambda m, _: m(x).square().mean(), **options)
    masks = method.finish()
    adaptation.merge_()
    (mask,) = masks.values()
    assert (mask.view(-1, 4).sum(1) == 2).all()
    assert torch.equal(model[0].up_proj != 0, mask)
    part = adapt(model, ["lora"], masks=None, views=views[:2], rank=2)
    with pytest.raises(ValueError, match="adapters for some of its experts"):
        ELSA(0.5).attach(model, torch.optim.Adam(part.param_groups(0.1)), Plan(1, 1, tuple(views)))


@pytest.mark.parametrize(
    ("method", "kind", "adapted_layers", "message"),
    [
        (ELSA(0.5), "scale_lora", 3, r"another adapter than W \+ s BA"),
        (ELSA(0.5), "mask_lora", 3, r"another adapter than W \+ s BA"),
        (ELSA(0.5), "lora", 1, "'3.weight' is to be pruned and has no adapter"),
        (GMP(0.5), "lora", 3, "GMP prunes weights that are trained themselves"),
        (ELSA(0.5, move=0.3), "full", 3, "move is of weights that LoRA adapts"),
        (ELSA(0.5, lam=0.0), "full", 3, "lam=0 pulls no weight that is trained"),
    ],
)
def test_what_cannot_work_is_refused(method: Any, kind: str, adapted_layers: int, message: str):
    model = make_model()
    views = find_layers(model)
    masks = {view.parameter: torch.ones_like(model.get_parameter(view.parameter), dtype=torch.bool) for view in views}
    of = {"masks": masks if kind == "mask_lora" else None, "views": views[:adapted_layers]}
    adaptation = adapt(model, [kind], rank=2, **of)
    with pytest.raises(ValueError, match=message):
        method.attach(model, torch.optim.Adam(adaptation.param_groups(0.1)), Plan(4, 4, tuple(views)))


def test_a_share_beyond_the_way_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got move=1.5"):
        ELSA(0.5, move=1.5)
    with pytest.raises(ValueError, match="nothing pulls weights to zero: give lam > 0, or move > 0"):
        ELSA(0.5, move=0.0)
