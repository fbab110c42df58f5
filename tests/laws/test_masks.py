"""Masks: pruned entries become and stay +0.0, files give back what was saved, foreign input is refused."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.layers import View, find_layers
from prunus.masks import Masks, infer_masks


def bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)).to(dtype)


def small_masks() -> Masks:
    return Masks({"0.weight": bits(3, 5), "1.weight": bits(4, 3, seed=1)})


def is_positive_zero(tensor: Tensor) -> bool:
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_apply_zeroes_what_is_pruned_and_nothing_else(dtype: torch.dtype):
    model, masks = small_model(dtype), small_masks()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = -0.0
        model[1].weight[~masks["1.weight"]] = float("nan")
    masks.apply_(model)
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert is_positive_zero(parameter[~mask])
        assert torch.equal(parameter[mask], before[name][mask])
    masks.check(model)


def test_check_names_the_first_parameter_that_is_not_zero():
    model, masks = small_model(), small_masks()
    masks.apply_(model)
    with torch.no_grad():
        model[1].weight[~masks["1.weight"]] = 1.0
    pruned = int((~masks["1.weight"]).sum())
    with pytest.raises(ValueError, match=rf"'1\.weight' has {pruned} nonzero weights"):
        masks.check(model)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hold_keeps_zeros_through_a_warm_optimizer(name: str):
    model, masks = small_model(), small_masks()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    step(model, optimizer)  # dense steps: every momentum is warm
    step(model, optimizer)
    handle = masks.hold(model, optimizer)
    masks.check(model)
    moved = model[0].weight.detach().clone()
    for _ in range(3):
        step(model, optimizer)
        masks.check(model)
        for key, mask in masks.items():
            parameter = model.get_parameter(key)
            assert is_positive_zero(parameter[~mask])
            for value in optimizer.state[parameter].values():
                assert value.shape != mask.shape or is_positive_zero(value[~mask])
    assert not torch.equal(moved, model[0].weight)
    handle.remove()
    step(model, optimizer)
    with pytest.raises(ValueError, match="nonzero"):
        masks.check(model)


def test_a_hold_changes_to_other_masks_in_the_tensors_that_it_has():
    model, masks = small_model(), small_masks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    handle = masks.hold(model, optimizer)
    others = Masks({name: mask.roll(1, 0) for name, mask in masks.items()})
    assert others != masks
    before = [tensor for each in handle.held for tensor in (each.pruned, each.kept)]
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    handle.change_(others)
    others.check(model)
    assert torch.equal(model[0].weight != 0, others["0.weight"])
    step(model, optimizer)
    others.check(model)
    with pytest.raises(ValueError, match="nonzero"):
        masks.check(model)
    after = [tensor for each in handle.held for tensor in (each.pruned, each.kept)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="masks of 1 parameters cannot follow on those of 2 others"):
        handle.change_(Masks({"0.weight": masks["0.weight"]}))
    others.check(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()


def test_tied_parameters_are_masked_under_either_name():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    masks = Masks({"head.weight": bits(6, 4)})
    masks.apply_(model)
    assert is_positive_zero(model["embed"].weight[~masks["head.weight"]])
    masks.check(model)


def test_a_mask_that_does_not_fit_changes_nothing():
    for masks, message in [
        (Masks({"0.weight": bits(3, 5), "1.wight": bits(4, 3)}), r"no parameter '1\.wight'.*close names: 1\.weight"),
        (Masks({"0.weight": bits(3, 5), "1.weight": bits(3, 4)}), r"'1\.weight' has shape \(4, 3\), its mask \(3, 4\)"),
    ]:
        model = small_model()
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match=message):
            masks.apply_(model)
        with pytest.raises(ValueError, match=message):
            masks.hold(model, torch.optim.SGD(model.parameters()))
        assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="meta device"):
        small_masks().apply_(small_model().to("meta"))
    with pytest.raises(ValueError, match="must be bool"):
        Masks({"w": torch.ones(2)})


def test_masks_of_views_have_the_parameters_own_shapes():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), Conv1D(4, 5))
    views = find_layers(model)
    matrices = {view.name: bits(*view.shape) for view in views}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks = Masks.of(views, matrices, shapes)
    assert {name: mask.shape for name, mask in masks.items()} == {"0.weight": (3, 2, 3, 3), "1.weight": (5, 4)}
    for view in views:
        assert torch.equal(view.matrix(masks[view.parameter]), matrices[view.name])
    with pytest.raises(ValueError, match="'O' is not one of the 2 views"):
        Masks.of(views, {"O": bits(1, 1)}, shapes)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_without_a_matrix_stay_dense(transposed: bool):
    shape = (2, 5) if transposed else (5, 2)
    views = [View(f"experts.up[{i}]", "experts.up", i, transposed, (5, 2)) for i in range(3)]
    masks = Masks.of(views, {views[1].name: bits(5, 2)}, {"experts.up": (3, *shape)})
    assert torch.equal(views[1].matrix(masks["experts.up"]), bits(5, 2))
    assert bool(masks["experts.up"][[0, 2]].all())


def test_algebra():
    one, two = Masks({"a": bits(4, 4), "b": bits(3)}), Masks({"a": bits(4, 4, seed=1), "c": bits(2)})
    both = one & two
    assert set(both) == {"a", "b", "c"}
    assert torch.equal(both["a"], one["a"] & two["a"])
    assert torch.equal(both["b"], one["b"])
    assert one & one == one
    assert one != two
    assert one != Masks({"a": bits(4, 4), "b": bits(3, seed=5)})
    assert one != {"a": 1}
    with pytest.raises(ValueError, match="'a' have shapes"):
        one & Masks({"a": bits(4, 5)})


def test_counts():
    masks = Masks({"a": torch.tensor([True, False, False]), "b": torch.tensor([[True]])})
    assert masks.table() == {"a": (1, 3), "b": (1, 1)}
    assert masks.sparsity == 0.5
    assert repr(masks) == "Masks(2 parameters, sparsity 0.5000)"
    assert Masks({}).sparsity == 0


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> pytest.TempPathFactory:
    return tmp_path_factory


@settings(deadline=None, max_examples=40)
@given(shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4), seed=st.integers(0, 99))
def test_save_and_load_give_back_every_bit(
    shapes: list[list[int]], seed: int, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    masks = Masks({f"layer.{i}": bits(*shape, seed=seed + i) for i, shape in enumerate(shapes)})
    masks.save(path)
    loaded = Masks.load(path)
    assert loaded == masks
    assert [mask.shape for mask in loaded.values()] == [torch.Size(shape) for shape in shapes]
    assert os.listdir(path.parent) == ["masks.safetensors"]


def test_files_hold_eight_entries_a_byte(tmp_path: Path):
    Masks({"w": bits(128, 256).T}).save(tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").stat().st_size < 128 * 256 // 8 + 300
    assert torch.equal(Masks.load(tmp_path / "masks.safetensors")["w"], bits(128, 256).T)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "masks.safetensors"
    small_masks().save(path)

    def fail(_: object, partial: Path, **__: object) -> None:
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("prunus.machine.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Masks({"w": bits(3)}).save(path)
    assert Masks.load(path) == small_masks()
    assert os.listdir(tmp_path) == ["masks.safetensors"]


def test_foreign_and_damaged_files_are_refused(tmp_path: Path):
    path = tmp_path / "masks.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="is damaged"):
        Masks.load(path)
    small_masks().save(path)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="is damaged"):
            Masks.load(path)
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "absent")
    good = {"format": "prunus.masks", "version": "1", "shapes": '{"w": [9]}'}
    packed = {"w": torch.zeros(2, dtype=torch.uint8)}
    for tensors, metadata, message in [
        (packed, None, "does not hold Prunus masks"),
        (packed, {**good, "format": "pt"}, "format='pt'"),
        (packed, {**good, "version": "2"}, "version '2'"),
        (packed, {**good, "shapes": '{"w": [17]}'}, "damaged"),
        ({"w": torch.zeros(2)}, good, "damaged"),
        (packed, {**good, "shapes": '{"v": [9]}'}, "different names"),
        (packed, {**good, "shapes": "{"}, "its shapes are no JSON"),
    ]:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            Masks.load(path)
    save_file(packed, path, metadata=good)
    assert not bool(Masks.load(path)["w"].any())


def test_only_infer_masks_reads_zeros_off_weights():
    weights = {"w": torch.tensor([[0.0, -0.0, 1.0, float("nan")]])}
    assert infer_masks(weights)["w"].tolist() == [[False, False, True, True]]
    model, masks = nn.Linear(2, 1), Masks({"weight": torch.tensor([[True, False]])})
    with torch.no_grad():
        model.weight.zero_()  # training passed through zero: the mask does not change
    masks.apply_(model)
    assert masks["weight"].tolist() == [[True, False]]
