"""Text that a model writes itself, to be retrained on: what it says after beginnings of a text that one has.

    text ─ windows ─▶ prompts (rows, prompt) ─ a batch at a time, drawn token by token ─▶ part-00000.jsonl, ...

A dense model that writes what its pruned copy is retrained on teaches it in its own words: the text is of all kinds that
the prompts are of, as long as one likes, and drawn from just the distribution that distillation compares with (Liu et al.
2024, LLM-QAT, section 3.1, who begin with one random word, where a prompt keeps to the kind of text that one has).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from prunus.blocks import longest
from prunus.jobs import check_inputs, device_name, device_of, held
from prunus.language.stages import fitted, load
from prunus.language.texts import calibration_windows
from prunus.machine import json_line, read_json, write_json, write_text
from prunus.recipe import Calibrate, LanguageRecipe, Writing, digest, said
from prunus.report import progress

__all__ = ["prolonged", "write"]

_APART = 1_000_003  # between the seeds of two calls


@torch.no_grad()
def prolonged(
    model: Any, prompts: Tensor, length: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """(rows, length) int64: prompts (rows, prompt) and what a causal language model says after them.

    Each token is drawn from softmax(logits / temperature), none is left out, and the end of a text does not end a row:
    another one begins. generator: of the model's device. Keys and values of all rows are held.

    Raises ValueError for a model that keeps no cache.

    >>> prolonged(model, torch.zeros(2, 4, dtype=torch.long), 8).shape
    torch.Size([2, 8])
    """
    rows, asked = [prompts], prompts
    kept: Any = None
    for _ in range(length - prompts.shape[1]):
        said = model(input_ids=asked, past_key_values=kept, use_cache=True, logits_to_keep=1)
        kept = getattr(said, "past_key_values", None)
        if kept is None:
            raise ValueError(f"{type(model).__name__} keeps no keys and values: writing needs a model that does")
        chances = (said.logits[:, -1].float() / temperature).softmax(-1)  # (rows, words)
        asked = torch.multinomial(chances, 1, generator=generator)
        rows.append(asked)
    return torch.cat(rows, 1)


def write(asked: Writing, out: Path) -> dict[str, Any]:
    """Write a folder of texts, which every recipe reads as `data`; what was written, in numbers. A killed one goes on.

    A row is cut where a text ends; each part has a seed of its own.

    Raises ValueError for a folder that others use or that other texts were begun in, and as `load` does.
    """
    device = device_of(asked)
    rows = -(-asked.tokens // asked.length)
    drawn = Calibrate(data=asked.data, samples=rows, length=asked.prompt, seed=asked.seed)
    recipe = LanguageRecipe(model=asked.model, device=asked.device, dtype=asked.dtype, calibrate=drawn)
    recipe = fitted(recipe, device)
    key = digest(said(asked, but={"device"}))
    with held(out):
        _check_begun(out / "written.json", key)
        loaded = load(recipe, device)
        model = loaded.model.eval()
        _check_length(asked.length, longest(model.config))
        prompts = calibration_windows(drawn, loaded.tokenizer)
        check_inputs(out, [recipe])
        written = {"key": key, "device": device_name(device), "asked": asked.model_dump(mode="json")}
        write_json(out / "written.json", written)
        before = monotonic()
        tokens = 0
        with progress("write", rows) as advance:
            for part, batch in enumerate(prompts.split(asked.batch_size)):
                path = out / f"part-{part:05}.jsonl"
                if not path.exists():
                    generator = torch.Generator(device).manual_seed(asked.seed * _APART + part)
                    how: dict[str, Any] = {"temperature": asked.temperature, "generator": generator}
                    ids = prolonged(model, batch.to(device), asked.length, **how)
                    lines = [json_line({"text": each}) for each in _texts(ids, loaded.tokenizer)]
                    write_text(path, "\n".join(lines) + "\n")
                    tokens += ids.numel()
                advance(len(batch))
        seconds = monotonic() - before
    return {"folder": str(out), "rows": rows, "tokens": rows * asked.length, "tokens/s": tokens / seconds}


def _check_begun(path: Path, key: str) -> None:
    if path.exists() and read_json(path).get("key") != key:
        raise ValueError(f"out: {path.parent} was begun by another model, text or length; give another --out")


def _check_length(length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise ValueError(f"length: {length} is more than the model's {limit}; give fewer")


def _texts(rows: Tensor, tokenizer: Any) -> Iterator[str]:
    """What stands between ends of texts, in words; what is empty is left out."""
    for row in rows.tolist():
        for ids in _between(row, tokenizer.eos_token_id):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if text.strip():
                yield text


def _between(row: Sequence[int], end: int | None) -> Iterator[list[int]]:
    begun: list[int] = []
    for each in row:
        if each == end:
            yield begun
            begun = []
        else:
            begun.append(each)
    yield begun
