"""The whole job of a small language model: prune, retrain, merge, evaluate, save, wall seconds by stage

    python benchmarks/whole_job.py
    python benchmarks/whole_job.py --device cpu --scale 0.03    # scales down

`prunus run` of SmolLM2-135M's shape (random weights, bfloat16, the embedded model's tokenizer and texts, so that no
network is needed): SparseGPT 2:4 on 128 windows of 2,048 tokens, 2,000 steps of MaskLoRA on 4 x 1,024 tokens, merged,
perplexity of the dense, pruned, retrained and merged model, and the saved model. Each row is a stage, first calls
included; what is not in a stage is start, reading texts and writing pictures. Random weights say nothing of quality.
On an H200 it takes 69.4 s, 62.3 of them retraining (docs/results/recorded-steps.md).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from claims import Row, main, sized
from transformers import LlamaConfig, LlamaForCausalLM

from prunus.language import stages
from prunus.language.single import compress
from prunus.recipe import LanguageRecipe, parse

JOB = sys.modules["prunus.language.single"]
STAGES = {"load": stages, "prune": stages, "retrain": stages, "evaluate": stages, "save_model": JOB}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A row a stage, and the whole."""
    seconds, full = dict.fromkeys(STAGES, 0.0), args.scale == 1
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        asked = recipe(args, _model(args, Path(folder) / "model"), Path(folder) / "run")
        for name, where in STAGES.items():
            stack.enter_context(mock.patch.object(where, name, _timed(getattr(where, name), name, seconds)))
        started = time.perf_counter()
        result = compress(parse(asked, LanguageRecipe, "benchmark"))
        whole = time.perf_counter() - started
    retrained = result["retraining"]
    shape = (
        f"{asked['retrain']['steps']} steps of {asked['retrain']['batch_size']} x {asked['retrain']['length']} tokens"
    )
    model = "SmolLM2-135M's shape" if full else "scaled down"
    for name, taken in seconds.items():
        note = f"{retrained['tokens_per_second']:,.0f} tokens a second" if name == "retrain" else ""
        yield Row(name.removesuffix("_model"), f"{model}, {shape}", "", taken * 1e3, note=note)
    yield Row("the whole job", f"{model}, {shape}", "", whole * 1e3)


def recipe(args: argparse.Namespace, model: Path, out: Path) -> dict[str, Any]:
    """What is run."""
    full, length, text = args.scale == 1, sized(1024, args), out.with_name("text.txt")
    text.write_text("The plums are sweet. " * 60, encoding="utf-8")
    return {
        "model": str(model),
        "device": args.device,
        "prune": {"criterion": "sparsegpt", "pattern": "2:4"},
        "calibrate": {"samples": 128 if full else 4, "length": 2 * length, "batch_size": 8 if full else 2},
        "retrain": {"steps": 2000 if full else 4, "batch_size": 4, "length": length, "lr": 1e-4},
        "evaluate": {"window": 2 * length, **({} if full else {"data": {"text": {"source": str(text)}}})},
        "out": str(out),
    }


def _model(args: argparse.Namespace, folder: Path) -> Path:
    """A folder with a model of random weights."""
    torch.manual_seed(args.seed)
    full, tokenizer = args.scale == 1, stages.load(LanguageRecipe(model="embedded")).tokenizer
    config = LlamaConfig(
        vocab_size=49152 if full else len(tokenizer),
        hidden_size=576 if full else 64,
        intermediate_size=1536 if full else 128,
        num_hidden_layers=30 if full else 2,
        num_attention_heads=9 if full else 1,
        num_key_value_heads=3 if full else 1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _timed(run: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = run(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] += time.perf_counter() - started
        return found

    return timed


if __name__ == "__main__":
    main(__doc__, measure)
