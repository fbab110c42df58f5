"""Prune the embedded model to 2:4 with SparseGPT, train its norms and biases, save it. About five seconds on a CPU.

python examples/compress.py
"""
# ruff: noqa: T201

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.data.texts import ASSETS

SPARSE = "runs/example"
model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype="float32").eval()  # any causal language model
tokenizer = AutoTokenizer.from_pretrained(ASSETS)
text = prunus.tokenize(prunus.read_texts("embedded", split="train"), tokenizer)
test = prunus.tokenize(prunus.read_texts("embedded", split="test"), tokenizer)[:1024]


def show(stage: str) -> None:
    """One line: the stage and its perplexity."""
    print(f"{stage:<10}{prunus.perplexity(model, test, window=256, batch_size=8):8.2f}")


show("dense")
windows = prunus.calibration(text, samples=16, length=128, seed=0)
masks = prunus.stream(model, prunus.sparsegpt(), prunus.NM(2, 4), 0.5, tokens=windows).masks
show("pruned")

adaptation = prunus.adapt(model, ["norms", "biases"], masks=masks, views=prunus.find_layers(model))
packed = prunus.PackedTokens(text, length=128)
prunus.train(
    model,
    lambda step: packed.at(step, batch=4, seed=0),
    torch.optim.AdamW(adaptation.param_groups(1e-3), weight_decay=0.0),
    prunus.linear_warmup_decay(8),
    steps=8,
)
adaptation.merge_()
show("retrained")

saved = prunus.save_model(model, tokenizer, SPARSE, masks=masks, info={"pattern": "2:4"}, source=ASSETS)
print(f"{saved.folder}: {saved.weight_bytes / 1e6:.1f} MB, as large as the dense model")
