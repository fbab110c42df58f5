"""Adapters, trained parameters and merging in whole models of every family, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from prunus.adapt.adapt import SUBSETS, Adaptation, adapt
from prunus.adapt.adapters import EffectiveLinear
from prunus.layers import View, find_layers
from prunus.masks import Masks
from tests.conftest import tiny_llama
from tests.systems.test_families import FAMILIES, VOCAB

IDS = torch.arange(20).view(2, 10)


def _model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]().to(dtype).eval()


def _pruned(model: nn.Module, views: list[View] | None = None) -> Masks:
    views = find_layers(model) if views is None else views
    generator = torch.Generator().manual_seed(0)
    matrices = {view.name: torch.rand(view.shape, generator=generator) < 0.5 for view in views}
    masks = Masks.of(views, matrices, {name: p.shape for name, p in model.named_parameters()})
    masks.apply_(model)
    return masks


def _loss(model: nn.Module) -> Tensor:
    logits = model(IDS, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), IDS[:, 1:].reshape(-1))


def _train(model: nn.Module, adaptation: Adaptation, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-2), weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_trains_and_merges(family: str, dtype: torch.dtype) -> None:
    model = _model(family, dtype)
    masks, views = _pruned(model), find_layers(model)
    layout = [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    modules = list(model.named_modules())
    adaptation = adapt(model, ["norms", "mask_lora"], masks=masks, views=views, rank=2)
    _train(model, adaptation)
    factors = adaptation.groups["mask_lora"]
    assert len(factors) == 2 * len({view.parameter for view in views})
    assert all(p.grad is not None and p.grad.any() for p in factors)  # none is bypassed by its model
    assert all(p.grad is not None for p in adaptation.groups["norms"])
    trained = _logits(model)
    adaptation.merge_()
    rounding = 0.02 if family.startswith("falcon") and dtype == torch.bfloat16 else 0.0  # rounds again at its bias
    torch.testing.assert_close(_logits(model), trained, rtol=rounding, atol=rounding)
    assert [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()] == layout
    assert all(now == then for now, then in zip(model.named_modules(), modules, strict=True))
    masks.check(model)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["lora_prune", "scale_lora", "mask_lora"])
def test_stacked_experts(kind: str, experts: str) -> None:
    model = _model("mixtral")
    model.set_experts_implementation(experts)  # type: ignore[operator]
    masks = _pruned(model)
    adaptation = adapt(model, [kind], masks=masks, views=find_layers(model), rank=2)
    _train(model, adaptation)
    trained = _logits(model)
    report = adaptation.merge_()
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.difference
    masks.check(model)
    if kind == "lora_prune":
        assert all(0 < lost < 1 for lost in report.lost.values())
        assert min(report.difference.values()) > 1e-3  # it trained the dense update
    else:
        torch.testing.assert_close(_logits(model), trained, rtol=0, atol=1e-6)


def test_experts_implementations_agree() -> None:
    """The gradients through the parametrization do not depend on how the experts are multiplied."""
    grads: list[list[Tensor | None]] = []
    for experts in ("eager", "grouped_mm"):
        model = _model("mixtral")
        model.set_experts_implementation(experts)  # type: ignore[operator]
        adaptation = adapt(model, ["mask_lora"], masks=_pruned(model), views=find_layers(model), rank=2)
        _loss(model).backward()
        grads.append([p.grad for p in adaptation.groups["mask_lora"]])
    for eager, grouped in zip(*grads, strict=True):
        torch.testing.assert_close(eager, grouped)


def test_an_excluded_expert_is_not_touched() -> None:
    model = _model("mixtral")
    views = find_layers(model, exclude=["experts.down_proj[[]1]"])
    name = "model.layers.0.mlp.experts.down_proj"
    before = model.get_parameter(name).detach().clone()
    adaptation = adapt(model, ["scale_lora"], masks=None, views=views, rank=2)
    _train(model, adaptation)
    trained = _logits(model)
    adaptation.merge_()
    changed = (model.get_parameter(name) != before).flatten(1).any(1)
    assert changed.tolist() == [index != 1 for index in range(8)]
    torch.testing.assert_close(_logits(model), trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["norm"], r"Unknown subset 'norm'; known are biases, norms"),
        (["full", "norms"], "'full' already trains every parameter"),
        (["lora", "mask_lora"], "'lora' and 'mask_lora' would adapt the same layers"),
        (["norms", "norms"], "named 2 times"),
        ([], "train is empty"),
        ("norms", r"give a list.*\['norms'\]"),
    ],
)
def test_bad_combinations_are_refused(train: list[str], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        adapt(model, train, masks=None, views=find_layers(model))


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("alpha", 0.0), ("alpha", math.nan), ("init", "zeros")])
def test_bad_numbers_are_refused(name: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        adapt(model, ["mask_lora"], masks=None, views=find_layers(model), **{name: value})  # type: ignore[arg-type]


def test_masks_that_do_not_fit_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    views = find_layers(model)
    with pytest.raises(ValueError, match=r"No mask belongs to this model.*model\.0\.weight"):
        adapt(model, ["mask_lora"], masks={"model.0.weight": torch.ones(4, 4).bool()}, views=views)
    with pytest.raises(ValueError, match=r"'0\.weight' is torch\.bool \(4, 2\)"):
        adapt(model, ["mask_lora"], masks={"0.weight": torch.ones(4, 2).bool()}, views=views)
    with pytest.raises(ValueError, match=r"16 nonzero values where it is pruned.*apply_"):
        adapt(model, ["mask_lora"], masks={"0.weight": torch.zeros(4, 4).bool()}, views=views)
    with pytest.raises(ValueError, match=r"no parameter 'model\.0\.weight'.*prefix"):
        adapt(model, ["mask_lora"], masks=None, views=[View("0", "model.0.weight", None, False, (4, 4))])
    assert type(model[0]) is nn.Linear


def test_an_adapted_model_is_not_adapted_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    adaptation = adapt(model, ["mask_lora"], masks=None, views=find_layers(model))
    with pytest.raises(ValueError, match="adapted already"):
        adapt(model, ["norms"], masks=None, views=[])
    adaptation.merge_()
    with pytest.raises(ValueError, match="merged already"):
        adaptation.merge_()
    adapt(model, ["norms"], masks=None, views=[])


def test_lora_refuses_to_merge_into_a_pruned_weight_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).bfloat16()
    masks = _pruned(model, find_layers(model, include=["2"]))
    adaptation = adapt(model, ["lora", "norms"], masks=masks, views=find_layers(model), rank=2)
    with torch.no_grad():
        for p in adaptation.groups["lora"]:
            p.add_(1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = int((~masks["2.weight"]).sum())
    with pytest.raises(ValueError, match=rf"'2' has {pruned} pruned weights.*'mask_lora' or 'scale_lora'"):
        adaptation.merge_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_divergence_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).half()
    adaptation = adapt(model, ["mask_lora", "norms"], masks=None, views=find_layers(model), rank=2)
    with torch.no_grad():
        adaptation.groups["mask_lora"][1].fill_(math.nan)
    with pytest.raises(ValueError, match=r"adapter of '0' is not finite.*lr"):
        adaptation.merge_()
    with torch.no_grad():
        adaptation.groups["mask_lora"][1].zero_()
        adaptation.groups["norms"][0].fill_(1e6)  # finite, but not in float16
    with pytest.raises(ValueError, match=r"'1\.weight' is not finite in torch\.float16"):
        adaptation.merge_()
    assert isinstance(model[0], EffectiveLinear)


def test_merging_notices_a_layer_that_changed_meanwhile() -> None:
    """The self-check compares layers, not formulas: a mask exchanged under the adapter shows."""
    model = nn.Sequential(nn.Linear(8, 8))
    adaptation = adapt(model, ["mask_lora"], masks=_pruned(model), views=find_layers(model), rank=2)
    with torch.no_grad():
        for p in adaptation.groups["mask_lora"]:
            p.fill_(1)
    model[0].factors.mask = None  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="'0' merged differs from its adapter"):
        adaptation.merge_()


def test_no_adapter_stays_where_merging_fails() -> None:
    """A sum that float16 cannot hold: the layers are those from before, and the model can be adapted anew."""
    model = nn.Sequential(nn.Conv1d(3, 2, 1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)).half()
    modules, last = list(model.modules()), model[3].weight.clone()
    adaptation = adapt(model, ["lora"], masks=None, views=find_layers(model))
    with torch.no_grad():
        for factor in adaptation.groups["lora"][2:]:
            factor.fill_(1e4)
    with pytest.raises(RuntimeError, match=r"'2' does not fit into torch\.float16 when merged"):
        adaptation.merge_()
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model[3].weight, last)
    adapt(model, ["lora"], masks=None, views=find_layers(model)).merge_()


@pytest.mark.parametrize("kind", ["lora", "mask_lora", "scale_lora"])
def test_float64_is_not_rounded(kind: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5, bias=False)).double(), torch.randn(7, 6, dtype=torch.float64)
    torch.nn.init.normal_(model[0].weight)
    mask = torch.rand(5, 6) > 0.5 if kind == "mask_lora" else torch.ones(5, 6, dtype=torch.bool)
    masks = Masks({"0.weight": mask})
    masks.apply_(model)
    weight = model[0].weight.detach().clone()
    adapt(model, [kind], masks=masks, views=find_layers(model)).merge_()
    assert torch.allclose(model[0].weight, weight, rtol=1e-6 if kind == "scale_lora" else 0, atol=0)
    adaptation = adapt(model, [kind], masks=masks, views=find_layers(model))
    torch.nn.init.normal_(adaptation.groups[kind][1])
    trained = model(x)
    adaptation.merge_()
    assert torch.allclose(model(x), trained, rtol=1e-12)


def test_full_trains_everything_under_held_masks() -> None:
    model = _model("llama", torch.bfloat16)
    masks = _pruned(model)
    adaptation = adapt(model, ["full"], masks=masks, views=[])
    assert adaptation.share == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-2), weight_decay=0.0)
    handle = masks.hold(model, optimizer)
    _loss(model).backward()
    optimizer.step()
    trained = _logits(model)
    adaptation.merge_()
    masks.check(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(_logits(model).float(), trained, rtol=0.1, atol=0.05)
    handle.remove()
    adaptation = adapt(model, ["full"], masks=masks, views=[])
    _train(model, adaptation)
    with pytest.raises(ValueError, match=r"not zero where it is pruned.*masks\.hold"):
        adaptation.merge_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_subsets_train_in_float32_and_go_back(dtype: torch.dtype) -> None:
    model = _model("opt", dtype)
    frozen = model.get_parameter("model.decoder.layers.0.fc1.weight")
    frozen.requires_grad_(False)
    adaptation = adapt(model, ["biases", "norms", "embeddings"], masks=None, views=[])
    assert all(p.dtype == torch.float32 and p.requires_grad for ps in adaptation.groups.values() for p in ps)
    assert sum(p.requires_grad for p in model.parameters()) == sum(map(len, adaptation.groups.values()))
    before = frozen.clone()
    _train(model, adaptation)
    assert torch.equal(frozen, before)
    trained = _logits(model)
    adaptation.merge_()
    assert torch.equal(_logits(model), trained)  # also in float16: modules saw the rounded values all along
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "model.decoder.layers.0.fc1.weight"
    ]


def test_tied_head_and_embeddings_train_together_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = _model("llama-tied", torch.bfloat16)
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    for train in ("head", "embeddings"):
        caplog.clear()
        adaptation = adapt(model, [train], masks=None, views=[])
        assert "is tied" in caplog.text
        assert adaptation.groups[train][0] is table
        _train(model, adaptation)
        trained = _logits(model)
        adaptation.merge_()
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is table  # type: ignore[operator]
        assert torch.equal(_logits(model), trained)
    both = adapt(model, ["embeddings", "head"], masks=None, views=[])
    assert both.trainable == table.numel()  # counted once
    both.merge_()
    with pytest.raises(ValueError, match=r"trained by 'head' and by its adapter.*views"):
        adapt(model, ["head", "mask_lora"], masks=None, views=find_layers(model, include=["*"]))


def test_a_tied_layer_is_adapted_once_for_all_its_owners() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    adaptation = adapt(model, ["mask_lora"], masks=_pruned(model), views=find_layers(model), rank=2)
    x = torch.randn(3, 4)
    with torch.no_grad():
        adaptation.groups["mask_lora"][1].normal_()
    trained = model(x)
    adaptation.merge_()
    assert torch.equal(model(x), trained)
    assert model[2].weight is model[0].weight


def test_modules_that_read_the_weight_themselves() -> None:
    """Convolutions, and torch's attention, whose out_proj is a linear module that is never called."""
    for model, x in (
        (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 5, 5)),
        (nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)), torch.randn(2, 3, 4)),
    ):
        start = model(x)
        adaptation = adapt(model, ["mask_lora"], masks=None, views=find_layers(model), rank=2)
        torch.testing.assert_close(model(x), start)
        model(x).square().sum().backward()
        factors = adaptation.groups["mask_lora"]
        assert all(B.grad is not None and B.grad.any() for B in factors[1::2])
        with torch.no_grad():
            for B in factors[1::2]:
                B.normal_()
        trained = model(x)
        adaptation.merge_()
        torch.testing.assert_close(model(x), trained)
        assert not torch.equal(trained, start)


