"""A model as a chain of blocks: find them, capture what each receives, run one, watch what its layers receive.

    h_0 = embeddings(input_ids)     h_{i+1} = block_i(h_i, its own captured arguments)     logits = head(norm(h_n))

Nothing is named by family: blocks are the repeated modules of the tree, their arguments are whatever the model passes
(rotary embeddings, masks and positions may differ by block), also what earlier blocks return besides the hidden state,
or leave in a dictionary for later ones (shared keys and values). Which weights are prunable is in `layers`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_map_only

from prunus.layers import scan
from prunus.machine import is_pretrained, with_forwards

log = logging.getLogger(__name__)

_FEW = 2  # tokens that show which blocks a model runs
_REST = 0.1  # largest share of the prunable weights that another list of modules may hold


class Source(Protocol):
    """Brings parts of a model to a device and frees them."""

    def load(self, name: str, device: torch.device) -> nn.Module:
        """The named submodule with its weights on `device`."""
        ...

    def release(self, name: str) -> None:
        """Free the submodule's device memory."""
        ...

    def outside(self, device: torch.device) -> AbstractContextManager[None]:
        """Context in which everything outside the blocks is on `device`."""
        ...

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One parameter on `device`; the model's own where that is its place."""
        ...


@dataclass(eq=False)
class Passed:
    """A place in the arguments of one batch for what only a block that has run knows: a value that it returned, or
    whatever it left in a container that was empty before."""

    value: Any = None


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments one block receives besides the hidden state, which goes first or under the keyword `hidden`.

    returns: where what it returns after the hidden state goes, None for what no later block takes.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden: str | None = None
    returns: tuple[Passed | None, ...] = ()

    def to(self, device: torch.device | str) -> Arguments:
        """The same arguments with every tensor on `device`, also inside tuples, lists and dictionaries, and what
        earlier blocks passed, as it is."""
        return Arguments(_move(self.args, device), _move(self.kwargs, device), self.hidden, self.returns)


