"""The losses of language models, without ever holding all logits: head and cross-entropy over chunks of tokens.

    hidden = blocks(ids)                                    (batch, length, d), with its graph
    for a chunk h of its rows:   l += CE(tail(h), next ids),   dl/dh and dl/dtheta of the tail, and the logits are freed

The tail is the model's own code after its blocks, run with a stand-in for them: bias, soft-capping, scaling, tied or
adapted heads are whatever that model does. Its gradients are formed in the forward pass, so nothing is recomputed.
In float32 a step of 4,096 tokens and 50,272 words would hold four copies of 824 MB; a chunk holds a sixth of each.

What the rows' logits are held against is an `Aim`: the next tokens here, a teacher besides in `distill`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prunus.blocks import check_length
from prunus.data import IGNORED
from prunus.kernels import uses_kernels
from prunus.machine import is_pretrained, with_forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENTRIES = 1 << 25  # logits formed at once: 128 MiB in float32, and wide enough for full speed of the product
_TILE = 256  # rows: a product on a GPU takes so many at a time, or half of them


def next_token_loss(model: nn.Module, batch: Tensor | Sequence[Tensor]) -> Tensor:
    """The mean negative log-likelihood (scalar, float32) of tokens 1.. of every packed row.

    batch: ids (batch, length), or (ids, labels) of that shape: the ids again, and -100 for tokens that are left out of
    the mean, such as prompts.

    Where a transformers model has more than 2^25 logits, they are formed chunk by chunk; the gradients then reach the
    graph as they were formed in the forward pass (they cannot be differentiated again). Replicated, sharded
    (fully_shard of the blocks and the whole) and checkpointed models run so too; compiled ones, and those whose head
    is sharded by itself, form all logits.

    Raises: ValueError for rows that are longer than a transformers model takes.

    >>> next_token_loss(model, torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([])
    """
    return aimed_loss(model, Aim(batch))


def answered(batch: Any) -> Tensor | None:
    """Over how many tokens (scalar int64, on the batch's device) the loss of windows (ids, labels) is the mean.

    None for what are no such windows, two integer tensors (batch, length).

    >>> answered((torch.tensor([[4, 5, 6]]), torch.tensor([[4, IGNORED, 6]])))
    tensor(1)
    """
    match batch:
        case (Tensor() as ids, Tensor() as labels) if ids.ndim == 2 and ids.shape == labels.shape:
            integers = not (ids.is_floating_point() or labels.is_floating_point())
            return (labels[:, 1:] != IGNORED).sum() if integers else None
        case _:
            return None


class Aim:
    """What the logits of packed rows are held against: the tokens that come next. batch: as in `next_token_loss`."""

    def __init__(self, batch: Tensor | Sequence[Tensor]) -> None:
        self.ids, labels = (batch, None) if isinstance(batch, Tensor) else batch
        targets = (self.ids if labels is None else labels)[:, 1:].flatten()
        self.wanted = None if labels is None else targets != IGNORED
        self.targets = self.only(targets)  # (n,)

    def only(self, rows: Tensor) -> Tensor:
        """Of something for every row but the last of each window, what counts: (n, ...)."""
        return rows if self.wanted is None else rows[self.wanted]

    def value(self, z: Tensor, inside: slice) -> Tensor:
        """The summed loss (scalar, float32) of the rows' logits z: (n, words)."""
        return F.cross_entropy(z.float(), self.targets[inside], reduction="sum")

    def gradient(self, z: Tensor, inside: slice) -> tuple[Tensor, Tensor]:
        """The same of logits without a graph, and its gradient by z."""
        return _cross_entropy(z, self.targets[inside])


def aimed_loss(model: nn.Module, aim: Aim) -> Tensor:
    """The mean loss (scalar, float32) of packed rows by their aim, as `next_token_loss` forms it."""
    inner = inner_model(model)
    if inner is not None:
        check_length(inner.config, aim.ids.shape[1])
    if inner is None or not _is_large(inner, aim.ids):
        return _whole(model, aim)
    trunks = _trunks(inner)
    if not trunks or _is_compiled(model, inner) or _is_sharded_apart(inner, trunks):
        return _whole(model, aim)
    forward: Callable[..., Any] = inner.forward
    # The wrapper's hooks run around it, as they do around the model's own forward.
    with with_forwards({inner: lambda _ids: _chunked(inner, forward, trunks, aim)}):
        return model(aim.ids)


def inner_model(model: nn.Module) -> PreTrainedModel | None:
    """The transformers model inside its wrappers."""
    return next((module for module in model.modules() if is_pretrained(module)), None)


@torch.no_grad()
def row_logits(model: nn.Module, aim: Aim) -> Callable[[slice], Tensor]:
    """The logits (n, words) that a model has for the rows of an aim, some at a time; no more are formed at once."""
    inner = inner_model(model)
    trunks = _trunks(inner) if inner is not None and inner is model and _is_large(inner, aim.ids) else []
    if inner is not None and trunks:
        tail = _Tail(inner, inner.forward, trunks, aim.ids)
        hidden = tail.enter()
        if hidden is not None:
            rows = aim.only(hidden[:, :-1].flatten(0, 1))
            return lambda inside: tail.logits(rows[inside])
    logits = aim.only(_logits(model, aim))
    return lambda inside: logits[inside]


def _whole(model: Callable[..., Any], aim: Aim) -> Tensor:
    """The loss as everyone writes it."""
    return aim.value(aim.only(_logits(model, aim)), slice(None)) / len(aim.targets)


def _logits(model: Callable[..., Any], aim: Aim) -> Tensor:
    """All logits but those of each window's last token, (rows, words)."""
    return model(input_ids=aim.ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def _is_large(model: PreTrainedModel, ids: Tensor) -> bool:
    words = getattr(model.config.get_text_config(), "vocab_size", None)
    return isinstance(words, int) and ids.shape[1] > 1 and ids.numel() * words > _ENTRIES


def _chunked(model: PreTrainedModel, forward: Callable[..., Any], trunks: list[nn.Module], aim: Aim) -> Tensor:
    """The loss, from inside the model's forward."""
    call = _Tail(model, forward, trunks, aim.ids)
    hidden = call.enter()
    if hidden is None:  # what is before the head hands on something unheard of
        return _whole(forward, aim)
    rows = aim.only(hidden[:, :-1].flatten(0, 1))  # (n, d)
    if not torch.is_grad_enabled():
        return call.loss(rows, aim)
    return _Loss.apply(call, rows, aim, *call.trained())  # type: ignore[no-any-return]


class _Tail:
    """What a model does after its blocks, as a function of the hidden rows.

    trunks: the modules around the blocks, outermost first; the one that the forward calls first is stood in for.
    """

    def __init__(
        self, model: PreTrainedModel, forward: Callable[..., Any], trunks: list[nn.Module], ids: Tensor
    ) -> None:
        self.model, self.forward, self.trunks, self.ids = model, forward, trunks, ids
        self.trunk: nn.Module | None = None
        self.output: Any = None

    def enter(self) -> Tensor | None:
        """The hidden states (batch, length, d) that reach the head, from one run of the blocks; None if not found."""
        with with_forwards({trunk: self._recorder(trunk) for trunk in self.trunks}):
            logits = self.forward(input_ids=self.ids, use_cache=False).logits
        hidden = _first(self.output)
        if hidden is None or logits.shape[:-1] != (len(self.ids), 1):
            return None
        return hidden

    def logits(self, rows: Tensor) -> Tensor:
        """(n, d) -> (n, words), in the dtype in which the model returns them."""
        assert self.trunk is not None
        with with_forwards({self.trunk: lambda *_, **__: _replaced(self.output, rows[None])}):
            return self.forward(input_ids=self.ids, use_cache=False).logits[0]

    def trained(self) -> list[Tensor]:
        """The parameters that a row's logits have gradients for."""
        wanted = [each for each in self.model.parameters() if each.requires_grad]
        if not wanted:
            return []
        hidden = _first(self.output)
        assert hidden is not None
        return _reached(self.logits(hidden.detach()[0, :1]), wanted)

    def loss(self, rows: Tensor, aim: Aim) -> Tensor:
        """The mean loss, without gradients."""
        total, step = torch.zeros((), device=rows.device), self._step()
        for start in range(0, len(rows), step):
            inside = slice(start, start + step)
            total += aim.value(self.logits(rows[inside]), inside)
        return total / len(rows)

    def gradients(self, rows: Tensor, aim: Aim, trained: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """The summed loss, and its gradients by the rows and by the trained parameters.

        The sum's, not the mean's: divided by the count they could vanish in float16.
        """
        total = torch.zeros((), device=rows.device)
        by_rows = torch.empty_like(rows)
        wide = [torch.promote_types(each.dtype, torch.float32) for each in trained]
        found = [torch.zeros_like(each, dtype=dtype) for each, dtype in zip(trained, wide, strict=True)]
        step = self._step(trained)
        for start in range(0, len(rows), step):
            inside = slice(start, start + step)
            h = rows[inside].detach().requires_grad_()
            z = self.logits(h)
            value, dz = aim.gradient(z.detach(), inside)
            by_rows[inside], *fresh = torch.autograd.grad(z, (h, *trained), dz, materialize_grads=True)
            total += value
            del z, dz  # before the next ones are formed
            for sum_, part in zip(found, fresh, strict=True):
                sum_.add_(part)
        return total, [by_rows, *found]

    def _step(self, trained: tuple[Tensor, ...] = ()) -> int:
        """Rows formed at once; four times as many where each chunk also forms the gradient of a whole head."""
        entries = _ENTRIES * (4 if any(each.ndim > 1 for each in trained) else 1)
        rows = max(1, entries // int(self.model.config.get_text_config().vocab_size))
        return rows if rows < _TILE else round(rows / _TILE) * _TILE

    def _recorder(self, trunk: nn.Module) -> Callable[..., Any]:
        own = trunk.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.trunk is not None:  # inside the outermost
                return own(*args, **kwargs)
            self.trunk = trunk
            self.output = own(*args, **kwargs)
            hidden = _first(self.output)
            return self.output if hidden is None else _replaced(self.output, hidden[:, :1])

        return forward


class _Loss(torch.autograd.Function):
    """The mean loss of hidden rows; its gradients are formed with it."""

    @staticmethod
    def forward(ctx: Any, call: _Tail, rows: Tensor, aim: Aim, *trained: Tensor) -> Tensor:
        with torch.enable_grad():
            total, gradients = call.gradients(rows, aim, trained)
        ctx.save_for_backward(*gradients)
        ctx.count, ctx.dtypes = len(rows), [each.dtype for each in trained]
        return total / len(rows)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        scale = grads[0] / ctx.count
        rows, *trained = ctx.saved_tensors
        given = (each.mul(scale).to(dtype) for each, dtype in zip(trained, ctx.dtypes, strict=True))
        return None, (rows * scale).to(rows.dtype), None, *given


def takes_logits(*logits: Tensor) -> bool:
    """Whether rows of logits go to a program that forms their loss and its gradient."""
    return all(uses_kernels(z) and z.dtype in (torch.float32, torch.bfloat16, torch.float16) for z in logits)


def _cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss (scalar, float32) of logits z: (n, words) with targets y: (n,), and its gradient by z."""
    if takes_logits(z):
        from prunus.kernels import cross_entropy

        losses, dz = cross_entropy(z, y)
        return losses.sum(), dz
    log_p = F.log_softmax(z.float(), -1)
    value = F.nll_loss(log_p, y, reduction="sum")
    dz = log_p.exp_()
    dz[torch.arange(len(y), device=y.device), y] -= 1
    return value, dz.to(z.dtype)


def _reached(output: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Those that get gradients from `output`: leaves, or weights that a method made of some (`During.weights`)."""
    found: set[Any] = set()
    seen: set[Any] = set()
    ahead: list[Any] = [(output.grad_fn, 0)]
    while ahead:
        node, place = ahead.pop()
        found.add((node, place))
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        ahead += node.next_functions
    return [each for each in wanted if (id(each) if each.is_leaf else (each.grad_fn, each.output_nr)) in found]


def _trunks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules around the blocks, outermost first: at each level the child that holds most modules."""
    found: list[nn.Module] = []
    here: nn.Module = model
    while True:
        children = list(here.children())
        if not children:
            return found
        here = max(children, key=lambda child: sum(1 for _ in child.modules()))
        if isinstance(here, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            return found
        found.append(here)


def _is_compiled(outer: nn.Module, model: PreTrainedModel) -> bool:
    """Whether torch.compile wraps the model as a whole: its program could not be led through other code."""
    around = [each for each in outer.modules() if any(part is model for part in each.children())]
    return any("_orig_mod" in each._modules for each in around)


def _is_sharded_apart(model: PreTrainedModel, trunks: list[nn.Module]) -> bool:
    """Whether a module that every chunk would run is sharded by itself, and so would be gathered for each."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    inside = {id(each) for each in trunks[-1].modules()} - {id(each) for each in trunks} | {id(model)}
    return any(
        isinstance(each, FullyShardedDataParallel) or (isinstance(each, FSDPModule) and id(each) not in inside)
        for each in model.modules()
    )


def _first(output: Any) -> Tensor | None:
    """The hidden states of what a trunk returned: a tensor, a tuple that begins with it, or transformers' output."""
    if isinstance(output, Tensor):
        found = output
    elif dataclasses.is_dataclass(output):
        found = getattr(output, "last_hidden_state", None)
    else:
        found = output[0] if isinstance(output, (tuple, list)) and output else None
    return found if isinstance(found, Tensor) and found.ndim == 3 else None


def _replaced(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, (tuple, list)):
        return type(output)((hidden, *output[1:]))
    return dataclasses.replace(output, last_hidden_state=hidden)
