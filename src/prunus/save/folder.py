"""The folder of a saved model: everything transformers needs, in its own form, and beside it three files of ours.

    config.json, generation_config.json, tokenizer files        as in the source, byte for byte where there is one
    model.safetensors, or shards and model.safetensors.index.json    dense tensors, pruned entries +0.0
    prunus.json, masks.safetensors, README.md                   ours; nothing needs them to load the model

The folder is written under a hidden name and renamed when complete, so a folder under its own name is whole.
No `sparsity_config` is written: serving stacks refuse it.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from prunus import __version__
from prunus.checkpoint import read_checkpoint
from prunus.layers import check_unwrapped
from prunus.machine import (
    atomic_folder,
    check_replaceable,
    checksums,
    read_json,
    read_tensors,
    without_bars,
    write_json,
    write_text,
)
from prunus.masks import Masks, own_name, unwrapped
from prunus.report import markdown_table
from prunus.save.account import account
from prunus.save.packed import Packing, pack_, unpack_
from prunus.save.shards import ShardWriter

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "FORMAT",
    "SIZE_NOTE",
    "SavedModel",
    "copy_small_files",
    "is_whole",
    "load_info",
    "model_card",
    "save_model",
    "save_tensors",
    "size_note",
    "unpack",
    "write_config",
    "write_info",
]

log = logging.getLogger(__name__)

FORMAT = 1
_KINDS = {"files": list, **dict.fromkeys(("adapter", "average", "checksums", "shrink", "size", "sparsity"), dict)}
INFO_NAME, MASKS_NAME, CARD_NAME = "prunus.json", "masks.safetensors", "README.md"
SIZE_NOTE = (
    "The weight files are as large as those of the dense model: pruned weights are stored as zeros in ordinary dense "
    "tensors, so that every program that reads the dense model reads this one. Zeros alone save neither disk, memory "
    "nor time. A general compressor (zstd, gzip) makes the files smaller for storage and transfer; a speed-up needs a "
    "runtime with kernels for the pattern (2:4 on recent NVIDIA GPUs, for example) and its own conversion step."
)
PACKED_NOTE = (
    "The weights are packed: a bit says of each whether it is zero, and only the others are stored. `prunus unpack "
    "FOLDER OUT` makes the ordinary folder, exactly, which every program reads; Prunus itself reads this one as it is."
)
_WRITERS = 4  # shards of a large model written side by side; a file in memory takes about 1 GB/s
# Of the source folder, what transformers and serving stacks read beside weights and config.json, and its terms.
_COPIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "tekken.json", "bpe.codes", "dict.txt", "*.spm", "chat_template*", "additional_chat_templates",
    "generation_config.json", "custom_generate", "*processor_config.json", "*.py",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "modules.json", "*sentence*.json", "[0-9]_*",
)  # fmt: skip
_REST = (*_COPIED, "config.json", MASKS_NAME)  # of a packed folder
# What loading and training set on a config object without changing the model.
RUNTIME = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def size_note(weight_bytes: int, dense_bytes: int, packed: bool) -> str:
    """What the size of weight files means for who reads it, packed or not.

    >>> size_note(47, 100, packed=True)[:35]
    'The weight files have 47.0% of the '
    """
    if not packed:
        return SIZE_NOTE
    return f"The weight files have {weight_bytes / dense_bytes:.1%} of the dense model's bytes. {PACKED_NOTE}"


@dataclass(frozen=True)
class SavedModel:
    """A finished folder: its file names, the bytes of its weights, what they take as ordinary tensors, whether they are
    packed, and the sentence on its size to show the user."""

    folder: Path
    files: tuple[str, ...]
    weight_bytes: int
    dense_bytes: int
    packed: bool

    @property
    def note(self) -> str:
        """What its size means."""
        return size_note(self.weight_bytes, self.dense_bytes, self.packed)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    masks: Masks | None,
    info: Mapping[str, Any],
    source: str | Path | None = None,
    packed: Packing = False,
    max_shard_bytes: float = 4e9,
) -> SavedModel:
    """The folder of a model that is in memory, saved in its checkpoint's own names (experts apart, ties once).

    info: recipe, pattern, metrics and whatever else belongs into prunus.json; sparsity and versions are added.
    source: the folder or Hugging Face name that the model came from; its config.json, tokenizer and generation
    config are copied as they are. config.json differs only in the keys that the model's config changed (added
    biases) and in a dtype that is no longer true.

    packed: whether its weights are packed by their zeros, or "zstd": compressed as well; see `unpack` and `load_model`.

    prunus.json also lists the source's tensors that are left out, each with its reason, and those in another dtype.

    Of a model that is compiled the ordinary one is saved.

    Raises ValueError when `folder` holds something that Prunus did not write or is the source's, a pruned entry is not
    zero, a tensor of the model is not in the files, or the model is quantised, or has adapters that are not merged.

    >>> save_model(model, tokenizer, "example", masks=None, info={"note": "dense"}).weight_bytes > 0
    True
    """
    model = cast("PreTrainedModel", unwrapped(model))
    check_unwrapped(model)
    if masks is not None:
        masks = Masks({own_name(name): mask for name, mask in masks.items()})
        masks.check(model)
        masks.apply_(model)  # -0.0 is zero, and stored as +0.0
    with new_folder(folder, source) as partial:
        with _as_dense(model), without_bars():
            model.save_pretrained(partial, max_shard_size=int(max_shard_bytes))
        write_config(model.config, partial / "config.json", source_folder(source), dtype=model.dtype)
        within = packed is not False and pack_(partial, packed, masks, max_shard_bytes)
        info = {**info, "tensors": account(partial, source_folder(source), model)}
        return _finish(partial, folder, tokenizer, masks=masks, info=info, source=source, within=within)


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    masks: Masks | None,
    info: Mapping[str, Any],
    source: str | Path,
    config: Any = None,
    packed: Packing = False,
    max_shard_bytes: float = 4e9,
) -> SavedModel:
    """The folder of a model larger than memory, from (checkpoint name, tensor) pairs that arrive one at a time.

    source: the folder that the model came from; all but the weights is copied from it.
    config: the model's transformers config if it was changed (added biases); otherwise config.json is copied.

    Raises ValueError as `save_model`, and for a name that comes twice.
    """
    with new_folder(folder, source) as partial:
        dtypes: set[Any] = set()
        with ShardWriter(partial, max_shard_bytes=max_shard_bytes, writers=_WRITERS) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
                dtypes |= {tensor.dtype} if tensor.is_floating_point() else set()
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
        write_config(config, partial / "config.json", source_folder(source), dtype=dtype)
        within = packed is not False and pack_(partial, packed, masks, max_shard_bytes)
        info = {**info, "tensors": account(partial, source_folder(source), None)}
        return _finish(partial, folder, tokenizer, masks=masks, info=info, source=source, within=within)


def unpack(packed: str | Path, out: str | Path) -> SavedModel:
    """The ordinary folder of a packed one, exactly, tensor by tensor, with masks, config, tokenizer and prunus.json.

    Raises ValueError for a folder that is not packed, damaged weights, and an `out` that holds anything else.

    >>> save_model(model, tokenizer, "out/packed", masks=None, info={}, packed=True)
    >>> unpack("out/packed", "out/unpacked")
    """
    packed = Path(packed)
    checkpoint = read_checkpoint(packed)
    if not checkpoint.is_packed:
        raise ValueError(f"{packed} is not packed: transformers reads it as it is")
    check_whole(packed)
    info = {key: value for key, value in load_info(packed).items() if key not in ("files", "checksums")}
    check_new(out, "ordinary one", lambda known: _of_model(known) == _of_model(info))
    with new_folder(out, packed) as partial:
        unpack_(checkpoint, partial)
        copy_small_files(packed, partial, _REST)
        info["masks"] = MASKS_NAME if (partial / MASKS_NAME).is_file() else None
        info["size"] = _size(partial)
        files = write_info(partial, info, model_card(Path(out).name, info))
        return SavedModel(Path(out), files, **info["size"])


def _of_model(info: Mapping[str, Any]) -> dict[str, Any]:
    """What prunus.json says of a model, packed or not."""
    return {key: value for key, value in info.items() if key not in ("files", "checksums", "masks", "size")}


def load_info(folder: str | Path) -> dict[str, Any]:
    """The contents of a saved model's prunus.json.

    Raises FileNotFoundError when there is none; ValueError when a newer Prunus wrote it or it is not ours.

    >>> _ = save_model(model, tokenizer, "example", masks=None, info={"note": "dense"})
    >>> load_info("example")["note"]
    'dense'
    """
    path = Path(folder) / INFO_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {INFO_NAME}: it is not a model saved by Prunus")
    info = read_json(path)
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found!r}; this Prunus reads format {FORMAT}. Use the release that wrote it"
        )
    _check_kinds(info, path)
    return info


def _check_kinds(info: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for a prunus.json whose entries are not of the kinds that are read of it."""
    said = {key: info[key] for key in _KINDS if key in info}
    wrong = {key: value for key, value in said.items() if not isinstance(value, _KINDS[key])}
    if not wrong and not isinstance(said.get("sparsity", {}).get("pruned"), int | float | None):
        wrong = {"sparsity": said["sparsity"]}
    for key, value in wrong.items():
        raise ValueError(f"{path} says {key}: {str(value)[:40]}; it was damaged or edited: get it again")


