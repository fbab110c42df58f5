"""Which tensors of a model are prunable, each seen as a matrix, and what calibration learnt about their inputs.

Prunable are the weights of Linear, Conv1d/2d/3d and the transposed Conv1D of GPT-2, and every expert of a stacked
three-dimensional parameter. They are found by module type and shape, never by the name of a model family:

    Linear (out, in)   Conv2d (out, in, h, w) -> (out, in*h*w)   Conv1D (in, out)
    stack (experts, out, in), or (experts, in, out): as its module says with is_transposed, or multiplies a probe

Left dense unless an `include` glob names them: the output head, weights tied to an embedding, routers, depthwise
convolutions, gates (matrices with no more rows or columns than the model has heads), every part of a model of several
towers that text does not pass, and stacks that no module was seen to multiply with: gates of recurrent blocks.
How blocks are found, and how inputs are recorded, is in `blocks`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise, product
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus.machine import imported, in_mode, is_pretrained

__all__ = [
    "Inputs",
    "Layer",
    "Lookup",
    "Products",
    "View",
    "check_unwrapped",
    "find_layers",
    "matches",
    "parameter_shapes",
    "scan",
]

log = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNSEEN = (nn.modules.conv._ConvTransposeNd, nn.RNNBase, nn.RNNCellBase)
_CHUNK = 1 << 24  # elements upcast to float32 at once: 64 MiB


class Inputs:
    """What calibration learnt about one layer's inputs X (tokens, in): sums over tokens, no activations.

    `tokens`: rows seen. `squares`: (in,) float32, sum of x_j^2. `gram`: (in, in) float32, sum of x x^T, or None.

    >>> inputs = Inputs(2, gram=True)
    >>> inputs.add_(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    >>> inputs.norms.tolist(), inputs.tokens
    ([5.0, 1.0], 2)
    """

    def __init__(self, columns: int, *, gram: bool = False, device: torch.device | str | None = None) -> None:
        self.tokens = 0
        self.squares = torch.zeros(columns, dtype=torch.float32, device=device)
        self._gram = torch.zeros(columns, columns, dtype=torch.float32, device=device) if gram else None
        self._half = False  # only the lower triangle of _gram is up to date

    @property
    def gram(self) -> Tensor | None:
        """(in, in) float32, sum of x x^T, or None if it is not kept. Completed from its lower triangle when read."""
        if self._half:
            assert self._gram is not None
            _mirror_(self._gram)
            self._half = False
        return self._gram

    @gram.setter
    def gram(self, value: Tensor | None) -> None:
        self._gram, self._half = value, False

    @property
    def columns(self) -> int:
        """The layer's number of inputs."""
        return self.squares.numel()

    @property
    def norms(self) -> Tensor:
        """||X_:j||_2 of every input, (in,) float32."""
        return self.squares.sqrt()

    @torch.no_grad()
    def add_(self, x: Tensor) -> None:
        """Adds the rows of x (..., in), any float dtype; products are exact for 16-bit x, sums are float32.

        Raises: ValueError if x has another last dimension.
        """
        if x.shape[-1:] != self.squares.shape:
            raise ValueError(f"inputs of shape {tuple(x.shape)} do not end in the layer's {self.columns} columns")
        rows = x.reshape(-1, self.columns).to(self.squares.device)  # (tokens, in)
        self.tokens += rows.shape[0]
        with torch.autocast(rows.device.type, enabled=False):  # the model may run in 16 bits around this
            if self._gram is not None and _multiplies_to_float32(rows):
                _add_lower_(self._gram, rows)
                self._half = True
            elif self._gram is None and rows.is_cuda and rows.dtype != torch.float64:  # one reading, no float32 copy
                self.squares.add_(torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square_())
            else:
                for part in rows.split(max(1, _CHUNK // max(1, self.columns))):
                    self._add_wide_(part.float())
        if self._gram is not None:
            self.squares.copy_(self._gram.diagonal())

    def _add_wide_(self, part: Tensor) -> None:
        if self.gram is None:
            self.squares.add_(part.square().sum(0))
        else:
            self.gram.addmm_(part.T, part)

    @classmethod
    def together(cls, parts: Sequence[Inputs]) -> Inputs:
        """What all of these learnt about layers of as many columns, added up."""
        found = cls(parts[0].columns, device=parts[0].squares.device)
        for part in parts:
            found.tokens += part.tokens
            found.squares += part.squares
            if part.gram is not None:
                found.gram = part.gram.clone() if found.gram is None else found.gram.add_(part.gram)
        return found

    def check(self, name: str) -> None:
        """Raises ValueError if the sums of layer `name` are not finite."""
        bad = ~self.squares.isfinite()
        if bad.any():
            column = int(bad.nonzero()[0])
            raise ValueError(
                f"'{name}' received NaN, infinite or overflowing inputs in {int(bad.sum())} of {self.columns} columns "
                f"(first: column {column}). Check the calibration text, or run the model in bfloat16 or float32."
            )


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable weight (out, in), any float dtype, and what is known about it.

    >>> Layer("fc", torch.ones(2, 4)).weight.shape
    torch.Size([2, 4])
    """

    name: str
    weight: Tensor
    inputs: Inputs | None = None
    grad: Tensor | None = None


@dataclass(frozen=True)
class View:
    """How one parameter, or one expert of a stacked parameter, is seen as a matrix (out, in).

    `parameter` is the key in `dict(model.named_parameters())`; `index` the expert; `transposed` means stored (in, out).

    >>> view = find_layers(nn.Sequential(nn.Linear(4, 2)))[0]
    >>> view.parameter, view.shape
    ('0.weight', (2, 4))
    """

    name: str
    parameter: str
    index: int | None
    transposed: bool
    shape: tuple[int, int]

    def matrix(self, parameter: Tensor) -> Tensor:
        """The matrix (out, in); shares the parameter's storage (a channels-last convolution is copied)."""
        stored = parameter if self.index is None else parameter[self.index]
        return stored.T if self.transposed else stored.flatten(1)

    @torch.no_grad()
    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        """Copies matrix (out, in) into the parameter, whatever their dtypes and devices.

        Raises: ValueError if the matrix has another shape.
        """
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"'{self.name}' is {self.shape} as (out, in); the matrix given is {tuple(matrix.shape)}")
        stored = parameter.detach() if self.index is None else parameter.detach()[self.index]
        stored.copy_((matrix.T if self.transposed else matrix).reshape(stored.shape))


def find_layers(
    root: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = (), prefix: str = ""
) -> list[View]:
    """The prunable weights below root, in module order; tied weights are one layer.

    Globs are matched as in `matches`. With `include` only what it names is taken, and it alone can name the head,
    tied embeddings and routers (`include=["*"]` is everything). `prefix` is prepended to the names: with root the
    block `model.layers.0`, names stay those of the model.

    Raises: ValueError for a glob that matches nothing, for a stack of matrices that is named and whose orientation is
    unknown, and for weights that are not floating point.

    >>> [view.name for view in find_layers(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))]
    ['0', '2']
    """
    found = list(scan(root, prefix))
    for glob in (*include, *exclude):
        _check_matches(glob, [candidate.view.name for candidate in found])
    taken: list[View] = []
    unknown: dict[str, None] = {}
    for candidate in found:
        name = candidate.view.name
        named = any(matches(name, glob) for glob in include)
        if any(matches(name, glob) for glob in exclude):
            continue
        if not named and (include or candidate.dense):
            if candidate.trouble and not include:
                unknown.setdefault(_stack_name(name))
            continue
        if candidate.trouble:
            raise ValueError(candidate.trouble)
        taken.append(candidate.view)
    made = [path for path, module in root.named_modules() if _is_made(module)]
    if made:
        _note(
            f"{_join(prefix, made[0]) or 'the model'} and {len(made) - 1} other layers stay dense: their weights are "
            "made of other parameters (weight_norm, torch's parametrize and prune: make them plain before), or are "
            "query, key and value of nn.MultiheadAttention in one"
        )
    strange = [path for path, module in root.named_modules() if isinstance(module, _UNSEEN)]
    if strange:
        _note(
            f"{_join(prefix, strange[0]) or 'the model'} and {len(strange) - 1} other layers stay dense: transposed "
            "convolutions and recurrent layers (LSTM, GRU) are not pruned"
        )
    if unknown:
        _note(f"{', '.join(unknown)} stay dense: whether these stacks are stored (out, in) or (in, out) is not known")
    return taken


def check_unwrapped(root: nn.Module) -> None:
    """Raises ValueError for a model with adapters in it, ours or peft's: its weights are not all that it computes with.

    And for one that transformers quantised (not GGUF), one that is sharded, of whose weights this process has
    a part, one whose lazy layers have none yet, and one of TorchScript.

    >>> check_unwrapped(nn.Linear(2, 2))
    """
    if isinstance(root, torch.jit.ScriptModule):
        raise ValueError("the model is of TorchScript, whose modules cannot be looked into: prune it before torch.jit")
    quantizer: Any = getattr(root, "hf_quantizer", None)
    if quantizer is not None:
        named: Any = quantizer.quantization_config.quant_method
        method = str(getattr(named, "value", named))
        if method != "gguf" or not all(each.is_floating_point() for each in root.parameters()):
            raise ValueError(f"the model is quantised ({method}); load it in bf16, fp16 or fp32 before pruning it")
    adapter = imported("peft.tuners.tuners_utils", "BaseTunerLayer")
    shard = imported("torch.distributed.tensor", "DTensor")
    adapted = imported("prunus.adapt.adapters", "Factors") + imported("prunus.adapt.sites", "Cast")
    for name, module in root.named_modules():
        if isinstance(module, adapted):
            raise ValueError(
                f"{type(root).__name__} is adapted ({name!r}): call merge_ on its adaptation first, or remove_"
            )
        if any(isinstance(each, nn.parameter.UninitializedParameter) for each in module.parameters(recurse=False)):
            raise ValueError(f"{name!r} is lazy and has no weights yet: run the model on a batch first")
        if any(isinstance(each, shard) for each in module.parameters(recurse=False)):
            raise ValueError(f"{name!r} is sharded: prune and save the model before it is, or gather it")
        if isinstance(module, adapter):
            raise ValueError(
                f"{name!r} holds an adapter of peft: merge it first, model = model.merge_and_unload(), and wrap the "
                "pruned model anew"
            )


def parameter_shapes(parameters: Mapping[str, Tensor], views: Sequence[View]) -> dict[str, tuple[int, ...]]:
    """Layer name -> shape of its parameter, such as (out, in, kh, kw); of an expert, (out, in)."""
    return {view.name: tuple(parameters[view.parameter].shape) if view.index is None else view.shape for view in views}


Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Lookup(Mapping[str, Value]):
    """Names -> what `make` makes of each, anew at each look, so that one value is in memory at a time.

    make: raises KeyError for a name that is none of them.

    >>> Lookup(["fc1", "fc2"], len)["fc1"]
    3
    """

    names: Collection[str]
    make: Callable[[str], Value]

    def __getitem__(self, name: str) -> Value:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def matches(name: str, glob: str) -> bool:
    """Whether the glob names the layer: its whole name or any dotted tail, an expert with or without its number.

    >>> matches("model.layers.0.mlp.experts.down_proj[3]", "experts.down_proj")
    True
    >>> matches("model.layers.0.fc1", "fc1"), matches("model.layers.0.fc1", "layers.0.*"), matches("a.fc1", "a")
    (True, True, False)
    """
    globs = {glob, re.sub(r"\[(\d+)\]$", r"[[]\1]", glob)}  # a final [3] may be an expert's number
    for whole in {name, _stack_name(name)}:
        parts = whole.split(".")
        tails = [".".join(parts[start:]) for start in range(len(parts))]
        if any(fnmatchcase(tail, pattern) for tail in tails for pattern in globs):
            return True
    return False


@dataclass(frozen=True)
class _Candidate:
    view: View
    dense: bool  # left dense unless asked for
    trouble: str  # why it cannot be pruned, or empty


class Products(TorchFunctionMode):
    """While active, `seen(left, right, axis)` learns of every matrix product; axis: where `right` is contracted.

    >>> with Products(lambda left, right, axis: print(tuple(right.shape), axis)):
    ...     _ = F.linear(torch.ones(1, 2), torch.ones(3, 2))
    (3, 2) -1
    """

    def __init__(self, seen: Callable[[Tensor, Tensor, int], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPERANDS:
            first = _OPERANDS[func]
            left, right = (*args, *kwargs.values())[first : first + 2]
            self.seen(left, right, -1 if func is F.linear else -2)
        return func(*args, **kwargs)


_OPERANDS: dict[Any, int] = {  # position of the two factors among the arguments
    **dict.fromkeys([F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm], 0),
    **dict.fromkeys([torch.bmm, Tensor.bmm], 0),
    **dict.fromkeys([torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm], 1),
}


def scan(root: nn.Module, prefix: str = "") -> Iterator[_Candidate]:
    keys = {id(parameter): name for name, parameter in root.named_parameters()}
    dense = _tied_and_heads(root) | _routers(root) | _gates(root) | _other_towers(root)
    seen: set[int] = set()
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            views, trouble = _views(root, path, name, parameter)
            if not views or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            key = _join(prefix, keys[id(parameter)])
            for view in views:
                named = replace(view, name=_join(prefix, view.name) or "weight", parameter=key)
                unknown = view.index is not None and bool(trouble)
                yield _Candidate(named, unknown or id(parameter) in dense, trouble.format(name=named.name))


def _views(root: nn.Module, path: str, name: str, parameter: Tensor) -> tuple[list[View], str]:
    """The views of one parameter of the module at `path` (none if it is not prunable), and what is wrong with them."""
    module = root.get_submodule(path)
    transposed = isinstance(module, imported("transformers.pytorch_utils", "Conv1D"))
    if name == "weight" and (transposed or isinstance(module, (nn.Linear, *CONVOLUTIONS))):
        shape = parameter.shape if not transposed else parameter.shape[::-1]
        wide = parameter.is_floating_point() and parameter.element_size() > 1  # of float8 torch fills no mask
        trouble = "" if wide else f"'{{name}}' is stored as {parameter.dtype}: "
        trouble += "load the model without quantisation." if trouble else ""
        return [View(path, "", None, transposed, (shape[0], shape[1:].numel()))], trouble
    if not _is_stack(module, parameter):
        return [], ""
    experts, rows, columns = parameter.shape
    transposed = _is_transposed(root, path, name)
    shape = (columns, rows) if transposed else (rows, columns)
    names = [f"{_join(path, name)}[{index}]" for index in range(experts)]
    trouble = (
        ""
        if transposed is not None
        else (
            f"'{{name}}' is one of {experts} stacked matrices of shape {(rows, columns)}, and its module "
            f"'{path}' ({type(module).__name__}) neither says whether they are stored (in, out) nor showed it when it "
            "was run. Set is_transposed to True or False on the module, or skip them with exclude."
        )
    )
    return [View(each, "", index, bool(transposed), shape) for index, each in enumerate(names)], trouble


def _is_made(module: nn.Module) -> bool:
    """Whether a layer has matrices, but no parameter `weight` that is one."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) and "weight" not in module._parameters


def _is_stack(module: nn.Module, parameter: Tensor) -> bool:
    if parameter.ndim != 3 or not parameter.is_floating_point() or isinstance(module, nn.modules.conv._ConvNd):
        return False
    return min(parameter.shape) > 1  # (1, positions, width) is a position or class embedding


def _is_transposed(root: nn.Module, path: str, name: str) -> bool | None:
    """Whether a stack is stored (in, out): as transformers or the caller declares, or as its module multiplies."""
    module = root.get_submodule(path)
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    key = name, module.get_parameter(name).shape, *map(_kind, _around(root, path))
    if key not in _PROBED:
        _PROBED[key] = _probed(root, path, name)
    return _PROBED[key]


_PROBED: dict[tuple[Any, ...], bool | None] = {}  # modules of one class, shape and flags multiply in one way


def _kind(module: nn.Module) -> tuple[Any, ...]:
    flags = {key: each for key, each in vars(module).items() if isinstance(each, (bool, str)) and key != "training"}
    return type(module), *sorted(flags.items())


def _around(root: nn.Module, path: str) -> list[nn.Module]:
    """The module at `path` and up to two around it, one of which multiplies."""
    parts = path.split(".") if path else []
    return [root.get_submodule(".".join(parts[: len(parts) - above])) for above in range(min(3, len(parts)) or 1)]


def _probed(root: nn.Module, path: str, name: str) -> bool | None:
    """How the stack is multiplied when its module, or one of two around it, runs on a few tokens; None if none does."""
    parts = path.split(".") if path else []
    for above, around in enumerate(_around(root, path)):
        if any(each.is_meta for each in around.parameters()):
            around = _of_zeros(around)
        below = ".".join([*parts[len(parts) - above :], name])
        found = _multiplied(around, around.get_parameter(below))
        if found is not None:
            return found
    return None


@torch.no_grad()
def _multiplied(around: nn.Module, stack: Tensor) -> bool | None:
    """Whether a product with a part of the stack contracts its rows, in a run of `around`; None if there is none."""
    found: set[bool] = set()
    size = stack.numel() * stack.element_size()

    def seen(left: Tensor, right: Tensor, axis: int) -> None:
        for weight, contracted in ((right, axis), (left, -1)):
            if weight.ndim in (2, 3) and 0 <= weight.data_ptr() - stack.data_ptr() < size:
                found.update(rows for rows in (False, True) if weight.stride(contracted) == stack.stride(2 - rows))

    tokens = 2 * stack.shape[0]
    with in_mode(around, training=False), Products(seen):
        for front, width in product([(1, tokens), (tokens,)], dict.fromkeys(stack.shape[1:])):
            x = torch.linspace(-1, 1, tokens * width).sin().reshape(*front, width).to(stack)
            with suppress(Exception):  # most modules take other arguments
                around(x)
            if len(found) == 1:
                return found.pop()
            found.clear()
    return None


def _of_zeros(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device that can be run: all zeros, on the CPU."""
    found = deepcopy(module).to_empty(device="cpu")
    for tensor in (*found.parameters(), *found.buffers()):
        tensor.data.zero_()
    return found


def _tied_and_heads(root: nn.Module) -> set[int]:
    """The ids of parameters that an embedding owns too, and of a transformers model's output head."""
    tied = {id(module.weight) for module in root.modules() if isinstance(module, nn.Embedding)}
    head = root.get_output_embeddings() if is_pretrained(root) else None
    return tied | ({id(parameter) for parameter in head.parameters()} if head is not None else set())


def _gates(root: nn.Module) -> set[int]:
    """The ids of weights of depthwise convolutions, and of linear layers as thin as one value a head of the model."""
    found = {
        id(each.weight)
        for each in root.modules()
        if isinstance(each, CONVOLUTIONS) and each.groups == each.in_channels > 1
    }
    config: dict[str, Any] = root.config.get_text_config().to_dict() if is_pretrained(root) else {}
    heads = [n for key, n in config.items() if isinstance(n, int) and ("heads" in key or key == "n_head")]
    linears = [each for each in root.modules() if isinstance(each, nn.Linear)]
    return found | {id(each.weight) for each in linears if min(each.weight.shape) <= max(heads, default=0)}


def _other_towers(root: nn.Module) -> set[int]:
    """The ids of parameters of a model of several towers that lie outside the one text goes through."""
    config = root.config if is_pretrained(root) else None
    if config is None or config.is_encoder_decoder or config.get_text_config() is config:
        return set()
    text: nn.Module = cast(Any, root.get_decoder)()
    inside = {id(parameter) for parameter in text.parameters()}
    return {id(parameter) for parameter in root.parameters()} - inside


def apart(root: nn.Module) -> set[int]:
    """The ids of parameters of other towers and of modules that take pictures: no mask of tokens is for their rows."""
    eyes = [each for each in root.modules() if is_pretrained(each) and each.main_input_name.startswith("pixel")]
    head: nn.Module | None = root.get_output_embeddings() if is_pretrained(root) else None
    spoken = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return _other_towers(root) - spoken | {
        id(parameter) for eye in eyes if eye is not root for parameter in eye.parameters()
    }


def _routers(root: nn.Module) -> set[int]:
    """The ids of weights that choose among or gate stacked experts.

    Such a Linear sits beside the stack of E experts, alone or alone in a module, and has E rows, or one.
    """
    found: set[int] = set()
    modules = dict(root.named_modules())
    for path, module in modules.items():
        stacks = [parameter for parameter in module.parameters(recurse=False) if _is_stack(module, parameter)]
        if not stacks or not path:
            continue
        for sibling in modules[path.rpartition(".")[0]].children():
            linears = [each for each in sibling.modules() if isinstance(each, nn.Linear)]
            if len(linears) == 1 and linears[0].out_features in (1, stacks[0].shape[0]):
                found.add(id(linears[0].weight))
    return found


@functools.cache
def _note(text: str) -> None:
    """Said once: layers are looked for again and again."""
    log.warning(text)


def _check_matches(glob: str, names: Sequence[str]) -> None:
    if any(matches(name, glob) for name in names):
        return
    stems = list(dict.fromkeys(_stack_name(name) for name in names))
    close = _close(glob, stems) or stems[:3]
    inside = f"'{glob}.*' names the layers in it." if any(matches(name, f"{glob}.*") for name in names) else ""
    raise ValueError(
        f"'{glob}' matches none of the {len(names)} prunable layers. "
        + (inside or (f"Close names: {', '.join(map(repr, close))}." if close else "There are none."))
    )


def _close(glob: str, names: Iterable[str]) -> list[str]:
    """Names whose tail of as many parts as the glob has is spelt like it."""
    depth = glob.count(".") + 1
    tails: dict[str, str] = {}
    for name in names:
        tails.setdefault(".".join(name.split(".")[-depth:]), name)
    return [tails[tail] for tail in get_close_matches(glob, tails, n=3, cutoff=0.5)]


def _multiplies_to_float32(x: Tensor) -> bool:
    """Whether x is 16-bit and torch multiplies it with float32 results here (CUDA only)."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _add_lower_(gram: Tensor, rows: Tensor) -> None:
    """Adds x x^T of 16-bit rows (tokens, in) to the lower triangle, by columns an eighth at a time; no float32 copy.

    The panels hold 9/16 of the matrix, so about half of the products are saved.
    """
    for start, stop in _panels(len(gram)):
        panel, left, right = gram[start:, start:stop], rows[:, start:].T, rows[:, start:stop]
        if _adds_in_place(gram.device):
            torch.addmm(panel, left, right, out_dtype=torch.float32, out=panel)
        else:
            panel.add_(torch.mm(left, right, out_dtype=torch.float32))


def _mirror_(gram: Tensor) -> None:
    """The upper triangle becomes the lower one's mirror image."""
    for start, stop in _panels(len(gram)):
        gram[start:stop, stop:] = gram[stop:, start:stop].T
        gram[start:stop, start:stop] = gram[start:stop, start:stop].tril() + gram[start:stop, start:stop].tril(-1).T


def _panels(columns: int) -> Iterable[tuple[int, int]]:
    """An eighth of the columns at a time, in multiples of 256 and at least 1024: large enough for the device."""
    return pairwise([*range(0, columns, max(1024, -(-columns // 2048) * 256)), columns])


@functools.cache
def _adds_in_place(device: torch.device) -> bool:
    """Whether this torch adds a product of 16-bit matrices to a float32 one in place; older ones want one dtype."""
    total, x = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except RuntimeError as error:
        log.info("sums of x x^T take a second matrix, because torch %s says: %s", torch.__version__, error)
        return False
    return True


def _stack_name(name: str) -> str:
    return re.sub(r"\[\d+\]$", "", name)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
