"""A vocabulary of the words that a text needs: tokenizer, embedding and head, cut together.

    ids of a text ─ needed_words ─▶ kept ids ─ trim_tokenizer, trim_vocabulary ─▶ both, with new ids in the old order

Special tokens stay, and so do single characters and bytes: every text can be written, with more tokens where a word is
gone. Of a tokenizer that merges pairs (BPE) what a kept word is merged of stays too, so that a text whose words all
stay is cut into the same tokens. Other kinds of tokenizers are refused, but for those that look for the likeliest words
(Unigram).
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.checkpoint import read_tokenizer
from prunus.shrink.language import rebuilt

__all__ = ["needed_words", "trim_tokenizer", "trim_vocabulary"]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_KINDS = ("BPE", "Unigram")


def needed_words(tokenizer: Any, ids: Tensor) -> Tensor:
    """The ids that must stay for these to stay, sorted int64: themselves, all special ones, characters and merges.

    Raises ValueError for a tokenizer of another kind than BPE and Unigram.

    >>> len(needed_words(tokenizer, torch.tensor([], dtype=torch.long))) < len(tokenizer)
    True
    """
    said = _said(tokenizer)
    names = {index: word for word, index in tokenizer.get_vocab().items()}
    kept = {names[index] for index in ids.unique().tolist() if index in names}
    if said["model"]["type"] == "BPE":
        kept |= _parts_of(kept, said["model"])
    kept |= {word for word in names.values() if len(word) == 1 or _BYTE.fullmatch(word)}
    kept |= {each["content"] for each in said["added_tokens"]} | {*tokenizer.all_special_tokens}
    if (unknown := said["model"].get("unk_id")) is not None:
        kept.add(names[unknown])
    return torch.tensor(sorted(index for index, word in names.items() if word in kept))


def trim_tokenizer(tokenizer: Any, kept: Tensor) -> Any:
    """The tokenizer with these ids alone, numbered anew in their order. Raises ValueError where it cannot be rebuilt.

    >>> len(trim_tokenizer(tokenizer, needed_words(tokenizer, torch.arange(300))))
    300
    """
    said, vocabulary = _said(tokenizer), tokenizer.get_vocab()
    new = {old: place for place, old in enumerate(kept.tolist())}
    words = {word: new[index] for word, index in vocabulary.items() if index in new}
    said["model"] = _trimmed(said["model"], words, new)
    said["added_tokens"] = [{**each, "id": words[each["content"]]} for each in said["added_tokens"]]
    said = _renamed(said, words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            if path.name not in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
                path.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)  # what tokenizer.json says, with the old ids
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        small = read_tokenizer(folder)
    if small.get_vocab() != words:
        raise ValueError(f"shrink.vocabulary: {type(tokenizer).__name__} does not open with fewer words; leave it out")
    return small


@torch.no_grad()
def trim_vocabulary(model: Any, kept: Tensor) -> Any:
    """A model with these rows of the embedding and the head alone, and with the new ids in its config.

    kept: (n,) int64. Raises ValueError for a model with other tensors that have a row for each word.

    >>> trim_vocabulary(model, torch.arange(100)).config.vocab_size
    100
    """
    ends = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    own = {id(parameter) for module in ends for parameter in module.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    rows = {name for name, parameter in named if id(parameter) in own}
    state = {name: each[kept.to(each.device)] if name in rows else each for name, each in model.state_dict().items()}
    new = {old: place for place, old in enumerate(kept.tolist())}
    config, generation = (_renumbered(each, new) for each in (model.config, model.generation_config))
    config.vocab_size = len(kept)
    small = rebuilt(model, config, state)
    small.generation_config = generation
    return small


def _said(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = said.get("model", {}).get("type")
    if kind not in _KINDS:
        raise ValueError(f"shrink.vocabulary: tokenizers of the kinds {', '.join(_KINDS)} can be cut; this is {kind}")
    return said


def _parts_of(words: Iterable[str], model: Mapping[str, Any]) -> set[str]:
    """What the words are merged of, one pair after another, the earliest merge first."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(_merges(model))}
    found: set[str] = set()
    for word in words:
        parts: list[str] = list(word)
        while len(parts) > 1:
            pairs = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
            best = min(range(len(pairs)), key=lambda place: pairs[place])
            if pairs[best] == len(ranks):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
            found.add(parts[best])
    return found


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]


def _trimmed(model: Mapping[str, Any], words: Mapping[str, int], new: Mapping[int, int]) -> dict[str, Any]:
    """The part of tokenizer.json with the vocabulary."""
    if model["type"] == "Unigram":
        pieces: Sequence[Any] = model["vocab"]
        unknown: int | None = model.get("unk_id")
        own = [pieces[old] for old in new if old < len(pieces)]
        return {**model, "vocab": own, "unk_id": None if unknown is None else new[unknown]}
    merges = [pair for pair in _merges(model) if all(part in words for part in (*pair, "".join(pair)))]
    own = {word: words[word] for word in model["vocab"] if word in words}
    return {**model, "vocab": dict(sorted(own.items(), key=lambda item: item[1])), "merges": merges}


def _renamed(value: Any, words: Mapping[str, int]) -> Any:
    """The ids that stand beside the tokens in post-processors and padding, anew."""
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int and value[0] in words:
            return [value[0], words[value[0]]]
        return [_renamed(each, words) for each in value] if len(value) < 64 else value
    if not isinstance(value, dict):
        return value
    found = {key: _renamed(each, words) if key != "model" else each for key, each in value.items()}
    if {"ids", "tokens"} <= found.keys():
        found["ids"] = [words[token] for token in found["tokens"]]
    if "pad_id" in found:
        found["pad_id"] = words[found["pad_token"]]
    return found


def _renumbered(config: Any, new: Mapping[int, int]) -> Any:
    """A copy in which every id of a token is the new one; those of tokens that are gone, None."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if key.endswith(("token_id", "token_ids")) and value is not None:
            changed = [new[each] for each in value if each in new] if isinstance(value, list) else new.get(value)
            setattr(config, key, changed)
    return config
