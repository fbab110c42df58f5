"""A criterion of your own against Wanda, without touching the library: a score is a function of one layer.

python examples/own_criterion.py
"""
# ruff: noqa: T201

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.data.texts import ASSETS


def symmetric(layer: prunus.Layer) -> torch.Tensor:
    """|W_ij| * ||X_j||_2 / ||W_i||_2, (out, in) float32: Wanda's score, with rows of small weights not despised."""
    return prunus.wanda(layer) / layer.weight.float().norm(dim=1, keepdim=True)


def main() -> None:
    """Prune to 60 % by both, over whole layers, and show perplexities."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    text = prunus.tokenize(prunus.read_texts("embedded", split="train"), tokenizer)
    test = prunus.tokenize(prunus.read_texts("embedded", split="validation"), tokenizer)[:1024]
    windows = prunus.calibration(text, samples=16, length=128, seed=0)
    for score in (prunus.wanda, symmetric):
        model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype="float32").eval()
        prunus.stream(model, score, prunus.Unstructured("layer"), 0.6, tokens=windows)
        print(f"{getattr(score, '__name__', '?'):<10}{prunus.perplexity(model, test, window=256, batch_size=8):8.2f}")


if __name__ == "__main__":
    main()
