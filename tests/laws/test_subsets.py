"""Subsets are found by structure, and an empty one is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunus.adapt.adapt import adapt
from prunus.adapt.subsets import find_subset
from tests.systems.test_families import FAMILIES


def _model(family: str) -> nn.Module:
    return FAMILIES[family][0]()


class Gain(nn.Module):
    """A norm that no list of class names holds, with names of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x / x.std() * self.gain + self.shift)


def test_norms_are_found_by_structure() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Gain(4), nn.ModuleDict({"inner": nn.LayerNorm(4)}), nn.Conv2d(1, 1, 1))
    assert list(find_subset(model, "norms")) == ["1.gain", "1.shift", "2.inner.weight", "2.inner.bias"]


def test_biases_are_those_of_matrices() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))
            self.bias = nn.Parameter(torch.zeros(3))
            self.e_score_correction_bias = nn.Parameter(torch.zeros(3))  # reached by no gradient

    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), Router(), nn.MultiheadAttention(4, 1))
    names = ["1.bias", "2.bias", "3.in_proj_bias", "3.out_proj.bias"]
    assert list(find_subset(model, "biases")) == names
    oss = list(find_subset(_model("gpt-oss"), "biases"))
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in oss


@pytest.mark.parametrize(
    ("family", "subset", "mend"),
    [("llama", "biases", "add_biases"), ("mistral", "biases", "add_biases")],
)
def test_an_empty_subset_is_refused(family: str, subset: str, mend: str) -> None:
    model = _model(family)
    with pytest.raises(ValueError, match=rf"'{subset}' is empty in {type(model).__name__}.*{mend}"):
        adapt(model, ["norms", subset], masks=None, views=[])
    assert all(p.requires_grad for p in model.parameters())  # nothing was changed
    for name in ("head", "embeddings", "norms"):
        with pytest.raises(ValueError, match=f"'{name}' is empty in Linear"):
            adapt(nn.Linear(2, 2), [name], masks=None, views=[])
    with pytest.raises(ValueError, match=r"'mask_lora' is empty.*views"):
        adapt(model, ["mask_lora"], masks=None, views=[])
