"""Which parameters the names "biases", "norms", "head" and "embeddings" mean in a model.

They are found by structure, never by class name, so a norm nobody has seen before is still a norm:

    biases      one-dimensional, in a module that owns the matrix they belong to
    norms       one-dimensional, in a module whose whole subtree owns no matrix
    head        all of the output embedding          embeddings  input, position and type embeddings

How they are trained, and the adapters, are in `adapt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from prunus.machine import is_pretrained

ADAPTERS = ("lora", "lora_prune", "scale_lora", "mask_lora")
SUBSETS = ("biases", "norms", "head", "embeddings", *ADAPTERS, "full")

_MENDS = {
    "biases": "Give its layers biases with add_biases(model), or train 'norms' instead",
    "norms": "Train 'biases' or an adapter ('mask_lora') instead",
    "head": "Only a transformers model with an output embedding has a head; leave 'head' out",
    "embeddings": "Leave 'embeddings' out",
}


def check_subsets(train: Sequence[str]) -> None:
    """Raises ValueError if `train` is not a sensible combination of SUBSETS.

    >>> check_subsets(["norms", "mask_lora"])
    """
    if isinstance(train, str):
        raise ValueError(f"train is the text {train!r}; give a list of subsets, e.g. [{train!r}]")
    unknown = [name for name in train if name not in SUBSETS]
    if unknown:
        raise ValueError(f"Unknown subset {unknown[0]!r}; known are {', '.join(SUBSETS)}")
    if not train:
        raise ValueError(f"train is empty; name at least one of {', '.join(SUBSETS)}")
    double = [name for name in SUBSETS if list(train).count(name) > 1]
    if double:
        raise ValueError(f"Subset {double[0]!r} is named {list(train).count(double[0])} times; name it once")
    if "full" in train and len(train) > 1:
        others = [name for name in train if name != "full"]
        raise ValueError(f"'full' already trains every parameter; drop it or drop {', '.join(map(repr, others))}")
    kinds = [name for name in train if name in ADAPTERS]
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(map(repr, kinds))} would adapt the same layers; choose one")


def find_subset(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters that a subset other than an adapter names, by their key in `model.named_parameters()`.

    Raises: ValueError if there are none, naming the subset, the model's class and what to do.

    >>> list(find_subset(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "norms"))
    ['1.weight', '1.bias']
    """
    find = {"biases": _biases, "norms": _norms, "head": _head, "embeddings": _embeddings, "full": _all}[name]
    wanted = {id(parameter) for parameter in find(model)}
    found = {key: parameter for key, parameter in model.named_parameters() if id(parameter) in wanted}
    if not found:
        raise ValueError(f"Subset {name!r} is empty in {type(model).__name__}. {_MENDS.get(name, 'Check the model')}.")
    return found


def _biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """Biases by the name of their matrix in the same module.

    "bias" belongs to any matrix, "in_proj_bias" to "in_proj_weight", "up_proj_bias" (experts, out) to the stack
    "up_proj". "e_score_correction_bias" belongs to none: no gradient reaches it.
    """
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        matrices = {name for name, parameter in own.items() if parameter.ndim >= 2}
        expected = {name.removesuffix("_weight") + "_bias" for name in matrices}
        for name, parameter in own.items():
            if name in expected or (name == "bias" and parameter.ndim == 1 and matrices):
                yield parameter


def _norms(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and len(own) == len(list(module.parameters())) and all(parameter.ndim == 1 for parameter in own):
            yield from own


def _head(model: nn.Module) -> Iterator[nn.Parameter]:
    head = model.get_output_embeddings() if is_pretrained(model) else None
    if head is not None:
        yield from head.parameters()


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()
    if is_pretrained(model):
        yield from model.get_input_embeddings().parameters()


def _all(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.is_floating_point())
