"""Biases that the saved config can express: added, trained, saved and loaded back; others refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from prunus.adapt.adapt import adapt
from prunus.adapt.biases import add_biases
from prunus.adapt.subsets import find_subset
from tests.systems.test_families import FAMILIES

IDS = torch.arange(20).view(2, 10)


def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def test_added_biases_load_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = _model("llama")
    start = _logits(model)
    names = add_biases(model)
    assert len(names) == 14
    assert set(names) == set(find_subset(model, "biases"))
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, True)  # type: ignore[union-attr]
    assert "1 linear layers of LlamaForCausalLM stay without a bias: lm_head" in caplog.text
    assert torch.equal(_logits(model), start)
    adaptation = adapt(model, ["biases"], masks=None, views=[])
    with torch.no_grad():
        for bias in adaptation.groups["biases"]:
            bias.normal_(0, 0.1)
    adaptation.merge_()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again), _logits(model))
    assert not torch.equal(_logits(model), start)


@pytest.mark.parametrize("family", ["mistral", "opt", "gpt2", "mixtral"])
def test_biases_that_no_config_can_express_are_refused(family: str) -> None:
    model = _model(family)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=rf"{type(model).__name__} builds no further biases"):
        add_biases(model)
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        add_biases(nn.Linear(2, 2, bias=False))


class OddConfig(tf.PreTrainedConfig):
    """Entries named like a bias that do other things than to add one."""

    model_type = "odd"

    def __init__(self, **entries: Any) -> None:
        self.layer_bias = entries.pop("layer_bias", False)
        self.table_bias = entries.pop("table_bias", False)  # adds a parameter of two dimensions, named bias
        self.wide_bias = entries.pop("wide_bias", False)  # adds a bias and changes a weight
        self.new_bias = entries.pop("new_bias", False)  # adds a whole layer
        self.gated_bias = entries.pop("gated_bias", False)  # exchanges a layer
        self.biased_already = entries.pop("biased_already", False)
        super().__init__(**entries)


class Gated(nn.Linear):
    """Not what it replaces."""


class Odd(tf.PreTrainedModel):
    """A model with one linear layer for each entry of its config."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(4, 4, bias=config.layer_bias)
        self.table = nn.Linear(4, 4, bias=False)
        self.table.bias = nn.Parameter(torch.zeros(4, 4)) if config.table_bias else None
        self.wide = nn.Linear(4, 8 if config.wide_bias else 4, bias=config.wide_bias)
        self.gated = (Gated if config.gated_bias else nn.Linear)(4, 4, bias=config.gated_bias)
        if config.new_bias:
            self.new = nn.Linear(4, 4)
        self.post_init()


def test_only_entries_that_do_nothing_but_add_a_bias_are_turned_on() -> None:
    model = Odd(OddConfig())
    assert add_biases(model) == ["layer.bias"]
    on = {name for name, value in vars(model.config).items() if "bias" in name and value}
    assert on == {"layer_bias"}
    with pytest.raises(ValueError, match="Odd builds no further biases"):
        add_biases(model)
