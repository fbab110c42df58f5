"""Adapters of peft that respect a mask, so that whatever trains them (Trainer, TRL) trains a sparse model.

    y = x W^T + c x (M*(BA))^T      forward, and W + c M*(BA) in merge_and_unload: MaskLoRA in peft's own modules

It is put in as peft's own variants of LoRA (DoRA, ...) are; nothing of the weight's size is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapt.effective import Terms, effective_linear, effective_weight
from prunus.machine import import_extra
from prunus.masks import Masks, pack, unpack


def mask_adapters(model: Any, masks: Masks) -> Any:
    """The same peft model, whose LoRA layers from now on add nothing where `masks` prune, trained or merged.

    model: of `peft.get_peft_model`, or `PeftModel.from_pretrained`. masks: under the names of the model inside it.
    Adapters that are added later need another call. Raises: ImportError without peft; ValueError for a model without
    LoRA on a masked layer, layers other than linear ones, variants such as DoRA, nonzero weights under the mask.

    >>> config = peft.LoraConfig(target_modules="all-linear")  # doctest: +SKIP
    >>> model = mask_adapters(peft.get_peft_model(model, config), masks)  # doctest: +SKIP
    """
    lora: Any = import_extra("peft.tuners.lora", "peft", "mask_adapters is of models of peft")
    found = 0
    for name, module in model.named_modules():
        mask = masks.get(f"{name.removeprefix('base_model.model.')}.weight")
        if mask is None or not isinstance(module, lora.LoraLayer):
            continue
        _check(name, module, mask, lora.Linear)
        kept = mask.t() if module.fan_in_fan_out else mask
        for adapter in module.lora_A:
            module.lora_variant[adapter] = _Masked(pack(kept.contiguous()), module.fan_in_fan_out)
        found += 1
    if not found:
        raise ValueError("masks name no layer with LoRA: give a model of peft.get_peft_model and its base's masks")
    return model


@dataclass
class _Masked:
    """What peft calls in place of its plain LoRA. packed: the mask of (out, in), on the device that used it last."""

    packed: Tensor
    transposed: bool

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        x = module.lora_dropout[active_adapter](x)
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        nothing = x.new_zeros(()).expand(B.shape[0], A.shape[1])
        self.packed = self.packed.to(x.device)
        terms = Terms(nothing, A.float(), B.float(), self.packed, module.scaling[active_adapter])
        return result + effective_linear(x, terms)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return self._with(module, active_adapter, orig_weight, 1.0)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: nn.Parameter) -> None:
        orig_weight.data = self._with(module, active_adapter, orig_weight.data, 1.0)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return self._with(module, active_adapter, orig_weight.data, -1.0)

    @torch.no_grad()
    def _with(self, module: Any, adapter: str, weight: Tensor, sign: float) -> Tensor:
        """W + sign c M*(BA), rounded once, +0.0 where it is pruned."""
        W = weight.t() if self.transposed else weight
        A, B = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
        packed = self.packed.to(W.device)
        merged = effective_weight(Terms(W, A, B, packed, sign * module.scaling[adapter]))
        merged.masked_fill_(~unpack(packed, W.shape[1]), 0.0)
        return merged.t().contiguous() if self.transposed else merged


def _check(name: str, module: Any, mask: Tensor, linear: type) -> None:
    if not isinstance(module, linear) or any(type(each) is not _Masked for each in module.lora_variant.values()):
        raise ValueError(f"'{name}' is no plain LoRA of a linear layer: take it from target_modules, or drop use_dora")
    if any(each.bias is not None for each in module.lora_B.values()):
        raise ValueError(f"'{name}' has a LoRA with a bias, which a mask does not go with: drop lora_bias")
    weight: Tensor = module.get_base_layer().weight
    if weight.shape != mask.shape:
        raise ValueError(f"'{name}' has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}: of another model")
    wrong = int(((weight != 0) & ~mask.to(weight.device)).sum())
    if wrong:
        raise ValueError(f"'{name}' has {wrong} nonzero weights under its mask: call masks.apply_(model) first")
