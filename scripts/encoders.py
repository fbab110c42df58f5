"""A table of an encoder of texts, pruned and distilled: how near its embeddings stay to the dense model's.

    python scripts/encoders.py MODEL TEXTS --out docs/results/encoders [--steps 200] [--batch 32] [--held 1000]

MODEL: a folder of an encoder of transformers whose embeddings are means of the last hidden state (all-MiniLM-L6-v2).
TEXTS: a file of texts, which are cut into sentences; some calibrate, some are held out, the others are distilled on.

    dense -> prune (Wanda, SparseGPT; 50 %, 2:4) -> retrain (norms and biases, MaskLoRA, everything) -> fidelity

Fidelity is the mean cosine between pruned and dense embeddings of the held-out sentences; beside it stands Spearman's
correlation between the cosines of pairs of them, pruned against dense. A row that is in OUT.json already is kept.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from prunus import Masks, adapt, find_layers, prune, train, wanda
from prunus.data import read_texts
from prunus.machine import read_json, write_json, write_text
from prunus.patterns import NM, Pattern, Unstructured
from prunus.solve import sparsegpt
from prunus.train import distilled_embeddings, embeddings, linear_warmup_decay

CALIBRATION = 256
CRITERIA = {"Wanda": wanda, "SparseGPT": sparsegpt()}
PATTERNS: dict[str, Pattern] = {"50 %": Unstructured("row"), "2:4": NM(2, 4)}
SUBSETS = {"MaskLoRA": ("mask_lora", "norms", "biases"), "norms, biases": ("norms", "biases"), "everything": ("full",)}
RATES = {"norms, biases": 1e-3, "MaskLoRA": 5e-4, "everything": 1e-4}


def sentences(path: str) -> list[str]:
    """The sentences of 5 to 40 words of a file's texts, in an order of their own, each once."""
    found = dict.fromkeys(
        each.strip()
        for text in read_texts(path)
        for each in re.split(r"(?<=[.!?])\s+|\n", text)
        if 5 <= len(each.split()) <= 40
    )
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    return shuffled


def batched(tokenizer: Any, texts: list[str], size: int, options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Batches of the tokenizer, padded to the longest of each."""
    how = {"padding": True, "truncation": True, "max_length": options.length, "return_tensors": "pt"}
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [dict(tokenizer(part, **how).to(options.device)) for part in parts]


@torch.no_grad()
def embedded(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """The embeddings (texts, d) of all batches."""
    model.eval()
    return torch.cat([embeddings(model, batch) for batch in batches])


def fidelity(pruned: Tensor, dense: Tensor) -> dict[str, float]:
    """Mean cosine of the same text's two embeddings, and Spearman's correlation of cosines of pairs of texts."""
    half = len(dense) // 2
    ranks = [(each[:half] * each[half : 2 * half]).sum(-1).argsort().argsort().double() for each in (pruned, dense)]
    return {
        "cosine": float((pruned * dense).sum(-1).mean()),
        "spearman": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
    }


def retrained(model: Any, dense: Any, masks: Masks, how: str, batches: list[dict[str, Tensor]], steps: int) -> Any:
    """A copy of the pruned model, distilled from the dense one under its masks."""
    found = deepcopy(model)
    views = [view for view in find_layers(found) if view.parameter in masks]
    generator = torch.Generator().manual_seed(0)
    adaptation = adapt(found, SUBSETS[how], masks=masks, views=views, rank=16, alpha=32.0, generator=generator)
    optimizer = torch.optim.AdamW(adaptation.param_groups(RATES[how]), weight_decay=0.0)
    held = masks if how == "everything" else None
    train(
        found,
        lambda step: batches[step % len(batches)],
        optimizer,
        linear_warmup_decay(steps, 0.1),
        steps=steps,
        loss=distilled_embeddings(dense),
        masks=held,
    )
    adaptation.merge_()
    masks.check(found)
    return found


def rows(options: argparse.Namespace, done: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of each row not done yet, with what was measured."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense = AutoModel.from_pretrained(options.model, add_pooling_layer=False).float().to(options.device).eval()
    texts = sentences(options.texts)
    seen_from, rest_from = options.held, options.held + CALIBRATION
    held = batched(tokenizer, texts[:seen_from], 64, options)
    seen = batched(tokenizer, texts[seen_from:rest_from], 32, options)
    batches = batched(tokenizer, texts[rest_from:][: options.steps * options.batch], options.batch, options)
    wanted = embedded(dense, held)
    pruned = {}
    for pattern, criterion in product(PATTERNS, CRITERIA):
        started, model = time.perf_counter(), deepcopy(dense)
        masks = prune(model, CRITERIA[criterion], PATTERNS[pattern], 0.5, batches=seen)
        seconds = time.perf_counter() - started
        pruned[pattern, criterion] = model, masks
        row = {"seconds": seconds, "sparsity": masks.sparsity}
        yield f"{pattern} | {criterion} | none", row | fidelity(embedded(model, held), wanted)
    for how, (place, (model, masks)) in product(SUBSETS, pruned.items()):
        name = " | ".join((*place, how))
        if name not in done:
            started = time.perf_counter()
            found = retrained(model, dense, masks, how, batches, options.steps)
            row = {"seconds": time.perf_counter() - started, "sparsity": masks.sparsity}
            yield name, row | fidelity(embedded(found, held), wanted)


def table(done: Mapping[str, Mapping[str, float]]) -> str:
    """The rows in Markdown."""
    lines = ["| zeros | criterion | retrained | cosine to dense | Spearman | seconds |", "|---|---|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {name} | {row['cosine']:.4f} | {row['spearman']:.4f} | {row['seconds']:.0f} |"
            for name, row in sorted(done.items())
        ]
    )


def main() -> None:
    """Measure what is not there yet, writing after every row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--out", type=Path, default=Path("encoders"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--held", type=int, default=1000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    path = options.out.with_suffix(".json")
    done: dict[str, Any] = read_json(path) if path.is_file() else {}
    for name, row in rows(options, dict(done)):
        done[name] = row
        write_json(path, done)
        write_text(options.out.with_suffix(".table.md"), table(done) + "\n")


if __name__ == "__main__":
    main()
