"""The state dict of a network in one file, ours or foreign: just the tensors that are wanted, or why it is not that.

module.conv1.weight                        under a wrapper's prefix
{"state_dict": {...}, "epoch": 3}          inside a checkpoint
conv1.weight_orig, conv1.weight_mask       pruned by torch.nn.utils.prune, and not made permanent
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.checkpoint.causal import check_finite, wrapper_of
from prunus.checkpoint.stored import PICKLES, read_header, read_pickle

__all__ = ["read_state"]


def read_state(path: Path, wanted: Mapping[str, Tensor], *, other_head: bool = False) -> dict[str, Tensor]:
    """Name -> tensor of a weight file, on the CPU: the names and shapes of `wanted`, a network's own state dict.

    other_head: a last layer for another number of classes is left out of it.
    Raises FileNotFoundError for a file that is not there; ValueError, with the mend, for one that is damaged or holds
    something else, and for values that are not finite.

    >>> model.load_state_dict(read_state(Path("resnet18.pt"), model.state_dict()))
    """
    pickled = path.suffix in PICKLES
    state = dict(read_pickle(path)) if pickled else {name: each.read() for name, each in read_header(path)[0].items()}
    _check_flat(path, state)
    if other_head:
        fresh = _other_head(state, wanted)
        state, wanted = ({name: each[name] for name in each if name not in fresh} for each in (state, wanted))
    wrong = [name for name, each in wanted.items() if name not in state or state[name].shape != each.shape]
    wrong += [name for name in state if name not in wanted]
    if wrong:
        _check_wrapped(path, state, wanted)
        first = wrong[0]
        found, own = (tuple(each[first].shape) if first in each else "no tensor" for each in (state, wanted))
        raise ValueError(
            f"{path} is not of the recipe's network: {len(wrong)} tensors differ in name or shape, first '{first}' "
            f"({found} in the file, {own} in the network); give the recipe that it was trained by"
        )
    check_finite(state.items(), path)
    return state


def _other_head(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The tensors of the last layer whose number of rows alone differs."""
    other = [name for name, own in wanted.items() if name in state and _has_other_rows(own, state[name])]
    return [name for name in other if name.rpartition(".")[0] == other[-1].rpartition(".")[0]]


def _has_other_rows(own: Tensor, other: Tensor) -> bool:
    return own.ndim == other.ndim > 0 and own.shape[1:] == other.shape[1:] and len(own) != len(other)


def _check_flat(path: Path, state: Mapping[str, Any]) -> None:
    inside = [key for key, each in state.items() if isinstance(each, Mapping) and _holds_tensors(each)]
    if inside:
        raise ValueError(
            f"{path} is a whole checkpoint, whose state dict is under {inside[0]!r}; write that alone: "
            f"torch.save(torch.load(path, weights_only=True)[{inside[0]!r}], path)"
        )
    strange = [key for key, each in state.items() if not isinstance(each, Tensor)]
    if strange:
        raise ValueError(f"{path} holds {strange[0]!r}, which is no tensor; write a state dict: name to tensor")


def _check_wrapped(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    masked = [name for name in state if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state]
    if masked:
        raise ValueError(
            f"{path} holds {masked[0]!r} and its mask: torch.nn.utils.prune is still in place; make it permanent, "
            "torch.nn.utils.prune.remove(module, 'weight') for every pruned module, and save again"
        )
    prefix = wrapper_of(list(state), lambda names: set(names) == set(wanted))
    if prefix:
        raise ValueError(
            f"{path}: all names begin with {prefix!r}, which a wrapper (DataParallel, torch.compile, Lightning) put "
            f"there; save the module inside it, or take the prefix off: name.removeprefix({prefix!r})"
        )


def _holds_tensors(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(isinstance(each, Tensor) for each in value.values())
