"""Text that a model writes itself, to be retrained on: what it says after beginnings of a text that one has.

    text ─ windows ─▶ prompts (rows, prompt) ─ a batch at a time, drawn token by token ─▶ part-00000.jsonl, ...

    out/part-*.jsonl     a batch each, complete or absent          out/inputs.json     what was read, by contents
    out/written.json     what was asked for and on which devices; with `rows` and `tokens` when all parts are there,
                         without which the folder is no text

A dense model that writes what its pruned copy is retrained on teaches it in its own words: the text is of all kinds
that the prompts are of, as long as one likes, and drawn from just the distribution that distillation compares with (Liu
et al. 2024, LLM-QAT, section 3.1, who begin with one random word, where a prompt keeps to the kind of text that one
has).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from prunus.data import WRITTEN
from prunus.jobs import check_inputs, check_outside, device_name, device_of, held, where
from prunus.language.stages import check_length, check_weights, empty, fitted, load
from prunus.language.texts import prompts
from prunus.machine import in_mode, json_line, read_json, write_json, write_text
from prunus.recipe import LanguageRecipe, Writing, digest, said
from prunus.report import progress

__all__ = ["prolonged", "write"]

log = logging.getLogger(__name__)

_APART = 1_000_003  # between the seeds of two calls
_HALF = "\N{REPLACEMENT CHARACTER}"  # what is left of a character where a row begins or ends inside one


@torch.no_grad()
def prolonged(
    model: Any, prompts: Tensor, length: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """(rows, length) int64: prompts (rows, prompt) and what a causal language model says after them.

    Each token is drawn from softmax(logits / temperature), none is left out, and the end of a text does not end a row:
    another one begins. prompts, generator: on the model's device. Keys and values of all rows are held.

    Raises ValueError for a model that keeps no cache, FloatingPointError for one whose logits are not finite.

    >>> prolonged(model, torch.zeros(2, 4, dtype=torch.long), 8).shape
    torch.Size([2, 8])
    """
    rows, asked, kept = [prompts], prompts, None
    with in_mode(model, training=False):
        for place in range(prompts.shape[1], length):
            found = model(input_ids=asked, past_key_values=kept, use_cache=True, logits_to_keep=1)
            kept = getattr(found, "past_key_values", None)
            if kept is None:
                raise ValueError(f"{type(model).__name__} keeps no keys and values; writing needs a model that does")
            logits = found.logits[:, -1].float()  # (rows, words)
            if place == prompts.shape[1] and not logits.amax(-1).isfinite().all():  # once: a GPU is waited for
                raise FloatingPointError("the model's logits are not finite; give --dtype bfloat16 or float32")
            asked = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            rows.append(asked)
    return torch.cat(rows, 1)


def write(asked: Writing, out: Path) -> dict[str, Any]:
    """What a folder of texts has, in numbers, once it is written; recipes read it as `data`. A killed one goes on.

    A text ends where the model ends it, or where its row does; each part has a seed of its own.

    Raises ValueError for a folder that others use or in which other texts were begun, a model or text that is too short
    for what is asked, and as `load` does.

    >>> write(Writing(data="notes.txt", tokens=100_000), Path("written"))  # doctest: +SKIP
    {'folder': 'written', 'rows': 196, 'tokens': 100352, 'tokens/s': 1660.2}
    """
    check_outside(out, [asked])
    begun = _begun(asked, out)
    if "tokens" in begun and all(part.exists() for part in _parts(asked, out)):
        log.warning("%s is finished: nothing is repeated", out)
        return _numbers(asked, out)
    device = device_of(asked)
    recipe = fitted(LanguageRecipe(model=asked.model, device=asked.device, dtype=asked.dtype), device)
    with held(out, "text"):
        begun = _begun(asked, out)  # who had it until now may have begun it
        blank = empty(recipe)
        check_length("length", asked.length, blank.model.config, asked.model)
        check_weights(recipe, blank.model)
        begins = prompts(asked, blank.tokenizer)
        loaded = load(recipe, device)
        check_inputs(out, [asked])
        devices = [*([begun["device"]] if "device" in begun else []), *begun.get("resumed_on", ()), device_name(device)]
        begun = {"key": _key(asked), **where(devices), "asked": asked.model_dump(mode="json")}
        write_json(out / WRITTEN, begun)
        pace = _write_parts(asked, out, loaded.model, loaded.tokenizer, begins.to(device))
        numbers = _numbers(asked, out)
        write_json(out / WRITTEN, begun | {key: numbers[key] for key in ("rows", "tokens")})
    return numbers | pace


def _write_parts(asked: Writing, out: Path, model: Any, tokenizer: Any, begins: Tensor) -> dict[str, float]:
    """Write the parts that are not there yet; how fast that was, if there were some."""
    tokens, before = 0, monotonic()
    generator = torch.Generator(begins.device)
    how: dict[str, Any] = {"temperature": asked.temperature, "generator": generator}
    with progress("write", asked.rows) as advance:
        for number, (path, batch) in enumerate(zip(_parts(asked, out), begins.split(asked.batch_size), strict=True)):
            if not path.exists():
                generator.manual_seed((asked.seed * _APART + number) % 2**63)
                ids = prolonged(model, batch, asked.length, **how)
                write_text(path, "".join(json_line({"text": text}) + "\n" for text in _texts(ids, tokenizer)))
                tokens += ids.numel()
            advance(len(batch))
    return {"tokens/s": tokens / (monotonic() - before)} if tokens else {}


def _parts(asked: Writing, out: Path) -> list[Path]:
    return [out / f"part-{number:05}.jsonl" for number in range(-(-asked.rows // asked.batch_size))]


def _numbers(asked: Writing, out: Path) -> dict[str, Any]:
    return {"folder": str(out), "rows": asked.rows, "tokens": asked.rows * asked.length}


def _key(asked: Writing) -> str:
    """Hash of what decides the text."""
    return digest(said(asked, but={"device"}))


def _begun(asked: Writing, out: Path) -> Mapping[str, Any]:
    """What an earlier call said of the folder; nothing where there was none."""
    path = out / WRITTEN
    found = read_json(path) if path.exists() else {"key": _key(asked)}
    if not isinstance(found, dict) or found.get("key") != _key(asked):
        raise ValueError(f"out: {out} was begun with another model, text or setting; give another folder, or delete it")
    return found


def _texts(rows: Tensor, tokenizer: Any) -> Iterator[str]:
    """What stands between special tokens, in words; what is empty is left out.

    A model may end its texts by another one than its tokenizer says, as those do that learnt chats last.
    """
    special = frozenset(tokenizer.all_special_ids)
    for row in rows.tolist():
        for ids in _between(row, special):
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip(_HALF)
            if text.strip():
                yield text


def _between(row: Sequence[int], special: Collection[int]) -> Iterator[list[int]]:
    return (list(ids) for ends, ids in groupby(row, special.__contains__) if not ends)
