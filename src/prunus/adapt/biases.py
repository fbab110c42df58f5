"""Give the layers of a transformers model zero biases that its saved config can express.

A model loads from its config and its tensors, so a bias may only be added where an entry of the config makes the class
build one. Such entries are found by trying them: the class is built without memory (on "meta") with each False entry
whose name contains "bias" turned on, and the tensors that appear are compared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

_Entry = tuple[str, ...]  # the way from model.config to the entry: ("text_config", "attention_bias")


def add_biases(model: nn.Module) -> list[str]:
    """The names of the zero biases given to `model` in place; its config is changed so that the saved model loads.

    An entry is used only if all it does is to add one-dimensional biases to modules that stay as they are, so outputs
    do not change. Linear layers that no entry reaches are logged.

    Raises: ValueError if the model is not from transformers or none of its entries can be used, naming its class.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    >>> add_biases(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))[0]
    'model.layers.0.self_attn.q_proj.bias'
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{kind} is not a transformers model: no config could say that its layers have biases")
    entries = [entry for entry in _entries(model.config) if _new_biases(model, [entry])]
    new = _new_biases(model, entries) if entries else {}
    if not new:
        raise ValueError(
            f"{kind} builds no further biases, whatever its config says, so biases given to it could not be loaded "
            "again. Train 'norms' or an adapter ('mask_lora') instead."
        )
    for name, length in new.items():
        module = model.get_submodule(name.rpartition(".")[0])
        weight = module.get_parameter("weight")
        module.register_parameter("bias", nn.Parameter(weight.new_zeros(length)))
    _turn_on(model.config, entries)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    without = [name for name in linear if model.get_submodule(name)._parameters.get("bias") is None]
    if without:
        log.info("%d linear layers of %s stay without a bias: %s", len(without), kind, ", ".join(without))
    return list(new)


def _entries(config: PreTrainedConfig, way: _Entry = ()) -> Iterator[_Entry]:
    """The entries named like a bias that are False, in the config and in those inside it."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _entries(value, (*way, name))
        elif value is False and "bias" in name:
            yield (*way, name)


def _turn_on(config: PreTrainedConfig, entries: Sequence[_Entry]) -> None:
    for *way, name in entries:
        inner = config
        for step in way:
            inner = getattr(inner, step)
        setattr(inner, name, True)


def _new_biases(model: PreTrainedModel, entries: Sequence[_Entry]) -> dict[str, int]:
    """Name -> length of the biases that the entries add, in the order of the model; none if they do anything else."""
    config = copy.deepcopy(model.config)
    _turn_on(config, entries)
    with torch.device("meta"):
        built = type(model)(config)
    before, after = model.state_dict(), built.state_dict()
    new = {name: tensor for name, tensor in after.items() if name not in before}
    same = all(name in after and after[name].shape == tensor.shape for name, tensor in before.items())
    if not same or not all(_is_plain_bias(model, built, name, tensor) for name, tensor in new.items()):
        return {}
    return {name: tensor.numel() for name, tensor in new.items()}


def _is_plain_bias(model: nn.Module, built: nn.Module, name: str, tensor: torch.Tensor) -> bool:
    """Whether the module is there already, of the same class, with a weight and room for a bias of one dimension."""
    path, _, attribute = name.rpartition(".")
    modules = dict(model.named_modules())
    if attribute != "bias" or tensor.ndim != 1 or path not in modules:
        return False
    own = modules[path]._parameters
    same = type(modules[path]) is type(built.get_submodule(path))
    return same and own.get("weight") is not None and "bias" in own and own.get("bias") is None