class Doubled(nn.Linear):
    """A linear module by inheritance that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_linear_module_with_a_forward_of_its_own_keeps_it() -> None:
    model, x = nn.Sequential(Doubled(4, 4)), torch.randn(3, 4)
    start = model(x)
    adaptation = adapt(model, ["mask_lora"], masks=None, views=find_layers(model), rank=2)
    assert torch.equal(model(x), start)
    with torch.no_grad():
        adaptation.groups["mask_lora"][1].normal_()
    trained = model(x)
    adaptation.merge_()
    assert torch.equal(model(x), trained)


def test_a_block_with_the_names_of_its_model() -> None:
    model = _model("llama")
    prefix, block = "model.layers.1", model.get_submodule("model.layers.1")
    views = find_layers(block, prefix=prefix)
    masks = _pruned(model)
    adaptation = adapt(block, ["norms", "mask_lora"], masks=masks, views=views, rank=2, prefix=prefix)
    _train(model, adaptation)
    trained = _logits(model)
    report = adaptation.merge_()
    assert set(report.difference) == {view.name for view in views}
    assert torch.equal(_logits(model), trained)
    masks.check(model)


def test_optimizer_groups_and_shares() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    adaptation = adapt(model, ["mask_lora", "biases", "norms"], masks=None, views=find_layers(model), rank=2)
    groups = {group["subset"]: group for group in adaptation.param_groups(0.1, {"norms": 0.3})}
    assert list(groups) == [name for name in SUBSETS if name in groups] == ["biases", "norms", "mask_lora"]
    assert {name: group["lr"] for name, group in groups.items()} == {"biases": 0.1, "norms": 0.3, "mask_lora": 0.1}
    assert (adaptation.trainable, adaptation.total) == (8 + 16 + 2 * (4 + 8), 32 + 8 + 16)
    torch.optim.AdamW(list(groups.values()))
    with pytest.raises(ValueError, match="'head', which is not trained; trained are biases, norms, mask_lora"):
        adaptation.param_groups(0.1, {"head": 1.0})


def test_what_is_pruned_and_trained_itself_is_named() -> None:
    model = tiny_llama()
    views = find_layers(model, include=["*"])
    masks = _pruned(model, views)
    adaptation = adapt(model, ["norms", "head"], masks=masks, views=views)
    assert adaptation.held is not None
    assert list(adaptation.held) == ["model.embed_tokens.weight"]
    adaptation.merge_()
    assert adapt(model, ["norms", "mask_lora"], masks=masks, views=views, rank=2).held is None


def test_many_zeros_without_a_mask_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    _pruned(model)
    adapt(model, ["mask_lora"], masks=None, views=find_layers(model))
    assert "many zeros, which will train, are in 1 layer without a mask" in caplog.text