register_pytree_node(
    Arguments,
    lambda call: ([call.args, call.kwargs], (call.hidden, call.returns)),
    lambda parts, rest: Arguments(*parts, *rest),
)


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the model's repeated blocks in order, such as "model.layers.0".

    They are the items of the nn.ModuleList that holds most of the prunable weights, of one class or of several with a
    base class of their own (hybrids of attention and state-space blocks).

    Raises: ValueError, with what was looked for and found, if no list holds more than half of the prunable weights,
    if its classes are unrelated, if a block stands in it twice, or if another list apart from it holds more than a
    tenth (an encoder-decoder, several towers).

    >>> find_blocks(model)[0]
    'model.decoder.layers.0'
    """
    sizes, total = _list_sizes(model)
    best = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes or sizes[best] * 2 <= total:
        raise ValueError(_refusal(model, "none holds more than half", sizes, total))
    blocks = model.get_submodule(best)
    if len(set(blocks.children())) < len(blocks._modules):
        raise ValueError(_refusal(model, f"'{best}' has one block in several places", sizes, total))
    if not _related({type(block) for block in blocks.children()}):
        classes = sorted({type(block).__qualname__ for block in blocks.children()})
        raise ValueError(_refusal(model, f"'{best}' mixes {', '.join(classes)}", sizes, total))
    rest = [name for name in sizes if not _nested(name, best) and sizes[name] > _REST * total]
    if rest:
        raise ValueError(_refusal(model, f"'{rest[0]}' is a second list beside '{best}'", sizes, total))
    return [f"{best}.{name}" for name, _ in blocks.named_children()]


def find_recomputing(model: nn.Module) -> list[str]:
    """The names of the blocks that can recompute themselves, in order, also where adapters replaced their layers.

    They are the innermost modules with transformers' flag for it; none in other models. What is inside is not looked
    at, so it does not matter what is prunable, and an encoder-decoder has blocks in both parts.

    >>> find_recomputing(nn.Linear(2, 2))
    []
    """
    flagged = [name for name, module in model.named_modules() if hasattr(module, "gradient_checkpointing")]
    return [
        name
        for name in flagged
        if not any(each.startswith(f"{name}." if name else "") for each in flagged if each != name)
    ]


@torch.no_grad()
def capture(model: nn.Module, names: Sequence[str], input_ids: Tensor) -> tuple[Tensor, dict[str, Arguments]]:
    """The hidden state (b, L, d) that enters the first block, and the arguments of every block, from one forward.

    No block runs: each is replaced by a recorder that hands the hidden state on, so block parameters (and whatever
    comes after the last block) may be on the meta device. The key-value cache is off.

    Raises: ValueError if the model does not call the blocks in this order, on one hidden state; `embed` sees, too,
    whether it calls them again.
    """
    return _record(model, names, input_ids, None).result(model)


def embed(
    model: nn.Module, names: Sequence[str], tokens: Tensor, *, source: Source, device: torch.device, batch_size: int
) -> tuple[list[Tensor], dict[str, list[Arguments]]]:
    """Hidden states entering the first block, one (batch, length, d) tensor a batch, and each block's own arguments.

    Windows have one length and no padding, so masks and positions are nearly always the same for every batch of one
    size: such arguments are kept once. Those that depend on the tokens are kept for their own batch. Hidden states that
    would take more than half of the device's free memory wait on the host.

    Raises: ValueError for tokens that are no windows, or of another vocabulary, for a model that calls blocks again
    after the last one, and as `capture`.
    """
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(
            f"tokens are windows (samples, length), at least one; got shape {tuple(tokens.shape)}. Cut them out of a "
            "stream of tokens, as by prunus.calibration(tokens, samples, length, seed)"
        )
    check_ids(model, tokens)
    hidden: list[Tensor] = []
    arguments: dict[str, list[Arguments]] = {name: [] for name in names}
    by_size: dict[int, dict[str, Arguments]] = {}
    with source.outside(device):
        _check_once(model, names, tokens[:1, :_FEW].to(device))
        for ids in tokens.split(batch_size):
            entering, captured = capture(model, names, ids.to(device))
            home = _home_of(entering, -(-len(tokens) // batch_size)) if not hidden else hidden[0].device
            hidden.append(entering.to(home))
            first = by_size.setdefault(len(ids), captured)
            for name in names:
                arguments[name].append(first[name] if _same(first[name], captured[name]) else captured[name])
    return hidden, arguments


def _check_once(model: nn.Module, names: Sequence[str], ids: Tensor) -> None:
    """Raise ValueError for a model that goes through its blocks again; what else fails after them is not needed."""
    entering, _ = capture(model, names, ids)
    try:
        finish(model, names, ids, entering)
    except _Again:
        raise
    except Exception as error:
        log.debug("what follows the blocks does not run: %s", error)


def longest(config: Any) -> int | None:
    """How many tokens at once a model of this config of transformers was made for; None where it does not say.

    >>> longest(model.config)
    512
    """
    text = config.get_text_config()
    said = (getattr(text, key, None) for key in ("max_position_embeddings", "max_seq_len"))  # MPT has the second one
    return next((int(each) for each in said if each), None)


def check_length(config: Any, length: int) -> None:
    """Raises ValueError for windows that are longer than a model of this config takes.

    >>> check_length(model.config, 512)
    """
    most = longest(config)
    if most is not None and length > most:
        raise ValueError(
            f"windows of {length} tokens, but the model was made for {most} at most: give windows of {most}"
        )


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raises ValueError for windows (..., length) of token ids that are longer than the model takes, and for ids that
    it has no embedding of; on a GPU these end the whole process's CUDA.

    >>> check_ids(model, torch.tensor([0, 4095]))
    """
    if is_pretrained(model):
        check_length(model.config, ids.shape[-1])
    embeddings = None
    with suppress(NotImplementedError):  # of models that find none
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    if size is None or not ids.numel():
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= size:
        raise ValueError(
            f"token {least if least < 0 else most} is not in the model's vocabulary of {size}: tokenize with the "
            "tokenizer that belongs to the model"
        )


@torch.no_grad()
def finish(model: nn.Module, names: Sequence[str], input_ids: Tensor, leaving: Tensor) -> Any:
    """The model's output (with logits) as if its blocks had made `leaving` (b, L, d) of these tokens.

    Only what lies before and after the blocks runs; block parameters may be on meta. Raises: ValueError as `capture`.
    """
    return _record(model, names, input_ids, leaving).output


def _home_of(entering: Tensor, batches: int) -> torch.device:
    """Where so many tensors like this one wait between blocks."""
    if not entering.is_cuda:
        return entering.device
    unused = torch.cuda.memory_reserved(entering.device) - torch.cuda.memory_allocated(entering.device)
    free = torch.cuda.mem_get_info(entering.device)[0] + unused
    if entering.nbytes * batches <= free // 2:
        return entering.device
    log.info(
        "%.1f GB of hidden states wait on the host: %.1f GB are free here", entering.nbytes * batches / 1e9, free / 1e9
    )
    return torch.device("cpu")