def check_whole(folder: str | Path) -> None:
    """Raise ValueError, naming the file, when weights or masks of a saved model are not those that were written."""
    said: dict[str, str] = load_info(folder).get("checksums", {})
    found = checksums([path for name in said if (path := Path(folder) / name).is_file()])
    wrong = next((name for name, each in said.items() if found.get(name) != each), None)
    if wrong is not None:
        raise ValueError(
            f"{Path(folder) / wrong} is damaged (its checksum is another); delete {folder} to make it anew"
        )
    if (Path(folder) / MASKS_NAME).is_file():
        read_tensors(Path(folder) / MASKS_NAME)


def is_whole(folder: str | Path) -> bool:
    """Whether a saved model is there as it was written; of a damaged one a warning says that it is made anew.

    >>> is_whole("out/model")
    True
    """
    if not (Path(folder) / INFO_NAME).is_file():
        return False
    try:
        check_whole(folder)
    except ValueError as error:
        log.warning("%s is made anew: %s", folder, error)
        return False
    return True


@contextmanager
def _as_dense(model: PreTrainedModel) -> Generator[None]:
    """Let transformers save a model that it read from GGUF, and take back what saving writes into the config.

    In newer transformers (5.23) such a model stays marked as quantised although its weights were dequantised on
    loading, and save_pretrained refuses it.
    """
    config, kept = model.config, dict(vars(model.config))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        model.hf_quantizer = None  # type: ignore[assignment]
        vars(config).pop("quantization_config", None)
    try:
        yield
    finally:
        vars(config).update(kept)
        if quantizer is not None:
            model.hf_quantizer = quantizer


