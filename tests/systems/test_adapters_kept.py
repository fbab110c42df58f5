"""Adapters kept on disk: saved, opened by peft and from peft, taken out, merged later; those of peft under a mask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prunus.adapt import Adaptation, adapt, mask_adapters
from prunus.language.single import compress
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.recipe import LanguageRecipe, parse
from prunus.run import cli
from prunus.run.merge import merge_adapter
from prunus.save import load_info
from tests.systems.test_families import FAMILIES

IDS = torch.arange(20).view(2, 10)
MAKERS = {"opt": "opt", "conv1d": "gpt2", "experts": "mixtral"}


def _model(family: str = "opt") -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def _pruned(model: nn.Module) -> Masks:
    views, generator = find_layers(model), torch.Generator().manual_seed(0)
    matrices = {view.name: torch.rand(view.shape, generator=generator) < 0.5 for view in views}
    masks = Masks.of(views, matrices, {name: p.shape for name, p in model.named_parameters()})
    masks.apply_(model)
    return masks


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def _train(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()


def _trained(model: nn.Module, masks: Masks | None, train: list[str], seed: int = 0) -> Adaptation:
    generator = torch.Generator().manual_seed(seed)
    found = adapt(model, train, masks=masks, views=find_layers(model), rank=2, generator=generator)
    _train(model, [each for group in found.groups.values() for each in group])
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


@pytest.mark.parametrize("family", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_a_kept_adapter_merges_to_the_same_bits(family: str, kind: str, tmp_path: Path) -> None:
    dense = _model(family)
    before = _state(dense)
    masks = _pruned(dense)
    adaptation = _trained(dense, masks, ["norms", kind])
    adaptation.save(tmp_path / "adapter", base="here")
    adaptation.merge_()
    wanted = _state(dense)

    dense.load_state_dict(before)  # the dense model: the masks lie beside the adapter
    Adaptation.load(tmp_path / "adapter", dense).merge_()
    assert all(torch.equal(each, wanted[name]) for name, each in dense.state_dict().items())
    masks.check(dense)
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()  # peft would forget the mask


def test_adapters_take_turns_on_one_base(tmp_path: Path) -> None:
    model = _model()
    masks = _pruned(model)
    base, found = _state(model), dict[str, Tensor]()
    for seed, name in enumerate("ab"):
        adaptation = _trained(model, masks, ["norms", "mask_lora"], seed)
        found[name] = _logits(model)
        adaptation.save(tmp_path / name)
        adaptation.merge_()
        model.load_state_dict(base)
    for name in "aba":
        adaptation = Adaptation.load(tmp_path / name, model, keep=True)
        assert torch.equal(_logits(model), found[name])
        adaptation.remove_()
        assert all(torch.equal(each, base[key]) for key, each in model.state_dict().items())
    with pytest.raises(ValueError, match="merged already, or removed"):
        adaptation.remove_()
    with pytest.raises(ValueError, match=r"norm.*trained in place.*keep=True"):
        Adaptation.load(tmp_path / "a", model).remove_()


def test_a_model_that_an_adapter_does_not_fit_is_as_it_was(tmp_path: Path) -> None:
    layers = [nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4, bias=False)]
    one, other = nn.Sequential(*layers[:2]).bfloat16(), nn.Sequential(layers[0], layers[2]).bfloat16()
    adaptation = adapt(one, ["norms", "mask_lora"], masks=None, views=find_layers(one), rank=2)
    adaptation.save(tmp_path / "adapter")
    adaptation.merge_()
    before = {name: (each.dtype, each.requires_grad, each) for name, each in other.named_parameters()}
    with pytest.raises(ValueError, match=r"'1\.bias' is \(4,\); this model has None there"):
        Adaptation.load(tmp_path / "adapter", other)
    assert [type(each) for each in other] == [nn.Linear, nn.LayerNorm]
    assert {name: (each.dtype, each.requires_grad, each) for name, each in other.named_parameters()} == before


@pytest.mark.parametrize("family", ["opt", "gpt2"])
@pytest.mark.parametrize("train", [["lora"], ["norms", "lora"]], ids=["alone", "with norms"])
def test_peft_opens_ours(family: str, train: list[str], tmp_path: Path) -> None:
    model = _model(family)
    adaptation = _trained(model, None, train)
    wanted = _logits(model)
    adaptation.save(tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(_model(family), str(tmp_path / "adapter"))
    torch.testing.assert_close(_logits(opened), wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_ours_opens_peft(rslora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], use_rslora=rslora)
    model = peft.get_peft_model(_model(), config)
    _train(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(str(tmp_path / "adapter"))
    own = _model()
    Adaptation.load(tmp_path / "adapter", own).merge_()
    torch.testing.assert_close(_logits(own), _logits(model.merge_and_unload()))


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("alora_invocation_tokens", [3])],
)
def test_adapters_that_peft_does_not_just_add_to_the_base_are_refused(key: str, value: object, tmp_path: Path) -> None:
    peft.get_peft_model(_model(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"more than plain LoRA.*{key}.*merge it with peft"):
        Adaptation.load(tmp_path, _model())


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_peft_trains_and_merges_under_the_mask(family: str, tmp_path: Path) -> None:
    base = _model(family)
    masks = _pruned(base)
    layers = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "fc1"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=layers, fan_in_fan_out=family == "gpt2")
    model = mask_adapters(peft.get_peft_model(base, config), masks)
    _train(model, [p for p in model.parameters() if p.requires_grad])
    trained = _logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(_logits(model), trained)
    merged = model.merge_and_unload()
    masks.check(merged)
    torch.testing.assert_close(_logits(merged), trained)

    own = _model(family)  # and the mask that it was trained under makes it ours
    masks.apply_(own)
    Adaptation.load(tmp_path / "adapter", own, masks=masks).merge_()
    torch.testing.assert_close(own.state_dict(), merged.state_dict())


def test_the_masked_forward_is_the_gradient_of_the_masked_weight() -> None:
    """dA and dB are those of x (W + c M*(BA))^T written out, with dropout's mask applied to x."""
    torch.manual_seed(0)
    x, mask = torch.randn(3, 6), torch.rand(4, 6) < 0.5
    layer = nn.Sequential(nn.Linear(6, 4))
    layer[0].weight.data.mul_(mask)
    model = peft.get_peft_model(layer, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    mask_adapters(model, Masks({"0.weight": mask}))
    A, B = (model.base_model.model[0].get_submodule(f"lora_{each}.default").weight for each in "AB")
    found = torch.autograd.grad(model(x).square().sum(), (A, B))
    weight = layer[0].base_layer.weight + 2.0 * mask * (B @ A)
    wanted = torch.autograd.grad(nn.functional.linear(x, weight, layer[0].base_layer.bias).square().sum(), (A, B))
    torch.testing.assert_close(found, wanted)


def test_what_masked_adapters_refuse() -> None:
    model = _model()
    masks = _pruned(model)
    dora = peft.get_peft_model(_model(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="drop use_dora"):
        mask_adapters(dora, masks)
    biased = peft.get_peft_model(_model(), peft.LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ValueError, match="drop lora_bias"):
        mask_adapters(biased, masks)
    plain = peft.get_peft_model(_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"nonzero weights under its mask.*apply_"):
        mask_adapters(plain, masks)
    with pytest.raises(ValueError, match="masks name no layer with LoRA"):
        mask_adapters(model, masks)


def test_what_is_refused_with_the_mend(tmp_path: Path) -> None:
    model = _model()
    masks = _pruned(model)
    adaptation = _trained(model, masks, ["mask_lora"])
    adaptation.save(tmp_path / "adapter", base="runs/pruned")
    adaptation.save(tmp_path / "adapter")  # its own files are replaced
    adaptation.save(tmp_path / "adapter", base="runs/pruned")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"thesis.txt.*not replaced"):
        adaptation.save(tmp_path / "other")
    adaptation.remove_()
    with pytest.raises(FileNotFoundError, match="has no adapter_model"):
        Adaptation.load(tmp_path / "other", model)
    with pytest.raises(ValueError, match="trained under other masks"):
        Adaptation.load(tmp_path / "adapter", model, masks=Masks({name: ~mask for name, mask in masks.items()}))
    with pytest.raises(ValueError, match="which GPT2LMHeadModel does not have"):
        Adaptation.load(tmp_path / "adapter", _model("gpt2"))
    before = _state(model)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight.mul_(1.5)  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=r"other weights: 'model.decoder.layers.1.fc1'.*belongs on, runs/pruned"):
        Adaptation.load(tmp_path / "adapter", model)
    model.load_state_dict(before)
    shutil.move(tmp_path / "adapter" / "masks.safetensors", tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match=r"lacks masks\.safetensors, without which merging would fill"):
        Adaptation.load(tmp_path / "adapter", model)
    shutil.move(tmp_path / "masks.safetensors", tmp_path / "adapter" / "masks.safetensors")
    info = tmp_path / "adapter" / "prunus_adapter.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        Adaptation.load(tmp_path / "adapter", model)
    right = json.loads(info.read_text()) | {"format": 1}
    odd = {"rank": "2", "alpha": None, "views": "fc1", "train": [1], "base": {"path": "x"}, "files": {}}
    for found, said in (
        ([], "has format None"),
        ({"format": 1, "rank": 2}, "says no 'alpha'; it was edited"),
        *((right | {key: value}, f"says {key}: .*it was edited") for key, value in odd.items()),
    ):
        info.write_text(json.dumps(found))
        with pytest.raises(ValueError, match=said):
            Adaptation.load(tmp_path / "adapter", model)
    whole = adapt(model, ["full"], masks=masks, views=find_layers(model))
    with pytest.raises(ValueError, match="no adapter: merge and save the model"):
        whole.save(tmp_path / "whole")


