"""Whether a checkpoint is the causal language model that its config.json describes, asked before a weight is read.

    headers ─▶ tensors on meta ─▶ transformers' own loading and conversion maps ─▶ missing, left over, of other shape
                                                                               └─▶ Layout: which make which, and back

Nothing here knows a model family: renamed and stacked tensors go through the maps of transformers.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus.checkpoint.folder import ADAPTER, Checkpoint
from prunus.checkpoint.stored import DTYPES
from prunus.machine import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Layout",
    "check_causal",
    "check_direction",
    "check_finite",
    "check_plain",
    "check_vocabulary",
    "empty_model",
    "wrapper_of",
]

_PIECE = 1 << 24  # entries of two tensors that are compared together
_FILLS = {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")} | {"fill_", "zero_"}


@dataclass(frozen=True)
class Layout:
    """How the tensors of a checkpoint make those of a model.

    targets: stored name -> the (first) tensor of the model that it makes. patterns: stored name -> what its converter
    calls it, where it is not only renamed. dropped: stored names that no tensor of the model needs.
    """

    model: PreTrainedModel
    targets: Mapping[str, str]
    patterns: Mapping[str, str]
    dropped: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, names: Iterable[str]) -> Layout:
        """The layout of the stored `names`, by the conversion maps that transformers has for the model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

        maps = get_model_conversion_mapping(model)
        renamings = [each for each in maps if isinstance(each, WeightRenaming)]
        converters = [each for each in maps if not isinstance(each, WeightRenaming)]
        prefix, own = model.base_model_prefix, model.state_dict()
        targets: dict[str, str] = {}
        patterns: dict[str, str] = {}
        dropped: list[str] = []
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, own)  # type: ignore[arg-type]
            if target not in own and name in own:
                target, pattern = name, None
            if target not in own:
                dropped.append(name)
                continue
            targets[name] = target
            if pattern is not None:
                patterns[name] = pattern
        return cls(model, targets, patterns, tuple(dropped))

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Stored name -> dtype of the tensor that it makes."""
        own = self.model.state_dict()
        return {name: own[target].dtype for name, target in self.targets.items()}

    def below(self, prefix: str) -> list[str]:
        """The stored names that make the tensors of a submodule, or one tensor, of the model."""
        return [name for name, target in self.targets.items() if target == prefix or target.startswith(f"{prefix}.")]

    def made(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors that stored ones make: all those `below` something must be there."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        plain = {self.targets[name]: each for name, each in tensors.items() if name not in self.patterns}
        if len(plain) == len(tensors):
            return plain
        maps: list[Any] = get_model_conversion_mapping(self.model)
        converters = {pattern: each for each in maps for pattern in each.source_patterns}
        under_way: dict[str, Any] = {}
        for name in (name for name in self.targets if name in tensors and name in self.patterns):
            target, pattern = self.targets[name], self.patterns[name]
            job = under_way.setdefault(target, copy.deepcopy(converters[pattern]))
            job.add_tensor(target, name, pattern, tensors[name])
        for target, job in under_way.items():
            found = job.convert(target, model=self.model, config=self.model.config)
            plain |= {name: each[0] if isinstance(each, list) else each for name, each in found.items()}
        return plain

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `made`: the checkpoint's own tensors from the model's."""
        from transformers.core_model_loading import revert_weight_conversion

        back = {target: name for name, target in self.targets.items() if name not in self.patterns}
        renamed = {back[name]: each for name, each in tensors.items() if name in back}
        rest = {name: each for name, each in tensors.items() if name not in back}
        return renamed | (revert_weight_conversion(self.model, rest) if rest else {})


def empty_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a config on the meta device; buffers that no checkpoint stores have their values.

    Of a model of several towers all of them, as the class that its config names has them. Raises ValueError for a
    config of another kind.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    named = _named_class(config)
    try:
        with init_empty_weights(include_buffers=False), _Unfilled():
            model: Any = (
                AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
                if named is None
                else named._from_config(config, dtype=dtype)
            )
    except ValueError as error:
        raise ValueError(
            f"config.json says {_kind(config)}, of which transformers has no causal language model "
            f"({_line(error)[:120]}); give a model that predicts the next token"
        ) from None
    model.tie_weights()
    return model.eval()


