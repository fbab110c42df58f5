"""When autocast is left out: the same loss and nearly the same gradients, and only where all is stored alike."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import logging as said

from prunus.adapt.adapt import adapt
from prunus.layers import find_layers
from prunus.machine import Precision, autocast, full_products, of_training, quiet, without_bars
from prunus.train.next_token import next_token_loss
from tests.conftest import VOCABULARY, tiny_llama


def test_autocast_is_left_out_only_where_everything_is_stored_in_its_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert of_training(model, "bf16") == "bf16"
    assert of_training(model.bfloat16(), "bf16") == "fp32"
    assert of_training(model, "fp16") == "fp16"
    model[1].float()
    assert of_training(model, "bf16") == "bf16", "a float32 norm would hand float32 on to a bfloat16 layer"


@pytest.mark.parametrize("subset", ["norms", "mask_lora", "scale_lora", "lora_prune", "head"])
def test_gradients_differ_from_those_under_autocast_by_rounding(subset: str) -> None:
    model = tiny_llama().bfloat16().train()
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    adaptation = adapt(model, [subset], masks=None, views=find_layers(model), rank=2, init="gaussian")
    trained = [each for group in adaptation.groups.values() for each in group]

    def gradient(precision: Precision) -> tuple[Tensor, Tensor]:
        with autocast(torch.device("cpu"), precision):
            loss = next_token_loss(model, ids)
        return loss.detach(), torch.cat([each.flatten() for each in torch.autograd.grad(loss, trained)])

    (loss, own), (expected, cast) = gradient("fp32"), gradient("bf16")
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert own.dtype == torch.float32
    assert (own - cast).norm() <= 0.05 * cast.norm()


def test_products_are_full_until_the_last_thread_has_left() -> None:
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        first, second = full_products(), full_products()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert products.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


def test_messages_and_bars_are_as_before_when_the_last_thread_has_left() -> None:
    before = said.get_verbosity(), said.is_progress_bar_enabled()
    first, second = quiet(logging.ERROR), quiet(logging.CRITICAL)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (said.get_verbosity(), said.is_progress_bar_enabled()) == (logging.CRITICAL, False)
    second.__exit__(None, None, None)
    assert (said.get_verbosity(), said.is_progress_bar_enabled()) == before
    with quiet(logging.CRITICAL):
        with pytest.raises(ZeroDivisionError), quiet(logging.ERROR), without_bars():
            raise ZeroDivisionError
        assert said.get_verbosity() == logging.CRITICAL
    assert (said.get_verbosity(), said.is_progress_bar_enabled()) == before
