"""The average of checkpoints on disk, piece by piece, so that models larger than memory are averaged.

    members' bytes ─ pieces of 2 Mi entries ─▶ mean ─▶ one tensor ─▶ shards of a hidden folder ─▶ <out>

Memory: the largest tensor once, in its own dtype, and some 10 MiB for each member and 40 MiB beside it. Files are read
with plain reads, not mapped: what was read is not held. Masks are compared bit-packed, as they are stored.
The mathematics is `soup`'s.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.checkpoint import (
    SINGLE_NAME,
    Stored,
    check_finite,
    check_plain,
    read_checkpoint,
    read_header,
    read_tokenizer,
)
from prunus.masks import count_kept, unpack
from prunus.save.folder import (
    FORMAT,
    INFO_NAME,
    MASKS_NAME,
    RUNTIME,
    SavedModel,
    _versions,
    check_apart,
    check_new,
    copy_small_files,
    load_info,
    model_card,
    new_folder,
    write_config,
    write_info,
)
from prunus.save.shards import ShardWriter
from prunus.soup import check_weights, mean_tensor

__all__ = ["average_folders"]

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]
Mix = Callable[[str, Sequence[Tensor]], Tensor]  # (name, the same entries of each member) -> those of the average


@dataclass(frozen=True)
class Join:
    """An average that is no mean. name: as recipes say it. make: (members' states, that of their base) -> a state.

    weights: what each member counts in it; base: what of that model is noted, where the average goes by it.
    """

    name: str
    make: Callable[[Sequence[State], State], State]
    weights: Sequence[float]
    base: str | None = None


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_PIECE = 1 << 21  # entries of one tensor that are averaged together
_OF_ONE_MODEL = ("metrics", "perplexity", "zero_shot", "sparsity", "versions", "masks", "format", "average", "size")


def average_folders(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    how: Join | None = None,
    base: str | Path | None = None,
    max_shard_bytes: float = 4e9,
) -> SavedModel:
    """The folder of the weighted mean of checkpoints: Hugging Face folders or safetensors files, sharded in any way.

    weights: one a checkpoint, >= 0, sum 1; None: all equal. how: what makes each tensor in place of the mean, of the
    members' and that of `base`, the model that they were retrained from; it holds them whole. config.json, tokenizer,
    masks and what prunus.json says of the model are the first one's; prunus.json also lists the members. The folder
    appears complete or not at all.

    Raises ValueError, before anything is written, for tensors, configs, tokenizers or masks that differ (naming the
    first), quantised members, and an `out` that holds anything but this very average, or a member; while writing, for
    weights that are not finite, or not zero under their mask.

    >>> average_folders(["runs/a/model", "runs/b/model"], "runs/mean")
    """
    shares = check_weights(weights if how is None else how.weights, len(checkpoints))
    members = [_Member.read(Path(path)) for path in checkpoints]
    start = members[0] if base is None else _Member.read(Path(base))
    for path, member in zip((*checkpoints, base or checkpoints[0]), (*members, start), strict=True):
        check_apart(Path(out), path)
        _check_member(member, members[0])
    own = [(str(member.path), share) for member, share in zip(members, shares, strict=True)], _said(how)
    check_new(out, "average", lambda known: _made_of(known) == own)
    with new_folder(out) as partial:
        zeros = [0] * (len(members) + 1)
        mix, most = (_mean_by(shares), _PIECE) if how is None else (_joined_by(how, start), None)
        with ShardWriter(partial, max_shard_bytes=max_shard_bytes) as writer:
            for name in members[0].tensors:
                writer.write(name, _mixed(name, members, mix, zeros, most))
        _warn_of_lost_zeros(zeros, checkpoints)
        info = _info(members, shares, zeros, how)
        saved = _write_rest(members[0], partial, Path(out).name, info)
    return SavedModel(Path(out), saved, writer.total_bytes, writer.total_bytes, packed=False)


@dataclass(frozen=True)
class _Member:
    """A checkpoint: its tensors in the order of the files, its masks (still packed) and their shapes, its config."""

    path: Path
    tensors: dict[str, Stored]
    masks: dict[str, Stored]
    mask_shapes: dict[str, list[int]]
    config: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Member:
        checkpoint = read_checkpoint(path)
        if checkpoint.is_packed:
            raise ValueError(f"{path} is packed: `prunus unpack {path} FOLDER` makes what can be averaged")
        if checkpoint.config():
            check_plain(checkpoint)
        folder = path if path.is_dir() else path.parent if path.name == SINGLE_NAME else None
        if folder is None or not (folder / MASKS_NAME).is_file():
            masks, metadata = {}, {}
        else:
            masks, metadata = read_header(folder / MASKS_NAME)
        config = {} if folder is None else checkpoint.config()
        return cls(folder or path, dict(checkpoint.tensors), masks, json.loads(metadata.get("shapes", "{}")), config)


def _said(how: Join | None) -> dict[str, str]:
    """What prunus.json says of an average that is no mean."""
    said = {} if how is None else {"how": how.name, "base": how.base}
    return {key: value for key, value in said.items() if value is not None}


def _made_of(info: Mapping[str, Any]) -> tuple[list[tuple[str, float]], dict[str, str]]:
    """The members and weights of an average, and what it is if no mean, by its prunus.json."""
    found = info.get("average", {})
    members = [(each["path"], each["weight"]) for each in found.get("members", [])]
    return members, {key: found[key] for key in ("how", "base") if key in found}


def _check_member(member: _Member, first: _Member) -> None:
    for name in [*first.tensors, *member.tensors]:
        one, other = first.tensors.get(name), member.tensors.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name!r} is {_shown(one)} in {first.path} and {_shown(other)} in {member.path}: average checkpoints "
                "of one network in one dtype"
            )
    for key in sorted((first.config.keys() | member.config.keys()) - RUNTIME):
        if first.config.get(key) != member.config.get(key):
            raise ValueError(
                f"config.json says {key}: {first.config.get(key)!r} in {first.path} and {member.config.get(key)!r} in "
                f"{member.path}: they are not copies of one network"
            )
    _check_tokenizers(member.path, first.path)
    _check_masks(member, first)


def _check_tokenizers(path: Path, first: Path) -> None:
    """Rows of embeddings are averaged by place: each must mean the same token."""
    one, other = _vocabulary(first), _vocabulary(path)
    for token in sorted(one.keys() | other.keys(), key=lambda token: one.get(token, -1)) if one and other else ():
        if one.get(token) != other.get(token):
            raise ValueError(
                f"the tokenizers differ: {token!r} is id {one.get(token)} in {first} and {other.get(token)} in {path}, "
                "so rows of the embeddings mean other tokens; average members of one tokenizer"
            )


def _vocabulary(path: Path) -> dict[str, Any]:
    """Token -> id of a member's tokenizer; empty where it has none that transformers opens."""
    if not path.is_dir() or not any((path / name).is_file() for name in _TOKENIZERS):
        return {}
    return read_tokenizer(path).get_vocab()


def _shown(stored: Stored | None) -> str:
    return "missing" if stored is None else f"{stored.shape} {stored.dtype}"


def _check_masks(member: _Member, first: _Member) -> None:
    if bool(member.masks) != bool(first.masks):
        having, lacking = (first, member) if first.masks else (member, first)
        raise ValueError(f"{having.path} has {MASKS_NAME} and {lacking.path} has none: their zeros may differ")
    for name in [*first.masks, *member.masks]:
        if first.mask_shapes.get(name) != member.mask_shapes.get(name):
            raise ValueError(
                f"the masks of {name!r} in {first.path} and {member.path} differ in shape, or one is missing"
            )
        one, other = first.masks[name], member.masks[name]
        if member is not first and any(not torch.equal(a, b) for a, b in zip(_bits(one), _bits(other), strict=True)):
            total = math.prod(first.mask_shapes[name])
            raise ValueError(
                f"the masks of {name!r} differ: {first.path} keeps {_count(one)} of {total} entries, {member.path} "
                f"{_count(other)}. Average members of one pruned network, or load them and use average_and_reprune"
            )


def _bits(packed: Stored) -> Iterator[Tensor]:
    """Packed masks, a piece at a time."""
    for start in range(0, packed.numel, _PIECE):
        yield packed.piece(start, min(start + _PIECE, packed.numel))


def _count(packed: Stored) -> int:
    """Entries kept; bits past the last entry are zero."""
    return sum(count_kept(unpack(piece, 8 * piece.numel())) for piece in _bits(packed))


def _mixed(name: str, members: Sequence[_Member], mix: Mix, zeros: list[int], most: int | None) -> Tensor:
    """What `mix` makes of one tensor, `most` entries at a time.

    Counts the zeros of matrices in each member and, last, in what was made.
    """
    first = members[0].tensors[name]
    made = torch.empty(first.numel, dtype=first.dtype)
    step = most or max(1, first.numel)
    for start in range(0, first.numel, step):
        stop = min(start + step, first.numel)
        pieces = [member.tensors[name].piece(start, stop) for member in members]
        for member, piece in zip(members, pieces, strict=True):
            check_finite([(name, _comparable(piece))], member.path)
        part = mix(name, pieces)
        _check_zeros(name, members, pieces, start)
        if len(first.shape) > 1 and first.dtype.is_floating_point:
            for place, piece in enumerate((*pieces, part)):
                zeros[place] += stop - start - int(_comparable(piece).count_nonzero())
        made[start:stop] = part
    return made.view(first.shape)


def _mean_by(shares: Sequence[float]) -> Mix:
    return lambda name, pieces: mean_tensor(name, pieces, shares)


def _joined_by(how: Join, start: _Member) -> Mix:
    """What `how` makes of whole tensors."""

    def mix(name: str, whole: Sequence[Tensor]) -> Tensor:
        base = start.tensors[name]
        states = [{name: each.view(base.shape)} for each in (*whole, base.piece(0, base.numel))]
        return how.make(states[:-1], states[-1])[name].flatten()

    return mix


def _check_zeros(name: str, members: Sequence[_Member], pieces: Sequence[Tensor], start: int) -> None:
    """Raise ValueError for a nonzero under the mask. A mask of a name that is not stored (experts) is only compared."""
    mask = members[0].masks.get(name)
    if mask is None or tuple(members[0].mask_shapes[name]) != members[0].tensors[name].shape:
        return
    stop = start + pieces[0].numel()  # start is a multiple of 8: _PIECE is
    pruned = ~unpack(mask.piece(start // 8, (stop + 7) // 8), stop - start)
    for member, piece in zip(members, pieces, strict=True):
        wrong = int((_comparable(piece)[pruned] != 0).sum())
        if wrong:
            raise ValueError(
                f"{name!r} in {member.path} has {wrong} nonzero weights under its mask: something changed them"
            )


def _comparable(piece: Tensor) -> Tensor:
    """The piece in a dtype that compares with zero, which the 8-bit floats do not everywhere."""
    return piece.float() if piece.dtype.itemsize == 1 else piece


def _warn_of_lost_zeros(zeros: Sequence[int], checkpoints: Sequence[str | Path]) -> None:
    *each, mean = zeros
    if mean < 0.99 * min(each):
        log.warning(
            "The mean has %d zeros in its matrices and each of the %d checkpoints at least %d: their zeros lie in "
            "different places, and sparsity is lost.", mean, len(checkpoints), min(each),
        )  # fmt: skip


def _info(
    members: Sequence[_Member], shares: Sequence[float], zeros: Sequence[int], how: Join | None
) -> dict[str, Any]:
    """prunus.json: what the first member's says of the model, and where the average comes from."""
    known = [load_info(m.path) if m.path.is_dir() and (m.path / INFO_NAME).is_file() else {} for m in members]
    first = members[0]
    average = [
        {"path": str(member.path), "weight": share, "zeros": count, "metrics": info.get("metrics")}
        for member, share, count, info in zip(members, shares, zeros, known, strict=False)
    ]
    totals = {name: math.prod(shape) for name, shape in first.mask_shapes.items()}
    kept = {name: _count(mask) for name, mask in first.masks.items()}
    pruned = 1 - sum(kept.values()) / sum(totals.values()) if totals else None
    return {
        "format": FORMAT,
        **{key: value for key, value in known[0].items() if key not in _OF_ONE_MODEL},
        "average": {"members": average, "zeros": zeros[-1], **_said(how)},
        "masks": MASKS_NAME if first.masks else None,
        "sparsity": {"pruned": pruned, "layers": {name: 1 - kept[name] / totals[name] for name in kept}},
        "versions": _versions(),
    }


def _write_rest(first: _Member, partial: Path, name: str, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Write config, tokenizer, masks, prunus.json and card beside the weights; the names of all files."""
    if first.masks:
        shutil.copyfile(next(iter(first.masks.values())).file, partial / MASKS_NAME)
    if first.config:
        dtypes = {stored.dtype for stored in first.tensors.values() if stored.dtype.is_floating_point}
        write_config(None, partial / "config.json", first.path, dtype=dtypes.pop() if len(dtypes) == 1 else None)
        copy_small_files(first.path, partial)
    return write_info(partial, info, model_card(name, info) if first.config else None)