class _Unfilled(TorchFunctionMode):
    """While active in a thread, first values of meta tensors are not computed: torch does it in Python, for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in _FILLS and isinstance(first, Tensor) and first.is_meta:
            return first
        return func(*args, **(kwargs or {}))


def _named_class(config: Any) -> Any:
    """The class of transformers that a config names, if it generates text and is of several towers, or one that the
    causal language models of transformers lack; None for any other config."""
    import transformers

    found: Any = getattr(transformers, _kind(config), object)
    known = config.get_text_config() is config and type(config) in transformers.AutoModelForCausalLM._model_mapping
    if known or config.is_encoder_decoder or not issubclass(found, transformers.GenerationMixin):
        return None
    return found if isinstance(config, cast(Any, found).config_class) else None


def check_causal(checkpoint: Checkpoint, model: PreTrainedModel) -> Layout:
    """The layout of a checkpoint for an empty model, whose parameters get the dtypes that transformers loads them in.

    Raises ValueError, in one line, for tensors that are missing or left over, shapes that differ, ties that the
    weights do not keep, and for what `check_plain` refuses.
    """
    check_plain(checkpoint)
    layout = Layout.of(model, checkpoint.tensors)
    twin, found = _loaded_on_meta(checkpoint, model)
    where, kind = str(checkpoint.path), type(model).__name__
    if (missing := _ordered(model, found["missing_keys"])) or len(layout.dropped) == len(checkpoint.tensors):
        _refuse_wrapped(checkpoint, lambda names: not Layout.of(model, names).dropped)
        raise ValueError(
            f"{where} lacks {len(missing)} of the {len(model.state_dict())} tensors of {kind}, such as "
            f"{missing[0]!r}{_because(checkpoint, model, missing)}; they would be random: get the weights that belong "
            "to this config.json"
        )
    for name, stored, wanted in sorted(found["mismatched_keys"], key=lambda each: str(each[0])):
        raise ValueError(
            f"{where}: {name!r} has shape {tuple(stored)}, the model of config.json {tuple(wanted)}; the weights "
            "belong to another model"
        )
    _check_left_over(checkpoint, model, layout, set(found["unexpected_keys"]))
    _check_ties(checkpoint, model, layout)
    for name, parameter in twin.named_parameters():
        _retype(model, name, parameter.dtype)
    model._weight_conversions = twin._weight_conversions  # type: ignore[attr-defined]  # what `stored` reverts
    return layout


def check_direction(config: Any, where: str) -> None:
    """Raise ValueError for a config whose model sees more than what comes before each token, though transformers may
    have a causal language model of that kind as well.

    Of BERT and its like: their heads predict masked words unless the config says `is_decoder`. Of encoder-decoders
    (T5, BART, Whisper), which were not saved as their decoder alone.
    """
    from transformers import AutoModelForMaskedLM

    if config.is_encoder_decoder and not _kind(config).endswith("ForCausalLM"):
        raise ValueError(
            f"{where}: config.json says {_kind(config)}, an encoder-decoder: recipes and commands take models that "
            "predict the next token; prune it in Python, prunus.prune_in_turn(model, criterion, batches=...)"
        )
    masked = type(config) in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
    if masked and getattr(config, "is_decoder", None) is False:
        raise ValueError(
            f"{where}: config.json says {_kind(config)} without is_decoder: true: each token sees those after it, and "
            "predicting the next one means nothing; prune an encoder by a recipe with the key texts"
        )


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise ValueError for weights that are not the model's own numbers: quantised, or with an adapter beside them."""
    config = checkpoint.config()
    method = config.get("quantization_config")
    if method:
        named = method.get("quant_method", "by an unnamed method") if isinstance(method, dict) else method
        raise ValueError(
            f"{checkpoint.path} is quantised ({named}, says config.json); give the model in bf16, fp16 or fp32, or "
            "dequantise it first"
        )
    for name, each in checkpoint.tensors.items():
        if each.dtype.itemsize == 1 and each.dtype != torch.bool:
            raise ValueError(
                f"{checkpoint.path} is quantised: {name!r} has 8 bits ({DTYPES[each.dtype]}); give the model in bf16, "
                "fp16 or fp32, or dequantise it first"
            )
    if (checkpoint.folder / ADAPTER).is_file():
        raise ValueError(
            f"{checkpoint.path} has an adapter beside its weights ({ADAPTER}): merge it (peft: merge_and_unload, "
            "save_pretrained), or move it out of the folder to leave it away"
        )


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """Raise ValueError when the tokenizer makes ids that the embedding has no row for.

    Special tokens above are let pass: published models have some that no text contains.
    """
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    above = [
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if index >= rows and not (index in added and added[index].special)
    ]
    if above:
        index, token = max(above)
        raise ValueError(
            f"{where}: the tokenizer has {index + 1} ids (the last is {token!r}), the embedding {rows} rows; give the "
            "tokenizer of this model, or resize the embedding (resize_token_embeddings) and save it"
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
    """Raise ValueError naming the first tensor that holds NaN or an infinity. A GPU is waited for once, not for each.

    >>> check_finite([("a", torch.ones(2))], "model")
    """
    named = [(name, t.detach()) for name, t in tensors if t.is_floating_point() and t.numel() and not t.is_meta]
    good = [torch.stack(t.aminmax()).isfinite().all() for _, t in named]  # NaN and infinities are among the extremes
    if not good or bool(torch.stack([each.to(good[0].device) for each in good]).all()):
        return
    name, wrong = next(pair for pair, each in zip(named, good, strict=True) if not each)
    raise ValueError(
        f"{where}: {name!r} holds {int((~wrong.isfinite()).sum())} values that are NaN or infinite; the model is "
        "broken: get it again"
    )


def wrapper_of(names: Sequence[str], known: Callable[[list[str]], bool]) -> str:
    """The prefix that a wrapper put before every name, such as "module."; "" if there is none.

    >>> wrapper_of(["module.a", "module.b"], lambda names: names == ["a", "b"])
    'module.'
    """
    if known(list(names)):
        return ""
    first = names[0].split(".")
    for depth in range(1, len(first)):
        prefix = ".".join(first[:depth]) + "."
        if not all(name.startswith(prefix) for name in names):
            return ""
        if known([name.removeprefix(prefix) for name in names]):
            return prefix
    return ""


def _loaded_on_meta(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """A model that transformers made of the headers alone, and what it says of them."""
    on_meta = {
        name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in checkpoint.tensors.items()
    }
    how: dict[str, Any] = {"dtype": model.dtype, "device_map": {"": "meta"}, "ignore_mismatched_sizes": True}
    with quiet(logging.CRITICAL):
        try:
            return type(model).from_pretrained(
                None, config=model.config, state_dict=on_meta, output_loading_info=True, **how
            )  # type: ignore[return-value]
        except RuntimeError as error:
            raise ValueError(
                f"{checkpoint.path}: its tensors do not make a {type(model).__name__} ({_line(error)}); the weights "
                "belong to another model, or some are missing"
            ) from None


def _refuse_wrapped(checkpoint: Checkpoint, known: Callable[[list[str]], bool]) -> None:
    prefix = wrapper_of(list(checkpoint.tensors), known)
    if prefix:
        raise ValueError(
            f"{checkpoint.path}: all names begin with {prefix!r}, which a wrapper (DataParallel, torch.compile, "
            "Lightning) put there; save the model inside the wrapper, or take the prefix off the names"
        )


def _because(checkpoint: Checkpoint, model: PreTrainedModel, missing: Sequence[str]) -> str:
    """What explains missing tensors, if it can be seen."""
    layers = getattr(model.config, "num_hidden_layers", None)
    numbers = {int(found[1]) for name in checkpoint.tensors if (found := re.search(r"\.(\d+)\.", f".{name}"))}
    if layers and numbers and max(numbers) + 1 < layers:
        return f" (config.json asks for {layers} layers, the weights have {max(numbers) + 1})"
    said = _named(checkpoint.config())
    if said not in ("", type(model).__name__):
        return f" (config.json says {said})"
    head = model.get_output_embeddings()
    if head is not None and {f"{name}.weight" for name, each in model.named_modules() if each is head} == set(missing):
        return " (if it shares the weights of the embedding, set tie_word_embeddings: true in config.json)"
    return ""


def _check_left_over(checkpoint: Checkpoint, model: PreTrainedModel, layout: Layout, unexpected: set[str]) -> None:
    kind, said = type(model).__name__, _named(checkpoint.config())
    if unexpected:
        left = [name for name in layout.dropped if name in unexpected] or sorted(unexpected)
        raise ValueError(
            f"{checkpoint.path} holds {len(unexpected)} tensors that {kind} has no place for, such as {left[0]!r}"
            f"{f' (config.json says {said})' if said not in ('', kind) else ''}; give the weights that belong to this "
            "config.json, of a model that predicts the next token"
        )
    if layout.dropped and said not in ("", kind):
        raise ValueError(
            f"{checkpoint.path} is a model of several towers ({said}): {kind} would leave out {len(layout.dropped)} "
            f"tensors, such as {layout.dropped[0]!r}; save the language model as a model of its own first"
        )


def _check_ties(checkpoint: Checkpoint, model: PreTrainedModel, layout: Layout) -> None:
    """transformers unties weights that are both stored and differ; here config.json must say so."""
    stored = {target: name for name, target in layout.targets.items()}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for one, other in ties.items():
        if one in stored and other in stored and not _equal(checkpoint, stored[one], stored[other]):
            raise ValueError(
                f"{checkpoint.path}: config.json ties {one!r} to {other!r}, and the weights hold two that differ; set "
                "tie_word_embeddings: false in config.json, or save the model tied"
            )


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    steps = range(0, a.numel, _PIECE)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        torch.equal(a.piece(start, min(start + _PIECE, a.numel)), b.piece(start, min(start + _PIECE, a.numel)))
        for start in steps
    )


def _retype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    parameter = model.get_parameter(name)
    if parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)  # on meta: tied owners keep one object


def _ordered(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    known = set(names)
    return [name for name in model.state_dict() if name in known]


def _kind(config: Any) -> str:
    return _named(vars(config)) or type(config).__name__


def _named(config: Mapping[str, Any]) -> str:
    """The first of a config's architectures; empty where it says none."""
    said = config.get("architectures")
    return said[0] if isinstance(said, list) and said and isinstance(said[0], str) else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
