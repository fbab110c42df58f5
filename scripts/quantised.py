"""Pruned models quantised by torchao as its users do: perplexity after, and whether zeros stay zeros.

    python scripts/quantised.py embedded runs/two-four/model --out docs/results/smaller/quantised [--device cpu]

Every model is a row for each kind of quantised weights. The first one is also pruned to 2:4 by magnitude before and
after quantising, which shows what the order costs. Needs torchao (`prunus[float8]`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus import load_model, magnitude, perplexity, prune
from prunus.data import ASSETS, read_texts, tokenize_documents
from prunus.machine import import_extra, write_json, write_text
from prunus.patterns import NM
from prunus.report import markdown_table


def kinds() -> dict[str, Any]:
    """Kind -> torchao's config, None for weights as they are."""
    api = import_extra("torchao.quantization", "float8", "quantising needs torchao")
    return {
        "float32": None,
        "int8": api.Int8WeightOnlyConfig(),
        "int8, inputs too": api.Int8DynamicActivationInt8WeightConfig(),
        "int4 in groups of 32": api.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=api.PerGroup(32)),
        "float8": api.Float8WeightOnlyConfig(),
    }


def quantise_(model: nn.Module, kind: str) -> None:
    config = kinds()[kind]
    if config is not None:
        head = getattr(model, "lm_head", None)
        import_extra("torchao.quantization", "float8", "quantising needs torchao").quantize_(
            model, config, lambda module, _: isinstance(module, nn.Linear) and module is not head
        )


@torch.no_grad()
def dequantise_(model: nn.Module) -> None:
    """Ordinary weights with the values of the quantised ones."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = nn.Parameter(module.weight.dequantize().float())


def two_four_(model: nn.Module) -> None:
    prune(model, magnitude, NM(2, 4), None)


def row(name: str, folder: str, steps: list[Callable[[nn.Module], None]], said: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on the embedded test text, and the share of zeros in Linear layers, after the steps."""
    from transformers import AutoTokenizer

    place = Path(ASSETS if folder == "embedded" else folder)
    model, tokenizer = load_model(place, torch.float32).to(said.device), AutoTokenizer.from_pretrained(place)
    for step in steps:
        step(model)
    text = tokenize_documents(read_texts(ASSETS / "text" / "test.txt"), tokenizer)[: said.tokens]
    found = perplexity(model, text.to(said.device), window=512, batch_size=8)
    dequantise_(model)
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    zeros = sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)
    return {"model": name, "perplexity": found, "zeros": zeros}


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("models", nargs="+")
    ask.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.md")
    ask.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ask.add_argument("--tokens", type=int, default=1 << 30, help="of the test text, at most")
    said = ask.parse_args()
    rows = [
        row(f"{folder}, {kind}", folder, [lambda model, kind=kind: quantise_(model, kind)], said)
        for folder in said.models
        for kind in kinds()
    ]
    for kind in ("int8", "int4 in groups of 32"):
        first, quantise = said.models[0], lambda model, kind=kind: quantise_(model, kind)
        rows.append(row(f"{first}, 2:4 by magnitude, then {kind}", first, [two_four_, quantise], said))
        rows.append(row(f"{first}, {kind}, then 2:4", first, [quantise, dequantise_, two_four_], said))
    write_json(said.out.with_suffix(".json"), rows)
    shown = [{**each, "zeros": f"{100 * each['zeros']:.1f} %"} for each in rows]
    write_text(said.out.with_suffix(".md"), markdown_table(shown) + "\n")


if __name__ == "__main__":
    main()