@contextmanager
def new_folder(folder: str | Path, source: str | Path | None = None) -> Generator[Path]:
    """A folder to fill, which takes the place of `folder` at the end.

    Raises ValueError for a `folder` with anything that Prunus did not write there, and for one that is its own source.
    """
    folder = Path(folder)
    check_new(folder)
    check_apart(folder, source)
    with atomic_folder(folder) as partial:
        yield partial


def check_apart(folder: Path, source: str | Path | None) -> None:
    """Raises ValueError for a folder that is the one which is read, or lies in it, or has it inside."""
    if source is not None and (read := Path(source).expanduser()).exists():
        one, other = Path(folder).resolve(), read.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise ValueError(
                f"out: {folder} and {source}, which is read, lie in each other; give another output folder"
            )


def check_new(folder: str | Path, what: str = "", is_same: Callable[[dict[str, Any]], bool] = lambda _: True) -> None:
    """Raise ValueError for a folder that is there and holds anything but a model that Prunus saved, or another one.

    what: is to be there, in words; is_same: whether it is, by the prunus.json of the one that is there.

    >>> check_new("runs/new")
    """
    known = load_info(folder) if (Path(folder) / INFO_NAME).is_file() else None
    check_replaceable(folder, [] if known is None else known.get("files", []))
    if known is not None and not is_same(known):
        raise ValueError(f"out: {folder} holds another model; give the {what} a folder of its own, or delete it")


