"""Traps that published pruning tools fall into, one section each: what they do wrong, and that we do not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunus.adapt.adapt import adapt
from prunus.adapt.subsets import find_subset
from prunus.language.single import compress
from prunus.layers import Inputs, Layer, find_layers
from prunus.masks import Masks
from prunus.patterns import NM, Unstructured
from prunus.recipe import LanguageRecipe, parse
from prunus.score import Criterion
from prunus.score.allocations import global_
from prunus.score.criteria import magnitude, ria, wanda
from prunus.solve.frank_wolfe import frank_wolfe
from prunus.solve.sweep import sparsegpt
from prunus.stream.reconstruct import Fit
from prunus.stream.stream import stream
from prunus.train.train import train
from tests.conftest import VOCABULARY, tiny_llama
from tests.systems.test_families import FAMILIES

TOKENS = torch.randint(VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(1))


# Decoder layers return a tensor in some versions of transformers and a tuple in others: `layer(x)[0]` of a tensor is
# the first sample of the batch, and calibration goes on with that alone.


class Block(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.wrap = wrap

    def forward(self, hidden: Tensor) -> Any:
        return self.wrap(hidden + self.down(self.up(hidden).relu()))


class Chain(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList([Block(wrap) for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            out = layer(hidden)
            hidden = out if isinstance(out, Tensor) else out[0]
        return hidden


@pytest.mark.parametrize("fit", [None, Fit(steps=3, lr=1e-3)], ids=["pruned", "fitted"])
def test_blocks_may_return_a_tensor_or_a_tuple(fit: Fit | None) -> None:
    states: list[dict[str, Tensor]] = []
    for wrap in (lambda y: y, lambda y: (y,), lambda y: (y, None)):
        model = Chain(wrap)
        masks = stream(model, sparsegpt(), NM(2, 4), 0.5, tokens=TOKENS, batch_size=3, fit=fit).masks
        masks.check(model)
        states.append(model.state_dict())
    assert all(torch.equal(value, state[name]) for state in states[1:] for name, value in states[0].items())
    # and the last block was calibrated on every sample: one alone gives other masks
    one = stream(Chain(lambda y: y), sparsegpt(), NM(2, 4), 0.5, tokens=TOKENS[:1]).masks
    assert not torch.equal(one["layers.2.up.weight"], masks["layers.2.up.weight"])


# Norms chosen by a list of class names are none at all on a family that the list does not know.


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_every_family_are_found(family: str) -> None:
    model = FAMILIES[family][0]()
    by_name = {name for name, _ in model.named_parameters() if re.search(r"norm|\b(pre_)?ln", name)}
    assert set(find_subset(model, "norms")) == by_name
    adaptation = adapt(model, ["norms"], masks=None, views=[])
    assert adaptation.trainable == sum(model.get_parameter(name).numel() for name in by_name) > 0


# An ignore list that is matched against other names than the layers have ignores nothing.


@pytest.mark.parametrize("glob", ["down_proj", "mlp.down_proj", "model.layers.*.mlp.down_proj", "*down*"])
def test_excluded_layers_are_not_touched(glob: str) -> None:
    model, dense = tiny_llama(), tiny_llama()
    masks = stream(model, sparsegpt(), NM(2, 4), 0.5, tokens=TOKENS, exclude=[glob]).masks
    names = [name for name, _ in model.named_parameters() if "down_proj" in name]
    assert len(names) == 2
    assert not set(names) & set(masks)
    assert len(masks) == 12
    assert all(torch.equal(model.get_parameter(name), dense.get_parameter(name)) for name in names)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_list_that_would_do_nothing_is_refused(key: str) -> None:
    model, dense = tiny_llama(), tiny_llama()
    asked: dict[str, Any] = {key: ["up_proj", "dwon_proj"]}
    with pytest.raises(ValueError, match=r"'dwon_proj' matches none .*down_proj"):
        stream(model, sparsegpt(), NM(2, 4), 0.5, tokens=TOKENS, **asked)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())


def test_excluded_layers_of_the_whole_job_are_trained_by_no_adapter(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    result = compress(
        job(tiny_folder, text_file, tmp_path, prune={"pattern": "2:4", "exclude": ["down_proj", "q_proj"]})
    )
    assert not any("down_proj" in name or "q_proj" in name for name in result["pruning"]["by_layer"])
    saved, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", tiny_folder))
    for name, value in saved.named_parameters():
        changed = not torch.equal(value, dense.get_parameter(name))
        assert changed == ("_proj" in name and "down_proj" not in name and "q_proj" not in name), name


def job(folder: Path, text: Path, out: Path, **changes: Any) -> LanguageRecipe:
    raw = {
        "model": str(folder),
        "device": "cpu",
        "calibrate": {"data": str(text), "samples": 4, "length": 32},
        "retrain": {"data": str(text), "steps": 4, "batch_size": 4, "length": 32, "lr": 1e-2, "rank": 4},
        "evaluate": {"data": {"text": str(text)}, "window": 32, "batch_size": 128},
        "out": str(out),
    }
    return parse(raw | changes, LanguageRecipe, "test")


# Sparsities that mean nothing are taken and do something.

IMPOSSIBLE = [
    (Unstructured("row"), 1.5, "1.5"),
    (Unstructured("layer"), 1.0, "1.0"),
    (Unstructured("row"), -0.1, "-0.1"),
    (Unstructured("row"), float("nan"), "nan"),
    (NM(2, 4), 0.7, "2:4 fixes the sparsity at 0.5; got 0.7"),
    (NM(2, 4), 1.5, "1.5"),
]


@pytest.mark.parametrize(("pattern", "sparsity", "message"), IMPOSSIBLE)
def test_impossible_sparsities_are_refused_before_any_work(pattern: Any, sparsity: float, message: str) -> None:
    model, dense = tiny_llama(), tiny_llama()
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(model, magnitude, pattern, sparsity, tokens=TOKENS)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    text = str(pattern)
    with pytest.raises(ValueError, match=rf"recipe\.yaml: prune.*{re.escape(message)}"):
        parse({"prune": {"pattern": text, "sparsity": sparsity}}, LanguageRecipe, "recipe.yaml")
    with pytest.raises(ValueError, match=re.escape(message.rpartition(" ")[2])):
        pattern.counts((8, 8), sparsity)


# A failed Cholesky factorisation is caught, and the identity stands in: magnitude pruning under SparseGPT's name.


def singular() -> Layer:
    """float32 sums that rounding made indefinite: columns 0 and 1 nearly equal, their product a little too large."""
    inputs = Inputs(8, gram=True)
    inputs.add_(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    assert inputs.gram is not None
    inputs.gram[1] = inputs.gram[:, 1] = inputs.gram[0]
    inputs.gram[0, 1] = inputs.gram[1, 0] = 1.03 * inputs.gram[0, 0]
    inputs.gram[1, 1] = inputs.gram[0, 0]
    return Layer("fc", torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), inputs)


def test_a_failed_factorisation_is_damped_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    layer = singular()
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    assert float(torch.linalg.eigvalsh(layer.inputs.gram)[0]) < 0
    with caplog.at_level(logging.WARNING):
        weight, _ = sparsegpt(damping=1e-3).solve(layer, NM(2, 4), 16)
    (used,) = [float(found) for found in re.findall(r"'fc'.*raised to (\S+) of", caplog.text)][-1:]
    assert used > 1e-3
    assert torch.equal(weight, sparsegpt(damping=used).solve(layer, NM(2, 4), 16)[0])
    identity = Inputs(8, gram=True)
    identity.add_(torch.eye(8))
    assert not torch.allclose(weight, sparsegpt().solve(Layer("fc", layer.weight, identity), NM(2, 4), 16)[0])


# `score <= threshold` prunes every entry that equals the threshold: a constant row loses all of it.


@pytest.mark.parametrize("solver", [magnitude, wanda, ria, sparsegpt(), frank_wolfe()])
@pytest.mark.parametrize("pattern", [Unstructured("row"), Unstructured("layer"), NM(2, 4)])
def test_equal_scores_are_not_all_pruned(solver: Criterion, pattern: Any) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for view in find_layers(model):
            model.get_parameter(view.parameter).fill_(0.01)
        weight = model.get_input_embeddings().get_parameter("weight")
        weight.copy_(weight[:, :1].expand(-1, 32))
    masks = stream(model, solver, pattern, 0.5, tokens=TOKENS).masks
    assert all(int(mask.sum()) * 2 == mask.numel() for mask in masks.values())


def test_equal_scores_over_the_whole_model_are_not_all_pruned() -> None:
    scores = {name: torch.full((3, 5), 0.25) for name in "abc"}
    assert sum(global_(scores, 0.4).values()) == 27


# A subset that the model does not have trains nothing, and the table says "retrained".


@pytest.mark.parametrize(
    ("subset", "mend"), [("biases", "add_biases"), ("norms", "mask_lora"), ("head", "leave 'head'")]
)
def test_an_empty_subset_is_refused(subset: str, mend: str) -> None:
    model: nn.Module = tiny_llama() if subset == "biases" else nn.Sequential(nn.Linear(4, 4))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for others in ([], ["mask_lora"]):
        with pytest.raises(ValueError, match=rf"'{subset}' is empty in .*{mend}"):
            adapt(model, [*others, subset], masks=None, views=find_layers(model), rank=2)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_biases_of_llama_end_the_whole_job(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = job(tiny_folder, text_file, tmp_path, retrain={"data": str(text_file), "length": 32, "train": ["biases"]})
    with pytest.raises(ValueError, match="'biases' is empty in LlamaForCausalLM"):
        compress(asked)
    assert not (tmp_path / "model").exists()


# A mask read off the trained weights forgets those that pass through zero, and frees those that leave it.


@pytest.mark.parametrize("subset", ["full", "mask_lora"])
def test_kept_weights_that_are_zero_are_kept(subset: str) -> None:
    model = tiny_llama()
    names = [view.parameter for view in find_layers(model)]
    with torch.no_grad():
        for name in names:  # 70 % zeros before a pruning to 50 %: 20 % are kept and zero
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.7, 0.0)
    masks = stream(model, magnitude, Unstructured("layer"), 0.5, tokens=TOKENS).masks
    inferred = Masks({name: model.get_parameter(name) != 0 for name in names})
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert inferred.sparsity > 0.65
    adaptation = adapt(model, [subset], masks=masks, views=find_layers(model), rank=4)
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-2), weight_decay=0.0)
    held = masks if subset == "full" else None
    train(model, lambda step: TOKENS, optimizer, lambda step: 1.0, steps=3, masks=held)
    adaptation.merge_()
    for name in names:
        weight, mask = model.get_parameter(name), masks[name]
        assert not bool(weight[~mask].any()), name
        revived = weight[mask & ~inferred[name]]
        assert int((revived != 0).sum()) > 0.9 * revived.numel(), name  # trained like every kept weight


def test_the_saved_masks_are_those_chosen(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunus.language import stages

    original = stages.retrain

    def retrain(loaded: stages.Loaded, masks: Masks, *args: Any, **kwargs: Any) -> Any:
        report = original(loaded, masks, *args, **kwargs)
        with torch.no_grad():
            for name in masks:
                loaded.model.get_parameter(name)[:3] = 0.0  # as if training had ended on zero there
        return report

    monkeypatch.setattr(stages, "retrain", retrain)
    result = compress(job(tiny_folder, text_file, tmp_path, prune={"sparsity": 0.5}))
    masks = Masks.load(tmp_path / "model" / "masks.safetensors")
    assert masks.sparsity == result["pruning"]["sparsity"] == 0.5
    assert all(bool(mask[:3].any()) for mask in masks.values())
