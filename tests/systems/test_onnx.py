"""Pruned and smaller models go through ONNX Runtime with the logits that they have here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import prunus
from prunus.patterns import NM
from prunus.shrink import remove_blocks, remove_neurons

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_logits_are_equal_at_every_length(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_hidden_layers=2, **sizes)).eval()
    ids = torch.randint(0, 60, (2, 16))
    prunus.prune(model, prunus.magnitude, NM(2, 4), None)
    for place, each in enumerate((model, remove_neurons(remove_blocks(model, [0]), ids, 0.25))):
        wrapped, path = Logits(each).eval(), tmp_path / f"{place}.onnx"
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        torch.onnx.export(
            wrapped, (ids,), path, dynamo=True, dynamic_shapes=(free,), input_names=["ids"], verbose=False
        )
        session = onnxruntime.InferenceSession(path)
        for x in (ids, ids[:1, :7]):
            with torch.no_grad():
                expected = wrapped(x)
            found = torch.from_numpy(session.run(None, {"ids": x.numpy()})[0])
            assert torch.allclose(found, expected, atol=1e-5)