def write_info(folder: Path, info: Mapping[str, Any], card: str | None = None) -> tuple[str, ...]:
    """Write prunus.json, the last of a saved folder's files but for the card; the names of all.

    It has the checksums of the weight files. Masks carry one of their own, and their header has no fixed order.

    >>> files = write_info(Path("out/model"), load_info("out/model"))  # after its weights were changed
    """
    if card is not None:
        write_text(folder / CARD_NAME, card)
    files = tuple(sorted({INFO_NAME, *(path.name for path in folder.iterdir())}))
    sums = checksums(sorted(path for path in folder.glob("*.safetensors") if path.name != MASKS_NAME))
    write_json(folder / INFO_NAME, {**info, "files": files, "checksums": sums})
    return files


def _finish(
    partial: Path,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    masks: Masks | None,
    info: Mapping[str, Any],
    source: str | Path | None,
    within: bool,
) -> SavedModel:
    """Write what goes beside the weights. within: whether the masks are among the packed weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    origin = source_folder(source)
    if origin is not None:
        copy_small_files(origin, partial)
    if masks is not None and not within:
        masks.save(partial / MASKS_NAME)
    stored = {"format": FORMAT, **info, "masks": MASKS_NAME if masks is not None and not within else None}
    stored["sparsity"] = _sparsity(masks)
    stored["size"] = size = _size(partial)
    stored["versions"] = _versions()
    files = write_info(partial, stored, model_card(Path(folder).name, stored))
    saved = SavedModel(Path(folder), files, **size)
    log.info("saved %s (%.1f MB of weights). %s", folder, saved.weight_bytes / 1e6, saved.note)
    return saved


def _size(folder: Path) -> dict[str, Any]:
    """The bytes of a folder's weight files, those that its tensors take when they are not packed, and whether so."""
    found = read_checkpoint(folder)
    dense = sum(each.numel * each.dtype.itemsize for each in found.tensors.values())
    return {"weight_bytes": found.bytes, "dense_bytes": dense, "packed": found.is_packed}


def copy_small_files(source: Path, partial: Path, globs: Sequence[str] = _COPIED) -> None:
    """Copy tokenizer, generation config, chat template, code and poolings of the source, byte for byte, over others.

    >>> copy_small_files(Path("all-MiniLM-L6-v2"), Path("out/model"))
    """
    for path in source.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in globs):
            if path.is_dir():
                shutil.copytree(path, partial / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, partial / path.name)


def _sparsity(masks: Masks | None) -> dict[str, Any]:
    """Share of zeros of the masked layers, together and one by one."""
    if not masks:
        return {"pruned": None, "layers": {}}
    table = masks.table()
    kept, total = (sum(counts) for counts in zip(*table.values(), strict=True))
    return {"pruned": (total - kept) / total, "layers": {name: 1 - kept / n for name, (kept, n) in table.items()}}


def _versions() -> dict[str, str]:
    # Not version("prunus"): a source folder on the path has no metadata.
    found = {"python": platform.python_version(), "prunus": __version__}
    return found | {name: _version(name) for name in ("torch", "transformers", "safetensors")}


_version = cache(version)  # reads a package's whole description for one line


# config.json: the source's own bytes, or its text with the few keys that had to change


def source_folder(source: str | Path | None) -> Path | None:
    """The local folder behind a folder path or a Hugging Face name (its cached snapshot); None when there is none."""
    if source is None or Path(source).is_dir():
        return None if source is None else Path(source)
    if str(source).count("/") > 1 or Path(source).exists():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(source), "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def write_config(config: Any, path: Path, source: Path | None, *, dtype: torch.dtype | None) -> None:
    """Write `path` from the source folder's config.json if there is one, else leave what transformers wrote.

    config: the model's transformers config, or None for unchanged.
    dtype: of the saved weights. A source that declares another one gets this key changed, since loaders cast to it.

    Raises ValueError when neither the source nor the folder has a config.json.
    """
    origin = source / "config.json" if source is not None else None
    if origin is None or not origin.is_file():
        if not path.is_file():
            raise ValueError(f"{source} has no config.json and no model was given to write one from")
        return
    text = origin.read_text(encoding="utf-8")
    stored = json.loads(text)
    changes = {} if config is None else _changes(config, origin)
    key = "torch_dtype" if "torch_dtype" in stored else "dtype"
    if dtype is not None and key in stored and stored[key] != str(dtype).removeprefix("torch."):
        changes[key] = str(dtype).removeprefix("torch.")
    if changes:
        text = json.dumps({**stored, **changes}, indent=2, ensure_ascii=False) + "\n"
        write_text(path, text)
    else:
        path.unlink(missing_ok=True)
        path.write_bytes(origin.read_bytes())


