"""Adapters on disk: a folder in peft's layout, and beside it what peft has no words for.

    adapter_model.safetensors     base_model.model.LAYER.lora_A.weight (r, in), .lora_B.weight (out, r), ...
    adapter_config.json           where peft can express it: LoRA of linear layers, alone or with norms
    prunus_adapter.json           kind, rank, alpha, and the pruned weights that it belongs on
    masks.safetensors             those of the pruned model, packed

MaskLoRA and ScaleLoRA get no adapter_config.json: peft would compute without the mask. Putting an adapter in place is
in `adapt`; this file only reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from prunus.checkpoint import ADAPTER, ADAPTER_TENSORS
from prunus.machine import atomic_folder, check_replaceable, read_json, read_tensors, write_json, write_tensors
from prunus.masks import Masks

TENSORS, CONFIG, INFO, MASKS = ADAPTER_TENSORS, ADAPTER, "prunus_adapter.json", "masks.safetensors"
PREFIX = "base_model.model."
_FORMAT = 1
_PIECE = 1 << 22  # entries of a weight looked at together
_PLAIN = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False, "bias": "none"}
# Of peft's config, too: what makes something else than W + c BA of what lies in the folder.
_VARIANTS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
    "layer_replication",
)  # fmt: skip
_MOVED = ("pissa", "corda", "olora", "loftq", "lora_ga")  # inits that took a part of W into the adapter


@dataclass(frozen=True)
class StoredAdapter:
    """What a folder holds. train: subsets, as in `adapt`; None where peft wrote it, which knows no masks.

    tensors: name in the model -> value, of layers with `.lora_A` or `.lora_B` after it. views: the adapted layers.
    base: where the pruned model is, as its author said; prints: layer -> `fingerprint` of its pruned weight.
    config: of peft, where that can express the adapter.
    """

    rank: int
    alpha: float
    tensors: dict[str, Tensor]
    views: tuple[str, ...]
    train: tuple[str, ...] | None = None
    masks: Masks | None = None
    base: str = ""
    prints: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    def write(self, folder: str | Path) -> None:
        """Fill a folder, complete or absent. Raises ValueError for one with files that no adapter of ours left."""
        check_adapter_folder(folder)
        with atomic_folder(folder) as partial:
            write_tensors(partial / TENSORS, {f"{PREFIX}{_peft(name)}": each for name, each in self.tensors.items()})
            if self.masks is not None:
                self.masks.save(partial / MASKS)
            if self.config is not None:
                write_json(partial / CONFIG, self.config)
            said = {"train": self.train, "rank": self.rank, "alpha": self.alpha, "views": self.views}
            files = sorted([INFO, *(path.name for path in partial.iterdir())])
            base = {"path": self.base, "fingerprints": self.prints}
            write_json(partial / INFO, {"format": _FORMAT, **said, "base": base, "files": files})


def check_adapter_folder(folder: str | Path) -> None:
    """Raise ValueError for a folder that is there and holds anything but an adapter of ours.

    >>> check_adapter_folder("runs/new")
    """
    info = Path(folder) / INFO
    check_replaceable(folder, _told(info)["files"] if info.is_file() else [])


def read_adapter(folder: str | Path) -> StoredAdapter:
    """The adapter of a folder that `write` or peft filled.

    Raises FileNotFoundError without one; ValueError for one that is damaged, of a newer version, or beyond plain LoRA.
    """
    folder = Path(folder)
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}: give the folder of an adapter, saved by Prunus or by peft")
    found = {_own(name): each for name, each in read_tensors(folder / TENSORS)[0].items()}
    if not (folder / INFO).is_file():
        return _of_peft(folder, found)
    said = _told(folder / INFO)
    if MASKS in said["files"] and not (folder / MASKS).is_file():
        raise ValueError(f"{folder} lacks {MASKS}, without which merging would fill pruned weights: get it again")
    masks = Masks.load(folder / MASKS) if (folder / MASKS).is_file() else None
    base = said["base"]
    return StoredAdapter(
        said["rank"],
        said["alpha"],
        found,
        tuple(said["views"]),
        tuple(said["train"]),
        masks,
        base["path"],
        base["fingerprints"],
    )


def _told(path: Path) -> dict[str, Any]:
    """What a prunus_adapter.json says. Raises ValueError for one of another version, and for one that was edited."""
    said = read_json(path)
    version = said.get("format") if isinstance(said, dict) else None
    if version != _FORMAT:
        raise ValueError(f"{path} has format {version!r}; this Prunus reads {_FORMAT}: upgrade it")
    if wrong := next((key for key, fits in _FITS.items() if key not in said or not fits(said[key])), None):
        found = f"{wrong}: {str(said[wrong])[:40]}" if wrong in said else f"no {wrong!r}"
        raise ValueError(f"{path} says {found}; it was edited: get the adapter again")
    return said


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in cast("list[Any]", value))


def _is_base(value: Any) -> bool:
    prints = value.get("fingerprints") if isinstance(value, dict) else None
    return isinstance(prints, dict) and _are_texts([value.get("path"), *cast("dict[str, Any]", prints).values()])


_FITS: dict[str, Callable[[Any], bool]] = {
    "rank": lambda value: type(value) is int,
    "alpha": lambda value: type(value) in (int, float),
    "views": _are_texts,
    "train": _are_texts,
    "base": _is_base,
    "files": _are_texts,
}


def peft_config(layers: list[str], whole: list[str], rank: int, alpha: float, how: Mapping[str, Any]) -> dict[str, Any]:
    """What peft is told of a LoRA on these layers, with modules trained as a whole beside it."""
    kept = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "inference_mode": True}
    return {**kept, **_PLAIN, "target_modules": layers, "modules_to_save": whole or None, **how}


def fingerprint(weight: Tensor, kept: Tensor | None = None) -> str:
    """What a weight is, in 16 hexadecimal digits: sum_i (2 i + 1) bits(w_i) modulo 2^64, bits of the float32.

    The same on every device, and in every dtype that holds the values. kept: its mask; the others count as +0.0.

    >>> fingerprint(torch.tensor([1.0, 2.0])) == fingerprint(torch.tensor([1.0, 2.0]).bfloat16())
    True
    """
    total, flat = 0, weight.detach().reshape(-1)
    mask = None if kept is None else kept.to(weight.device).reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].float() + 0.0  # -0.0 becomes +0.0
        if mask is not None:
            piece = piece.masked_fill(~mask[start : start + _PIECE], 0.0)
        places = torch.arange(start, start + piece.numel(), device=piece.device)
        total += int(((2 * places + 1) * piece.view(torch.int32).long()).sum())
    return f"{total % 2**64:016x}"


def _of_peft(folder: Path, found: dict[str, Tensor]) -> StoredAdapter:
    said = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if said.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds no LoRA: its {CONFIG} says peft_type {said.get('peft_type')!r}")
    strange = [key for key, plain in _PLAIN.items() if (said.get(key) or plain) != plain]
    strange += [key for key in _VARIANTS if said.get(key)]
    strange += ["init_lora_weights"] if str(said.get("init_lora_weights")).lower().startswith(_MOVED) else []
    layers = tuple(name.removesuffix(".lora_A") for name in found if name.endswith(".lora_A"))
    odd = [name for name, each in found.items() if each.ndim != 2 or not name.endswith((".lora_A", ".lora_B"))]
    if strange or odd or not layers:
        what = f"{strange[0]}: {said[strange[0]]}" if strange else odd[0] if odd else "no lora_A"
        raise ValueError(f"{folder} is more than plain LoRA of linear layers ({what}): merge it with peft")
    rank = int(said["r"])
    alpha = float(said["lora_alpha"]) * (rank**0.5 if said.get("use_rslora") else 1.0)
    return StoredAdapter(rank, alpha, found, layers, base=said.get("base_model_name_or_path") or "")


def _peft(name: str) -> str:
    return f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name


def _own(name: str) -> str:
    name = name.removeprefix(PREFIX)
    return name.removesuffix(".weight") if name.endswith((".lora_A.weight", ".lora_B.weight")) else name