def _same(one: Arguments, other: Arguments) -> bool:
    """Whether two calls have equal arguments."""
    if one is other:
        return True
    left, left_spec = tree_flatten(one)
    right, right_spec = tree_flatten(other)
    return (
        left_spec == right_spec
        and not any(isinstance(each, Passed) for each in left)
        and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
            for a, b in zip(left, right, strict=True)
        )
    )


def _record(model: nn.Module, names: Sequence[str], input_ids: Tensor, leaving: Tensor | None) -> _Chain:
    """The chain of one recording forward, which ends at the last block unless that is to return `leaving`."""
    failures: list[tuple[int, Exception]] = []
    for wrap in _WAYS:  # which of them the model expects shows at the second block
        chain = _Chain(type(model).__name__, list(names), wrap, leaving=leaving)
        try:
            with chain.recording(model), suppress(_LastBlock):
                chain.output = model(input_ids, **_without_cache(model))
            chain.result(model)
            return chain
        except Exception as failure:
            failures.append((len(chain.calls), failure))
    called, failure = max(failures, key=lambda each: each[0])  # the way that got further tells what is wrong
    own = isinstance(failure, _NoChain) or not isinstance(failure, (TypeError, ValueError, AttributeError, LookupError))
    if called and not own:
        raise _NoChain(
            f"{type(model).__name__} does not run as a chain of blocks ({failure}): looked for blocks {names[0]} .. "
            f"{names[-1]} that return the hidden state, alone or first of up to three values"
        ) from failure
    raise failure


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """The hidden state (b, L, d) after the block, on the block's device, whether it returns a tensor or a tuple.

    Records gradients if they are enabled. Raises: ValueError if the block returns anything else.
    """
    device = next((parameter.device for parameter in block.parameters()), hidden.device)
    arguments, hidden = arguments.to(device), hidden.to(device)
    output = (
        block(hidden, *arguments.args, **arguments.kwargs)
        if arguments.hidden is None
        else block(*arguments.args, **{arguments.hidden: hidden, **arguments.kwargs})
    )
    if isinstance(output, (tuple, list)) and output:
        for place, value in zip(arguments.returns, output[1:], strict=False):
            if place is not None:
                place.value = value
        output = output[0]
    if not isinstance(output, Tensor) or output.shape != hidden.shape:
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"block {type(block).__name__} returned {found}; a hidden state of shape {tuple(hidden.shape)}, alone or "
            "first in a tuple, was looked for"
        )
    return output


class _LastBlock(Exception):
    """Ends the recording forward: what follows the last block is not needed and may be on meta."""


class _NoChain(ValueError):
    """The model does not call its blocks as a chain."""


class _Again(_NoChain):
    """The model calls a block after the last one."""


_WAYS: tuple[Callable[..., Any], ...] = (  # what blocks return: the hidden state, and what no block has made yet
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, Passed()),
    lambda hidden: (hidden, Passed(), Passed()),
    lambda hidden: (hidden, None),  # attention weights, caches that the model looks into
    lambda hidden: (hidden, None, None),
)