def _changes(config: Any, origin: Path) -> dict[str, Any]:
    """Keys of `config` whose values differ from what the source's config.json gives."""
    now, then = _lasting(config.to_dict()), _lasting(type(config).from_pretrained(str(origin.parent)).to_dict())
    return {key: value for key, value in now.items() if then.get(key) != value}


def _lasting(said: Any) -> Any:
    """What a config says without what a run sets, also in the configs inside it."""
    if not isinstance(said, dict):
        return said
    return {key: _lasting(value) for key, value in cast("dict[str, Any]", said).items() if key not in RUNTIME}


# README.md: what the model is, how it was made, what was measured, and what its size means


def model_card(name: str, info: Mapping[str, Any]) -> str:
    """Markdown for the model `name` from the contents of its prunus.json.

    Reads `model`, `pattern`, `sparsity`, `recipe`, `metrics` (or `perplexity`, `zero_shot`) and `versions`; what is
    missing is left out.
    """
    sparsity: Mapping[str, Any] = info.get("sparsity", {})
    size = info.get("size")
    note = SIZE_NOTE if size is None else size_note(**size)
    lines = [*_front(info), f"# {name}", "", _summary(info, sparsity), "", "## Size", "", note, ""]
    measured = _metrics(info.get("metrics") or {key: info[key] for key in ("perplexity", "zero_shot") if key in info})
    if measured:
        lines += ["## Results", "", markdown_table(measured)]
    recipe = info.get("recipe")
    if recipe:
        lines += [
            "## Recipe",
            "",
            "```yaml",
            yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(),
            "```",
            "",
        ]
    layers: Mapping[str, float] = sparsity.get("layers", {})
    if layers:
        rows = [{"layer": f"`{layer}`", "zeros": f"{100 * share:.2f} %"} for layer, share in layers.items()]
        lines += ["## Sparsity by layer", "", markdown_table(rows)]
    lines += ["## Files", "", *_files(info), ""]
    return "\n".join(lines)


def _front(info: Mapping[str, Any]) -> list[str]:
    """What the hub reads: its library, its tags, and the dense model, where that is one of the hub."""
    said: dict[str, Any] = {"library_name": "transformers", "tags": ["sparse", "pruned", "prunus"]}
    model = str(info.get("model", ""))
    if model.count("/") == 1 and not model.startswith((".", "~")) and not Path(model).exists():
        said["base_model"] = model
    return ["---", yaml.safe_dump(said, sort_keys=False).rstrip(), "---", ""]


def _summary(info: Mapping[str, Any], sparsity: Mapping[str, Any]) -> str:
    base = f" of `{info['model']}`" if info.get("model") else ""
    pattern = f" ({info['pattern']})" if info.get("pattern") else ""
    share = sparsity.get("pruned")
    what = f"{100 * share:.2f} % of the weights of its pruned layers are zero{pattern}. " if share is not None else ""
    packed = info.get("size", {}).get("packed", False)
    loads = "an ordinary dense checkpoint and loads with `transformers.AutoModelForCausalLM.from_pretrained`"
    return (
        f"A sparse version{base}, made with Prunus {info.get('versions', {}).get('prunus', '')}. {what}"
        f"It is {'packed and loads with `prunus.load_model`' if packed else loads}."
    )


def _metrics(metrics: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        rows += _metrics(value, f"{name}, ") if isinstance(value, Mapping) else [{"measured": name, "value": value}]
    return rows


def _files(info: Mapping[str, Any]) -> list[str]:
    lines = ["- `prunus.json`: recipe, sparsity by layer, metrics and the versions it was made with"]
    if info.get("masks"):
        lines.append("- `masks.safetensors`: the pruning masks, eight to a byte; read with `prunus.masks.Masks.load`")
    return lines