def _run(tiny: Path, text: Path, out: Path, **changes: object) -> LanguageRecipe:
    """A short run that keeps its adapter."""
    retrain = {"data": str(text), "train": ["norms", "mask_lora"], "steps": 2, "batch_size": 4, "length": 32}
    small = {"data": str(text), "length": 32, "samples": 4}
    kept = {"retrain": {**retrain, "lr": 0.01, "rank": 2, "keep_adapter": True}}
    raw = {"model": str(tiny), "device": "cpu", "calibrate": small, "evaluate": {"data": str(text), "window": 32}}
    raw = {**raw, **kept, "prune": {"criterion": "magnitude"}, "out": str(out), **changes}
    return parse(raw, LanguageRecipe, "test")


@pytest.mark.parametrize(("criterion", "shrink"), [("magnitude", None), ("sparsegpt", None), ("magnitude", "neurons")])
def test_a_run_keeps_its_adapter_and_merge_makes_its_model(
    criterion: str,
    shrink: str | None,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    smaller = {"shrink": {shrink: 0.25}} if shrink else {}
    compress(_run(tiny_folder, text_file, out, prune={"criterion": criterion, "sparsity": 0.5}, **smaller))
    moves = criterion != "magnitude" or shrink is not None
    base = out / "pruned" if moves else tiny_folder
    assert (out / "pruned").exists() == moves
    said = json.loads((out / "adapter" / "prunus_adapter.json").read_text())
    assert said["base"]["path"] == str(base)
    row = merge_adapter(str(base), out / "adapter", tmp_path / "merged", device="cpu")
    assert row["zeros"] == pytest.approx(0.5, abs=0.01)
    merged, wanted = (load_file(each / "model.safetensors") for each in (tmp_path / "merged", out / "model"))
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(each, wanted[name]) for name, each in merged.items())
    assert load_info(tmp_path / "merged")["adapter"]["train"] == ["norms", "mask_lora"]

    assert merge_adapter(str(base), out / "adapter", tmp_path / "merged", device="cpu") == row  # its own is replaced
    with pytest.raises(ValueError, match="holds another model; give the merged one a folder of its own"):
        merge_adapter(str(base), out / "adapter", out / "model", device="cpu")
    assert load_file(out / "model" / "model.safetensors").keys() == wanted.keys()

    folders = [str(each) for each in (out / "model", out / "adapter", tmp_path / "again")]
    monkeypatch.setattr("sys.argv", ["prunus", "merge", *folders, "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2  # the merged model is not what it belongs on
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="lie in each other"):
        merge_adapter(str(base), out / "adapter", base / "merged")
    if shrink:
        with pytest.raises(ValueError, match="trained on other weights"):
            merge_adapter(str(tiny_folder), out / "adapter", tmp_path / "dense", device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrain": {"train": ["full"], "keep_adapter": True}}, r"keep_adapter: train: \[full\] changes"),
        ({"retrain": {"train": ["norms"], "add_biases": True, "keep_adapter": True}}, "keep_adapter: add_biases"),
        ({"soup": {"members": 2}}, "keep_adapter: of one retraining"),
        ({"prune": {"criterion": "magnitude", "phases": 2}}, "keep_adapter: of one retraining"),
    ],
)
def test_recipes_that_cannot_keep_one(
    changes: dict[str, object], message: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        _run(tiny_folder, text_file, tmp_path / "run", **changes)