@dataclass(eq=False)
class _Chain:
    """One recording forward: the blocks still expected, and what was captured so far.

    model: its class. leaving: what the last block is to return; without it the forward ends there.
    """

    model: str
    names: list[str]
    wrap: Callable[[Tensor | None], Any]
    hidden: Tensor | None = None
    leaving: Tensor | None = None
    calls: dict[str, Arguments] = field(default_factory=dict)
    left: dict[int, Passed] = field(default_factory=dict)  # by id of a container that was empty
    output: Any = None

    def recording(self, model: nn.Module) -> AbstractContextManager[None]:
        return with_forwards({model.get_submodule(name): self._recorder(name) for name in self.names})

    def _recorder(self, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(self.calls) == len(self.names):
                raise _Again(
                    f"{self.model} runs block '{name}' again after the last one, '{self.names[-1]}'; a chain that runs "
                    "once was looked for: `prunus.prune` prunes such a model, in memory"
                )
            expected = self.names[len(self.calls)]
            if name != expected:
                raise _NoChain(f"the model called block '{name}' where '{expected}' was expected")
            call = self._split(name, args, kwargs)
            last = len(self.calls) + 1 == len(self.names)
            output = self.wrap(self.leaving if last and self.leaving is not None else self.hidden)
            returns = tuple(each for each in output if isinstance(each, Passed)) if isinstance(output, tuple) else ()
            self.calls[name] = replace(call, returns=returns)
            if last and self.leaving is None:
                raise _LastBlock
            return output

        return forward

    def _split(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Separates the hidden state, the first argument, from the others."""
        keyword = None if args else next(iter(kwargs), None)
        first = args[0] if args else kwargs.get(keyword or "")
        if self.hidden is None and isinstance(first, Tensor) and first.is_floating_point():
            self.hidden = first
        if not _is_all_of(first, self.hidden):
            raise _NoChain(
                f"block '{name}' does not receive the output of the block before it as its first argument but "
                f"{_describe(first)}; a chain of blocks that hand on one hidden state was looked for"
            )
        rest = {key: self._placed(value) for key, value in kwargs.items() if key != keyword}
        return Arguments(tuple(self._placed(value) for value in args[1:]), rest, keyword)

    def _placed(self, value: Any) -> Any:
        """An argument with a place for each container in which blocks may leave things for later ones."""

        def placed(container: Any) -> Any:
            return self.left.setdefault(id(container), Passed(container)) if _is_empty(container) else container

        return tree_map_only(MutableMapping, placed, value, is_leaf=_is_empty)

    def result(self, model: nn.Module) -> tuple[Tensor, dict[str, Arguments]]:
        if self.hidden is None or len(self.calls) < len(self.names):
            missing = self.names[len(self.calls)] if self.names else "none given"
            raise _NoChain(f"{type(model).__name__} never called block '{missing}' in its forward")
        taken = {id(each) for each in tree_leaves([(call.args, call.kwargs) for call in self.calls.values()])}
        for name, call in self.calls.items():
            wanted = tuple(each if id(each) in taken else None for each in call.returns)
            self.calls[name] = replace(call, returns=wanted if any(wanted) else ())
        return self.hidden, self.calls


def _is_empty(value: Any) -> bool:
    return isinstance(value, MutableMapping) and not value


def _is_all_of(value: Any, hidden: Tensor | None) -> bool:
    """Whether a value is the hidden state, or a view that leaves nothing of it out."""
    if value is hidden or hidden is None or not isinstance(value, Tensor):
        return value is hidden and hidden is not None
    places = [(each.data_ptr(), each.shape, each.stride(), each.dtype, each.device) for each in (value, hidden)]
    return places[0] == places[1] and not value.is_meta


def _describe(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def _without_cache(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(each.name == "use_cache" or each.kind is each.VAR_KEYWORD for each in parameters)
    return {"use_cache": False} if is_pretrained(model) and takes else {}


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Passed):
        return value.value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(_move(each, device) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_move(each, device) for each in value)
    if isinstance(value, dict):
        return {key: _move(each, device) for key, each in value.items()}
    return value


def _list_sizes(model: nn.Module) -> tuple[dict[str, int], int]:
    """Prunable weights below every nn.ModuleList that holds any, by name, and in the whole model."""
    sizes = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    total = 0
    for view in (candidate.view for candidate in scan(model) if not candidate.dense):
        size = view.shape[0] * view.shape[1]
        total += size
        parts = view.name.split(".")
        for name in (".".join(parts[:depth]) for depth in range(len(parts))):
            if name in sizes:
                sizes[name] += size
    return {name: size for name, size in sizes.items() if size}, total


def _related(classes: set[type]) -> bool:
    """Whether there is one class, or a base class that all share beside nn.Module's own."""
    shared = set.intersection(*(set(each.__mro__) for each in classes))
    return bool(shared - set(nn.Module.__mro__))


def _nested(one: str, other: str) -> bool:
    """Whether one list is the other, inside it or around it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _refusal(model: nn.Module, reason: str, sizes: dict[str, int], total: int) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    found = ", ".join(f"'{name}' ({sizes[name] / total:.0%})" for name in largest) or "no such list"
    return (
        f"cannot find the blocks of {type(model).__name__}: looked for one nn.ModuleList of related blocks that "
        f"holds most of the {total} prunable weights; {reason}. Found: {found}. Pass the part that is a chain of "
        "blocks, or prune the whole model in memory, by prune_in_turn."
    )
