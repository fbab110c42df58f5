"""Watching what the layers of one block receive, layer by layer and expert by expert.

Modules are watched by forward pre-hooks. Stacked experts have no module of their own: their matrix products are watched
instead, and an operand that is a view of the stacked parameter tells the expert, its other operand is that expert's
input. So are those of a Linear whose owner multiplies by its weight without calling it. Layers that receive the same
tensor object (q, k, v; gate, up) share one `Inputs`, and its sums are made once.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from prunus.layers import CONVOLUTIONS, Inputs, Products, View, apart, matches, scan
from prunus.machine import imported, is_pretrained

log = logging.getLogger(__name__)


@contextmanager
def observe(block: nn.Module, views: Sequence[View], *, gram: bool) -> Generator[dict[str, Inputs]]:
    """While active, every forward of `block` adds what its layers receive to the `Inputs` under each view's name.

    `gram`: keep the whole matrix sum x x^T of each input, not only its diagonal. Views carry the names of the whole
    model or of the block. Until a layer has received anything it has no entry; on leaving, every view has one, and an
    expert that no token reached has `tokens == 0`.

    Masks (b, length) that the block is called with, of integers or bools, say which positions count: attention_mask and
    decoder_attention_mask. They are about inputs of (b, length, in) or (b * length, in) outside vision towers; rows of
    pictures and of experts are no such positions, and all count. A convolution over a masked length that makes it
    shorter (of sound) shortens the mask likewise.

    Raises: ValueError if a view is not in the block, if its inputs cannot be told (grouped convolutions), or if stacked
    experts ran but no product with them was seen.
    """
    located = list(_locate(block, views))
    elsewhere = apart(block)
    ledger = _Ledger(gram, {view.name for view, each in located if view.index is not None or id(each) in elsewhere})
    with ExitStack() as stack:
        stacks = _attach(block, located, ledger, stack)
        start = block.register_forward_pre_hook(
            lambda module, args, kwargs: ledger.start(_marks(module, kwargs)), prepend=True, with_kwargs=True
        )
        stack.callback(start.remove)
        for module in block.modules():
            if isinstance(module, nn.Conv1d):
                stack.callback(module.register_forward_pre_hook(ledger.shorten, prepend=True).remove)
        if stacks:
            stack.enter_context(_eager_experts(block))
        linear = {id(each): view.name for view, each in located if view.index is None and each.ndim == 2}
        stack.enter_context(Products(_recorder(stacks, linear, ledger)))
        yield ledger.inputs
    ledger.finish(located, stacks)


def observable(root: nn.Module, views: Sequence[View], include: Sequence[str] = ()) -> list[View]:
    """The views without those whose inputs cannot be told (convolutions of several groups), which a note names.

    Raises: ValueError for one that a glob of `include` names, other than "*".

    >>> root = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 8, 1))
    >>> [view.name for view in observable(root, find_layers(root))]
    ['1']
    """
    parameters = dict(root.named_parameters())
    owners = {id(each): module for module in root.modules() for each in module.parameters(recurse=False)}
    hidden = {view.name: owners[id(parameters[view.parameter])] for view in views}
    hidden = {name: module for name, module in hidden.items() if _is_hidden(module)}
    for name in hidden:
        if any(matches(name, glob) for glob in include if glob != "*"):
            _patches(name, hidden[name])  # raises
    if hidden:
        names = ", ".join(list(hidden)[:3]) + (f" and {len(hidden) - 3} more" if len(hidden) > 3 else "")
        log.warning("%s stay dense: the inputs of convolutions of several groups cannot be observed", names)
    return [view for view in views if view.name not in hidden]


@dataclass(eq=False)
class _Group:
    """Layers that receive the same tensors; the first of them, the leader, feeds the sums."""

    inputs: Inputs
    leader: str
    latest: weakref.ref[Tensor]
    version: int
    calls: Counter[str] = field(default_factory=Counter)

    def holds(self, x: Tensor) -> bool:
        return self.latest() is x and self.version == _version(x)


class _Ledger:
    """Which layer received what: finds the groups when a layer is first called, and keeps them."""

    def __init__(self, gram: bool, unmasked: set[str]) -> None:
        self.gram, self.unmasked = gram, unmasked
        self.inside: set[int] = set()  # ids of the weights of modules under way, which were seen on the way in
        self.inputs: dict[str, Inputs] = {}
        self.groups: dict[str, _Group] = {}
        self.forwards = 0
        self._latest: dict[int, _Group] = {}  # by id of the tensor that a leader received in this forward
        self._marks: list[Tensor] = []  # (b, length) bool, of several lengths

    def start(self, marks: list[Tensor]) -> None:
        self._marks = marks
        self.forwards += 1
        self._latest.clear()
        self.inside.clear()

    def shorten(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the mask of what a convolution over (b, in, length) makes: where it stands over what counts."""
        assert isinstance(module, nn.Conv1d)
        (stride,), x = module.stride, args[0]
        marks = next((each for each in self._marks if each.shape == (x.shape[0], x.shape[-1])), None)
        if marks is not None and stride > 1:
            reach = module.dilation[0] * (module.kernel_size[0] - 1)
            length = (x.shape[-1] + sum(module._reversed_padding_repeated_twice) - reach - 1) // stride + 1
            self._marks.append(marks[:, ::stride][:, :length])

    def receive(self, name: str, x: Tensor) -> None:
        group = self.groups.get(name)
        if group is None:
            group = self._group(name, x)
        elif group.leader != name and not group.holds(x):
            raise ValueError(
                f"'{name}' shared its input with '{group.leader}' in the first forward and no longer does. "
                f"Observe them apart, by exclude=['{name}'] in one pass."
            )
        group.calls[name] += 1
        if group.leader == name:
            group.inputs.add_(x if name in self.unmasked else self._counted(x))
            group.latest, group.version = weakref.ref(x), _version(x)
            self._latest[id(x)] = group

    def _counted(self, x: Tensor) -> Tensor:
        """The rows of x (b, length, in) or (b * length, in) that the mask of this shape marks; all of any other x."""
        rows = tuple(x.shape[:-1])
        marks = next((each for each in self._marks if rows in (tuple(each.shape), (each.numel(),))), None)
        return x if marks is None else x.reshape(-1, x.shape[-1])[marks.flatten().to(x.device)]

    def _group(self, name: str, x: Tensor) -> _Group:
        group = self._latest.get(id(x))
        if group is None or not group.holds(x) or group.calls[group.leader] > 1:  # sums from before this layer's start
            inputs = Inputs(x.shape[-1], gram=self.gram, device=x.device)
            group = _Group(inputs, name, weakref.ref(x), _version(x))
        self.groups[name] = group
        self.inputs[name] = group.inputs
        return group

    def finish(self, located: Sequence[tuple[View, Tensor]], stacks: Sequence[_Stack]) -> None:
        for stack in stacks:
            if self.forwards and not stack.products:
                raise ValueError(
                    f"experts '{stack.name}' ran {self.forwards} times, but no product with them was seen: looked for "
                    "F.linear, matmul, mm, bmm, addmm or baddbmm with a slice of the stacked parameter. "
                    f"Skip them with exclude=['{stack.name}']."
                )
        for name, group in self.groups.items():
            if group.calls[name] != group.calls[group.leader]:
                raise ValueError(
                    f"'{name}' was called {group.calls[name]} times and '{group.leader}', whose input it shared, "
                    f"{group.calls[group.leader]} times. Observe them apart, by exclude=['{name}'] in one pass."
                )
        for view, parameter in located:
            if view.name not in self.inputs:
                self.inputs[view.name] = Inputs(view.shape[1], gram=self.gram, device=parameter.device)


def _marks(module: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """The masks (b, length) of a call, as bools.

    Raises ValueError where encoder and decoder receive inputs of one shape, of which one is masked.
    """
    masks = [kwargs.get(key) for key in ("attention_mask", "decoder_attention_mask")]
    found = [
        each.bool() for each in masks if isinstance(each, Tensor) and each.ndim == 2 and not each.is_floating_point()
    ]
    if is_pretrained(module) and module.config.is_encoder_decoder and not all(bool(each.all()) for each in found):
        given = [kwargs.get(key) for key in ("input_ids", "decoder_input_ids", "labels")]
        shapes = [each.shape for each in given if isinstance(each, Tensor)]
        if len(shapes) > 1 and shapes[0] in shapes[1:]:
            raise ValueError(
                f"encoder and decoder both receive {tuple(shapes[0])} positions, so what a mask hides cannot be told "
                "apart: pad one of them by one position more"
            )
    return found


@dataclass(eq=False)
class _Stack:
    """A stacked parameter: where its experts lie in memory, and the names of those that are observed."""

    name: str
    parameter: Tensor
    views: dict[int, View] = field(default_factory=dict)
    products: int = 0

    def experts(self, operand: Tensor) -> range | None:
        """The experts that a 2-D or 3-D operand is a view of from their first entry on, or None."""
        if (operand.dtype, operand.device) != (self.parameter.dtype, self.parameter.device):
            return None
        stride = self.parameter.stride(0) * self.parameter.element_size()
        offset = operand.data_ptr() - self.parameter.data_ptr()
        if not 0 <= offset < stride * self.parameter.shape[0]:
            return None
        first, inside = divmod(offset, stride)
        count = operand.shape[0] if operand.ndim == 3 else 1
        if inside or operand.ndim not in (2, 3) or (count > 1 and operand.stride(0) != self.parameter.stride(0)):
            return None  # a later part of an expert (the other half of gate_up): its input was seen with the first
        return range(first, first + count)


def _recorder(
    stacks: Sequence[_Stack], linear: dict[int, str], ledger: _Ledger
) -> Callable[[Tensor, Tensor, int], None]:
    """What `Products` calls: the other operand of every product with an expert is that expert's input.

    linear: the names of layers by id of their weight, for F.linear with it outside of its module's call.
    """

    def record(stack: _Stack, left: Tensor, right: Tensor, contracted: int) -> None:
        weight, x, experts = right, left, stack.experts(right)
        if experts is None and contracted == -2:  # the weight may stand on the left: W @ x^T
            weight, experts, contracted = left, stack.experts(left), -1
            x = right.mT if right.ndim > 1 else right
        if experts is None:
            return
        stack.products += 1
        view = next(iter(stack.views.values()))
        along = stack.parameter.stride(1 if view.transposed else 2)
        if weight.shape[contracted] != view.shape[1] or weight.stride(contracted) != along:
            raise ValueError(
                f"experts '{stack.name}' are declared with is_transposed={view.transposed}, (out, in) = {view.shape}, "
                f"but are multiplied along another axis. Set is_transposed={not view.transposed} on their module."
            )
        for position, expert in enumerate(experts):
            if expert in stack.views:
                ledger.receive(stack.views[expert].name, _expert_rows(x, position, len(experts)))

    def seen(left: Tensor, right: Tensor, contracted: int) -> None:
        if contracted == -1 and id(right) in linear and id(right) not in ledger.inside:
            ledger.receive(linear[id(right)], left)
        for stack in stacks:
            record(stack, left, right, contracted)

    return seen


def _expert_rows(x: Tensor, position: int, count: int) -> Tensor:
    """What one expert receives of x; where one product takes all experts, only its rows that are not zero."""
    if count == 1:
        return x
    rows = x[position] if x.ndim == 3 else x
    return rows[(rows != 0).any(-1)]  # a product over all experts feeds zeros to those not chosen


def _attach(
    block: nn.Module, located: Sequence[tuple[View, Tensor]], ledger: _Ledger, stack: ExitStack
) -> list[_Stack]:
    """Hooks the modules of the views, and returns the stacked parameters among them."""
    stacks: dict[str, _Stack] = {}
    for view, parameter in located:
        if view.index is not None:
            name = view.name.rpartition("[")[0]
            stacks.setdefault(name, _Stack(name, parameter)).views[view.index] = view
            continue
        for module in block.modules():
            if isinstance(module, nn.Embedding):
                continue  # shares the head's weight, but looks rows up instead of multiplying
            if any(each is parameter for each in module.parameters(recurse=False)):
                hook = _hook(view.name, module, parameter, ledger)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                done = module.register_forward_hook(lambda *_, each=parameter: ledger.inside.discard(id(each)))
                stack.callback(done.remove)
    return list(stacks.values())


def _locate(block: nn.Module, views: Sequence[View]) -> Iterator[tuple[View, Tensor]]:
    """Each view with its parameter in the block; the views' names may have the block's name in front."""
    parameters = dict(block.named_parameters())
    own = {candidate.view.name: candidate.view for candidate in scan(block)}
    fronts: set[str] | None = None
    for view in views:
        fit = {view.name.removesuffix(name) for name in own if f".{view.name}".endswith(f".{name}")}
        fronts = fit if fronts is None else fronts & fit
    if fronts is not None and len(fronts) != 1:
        found = "fit its layers in several ways" if fronts else "are not all layers of it"
        raise ValueError(
            f"the names of the views given for block {type(block).__name__}, such as '{views[0].name}', {found}"
        )
    (front,) = fronts or {""}
    for view in views:
        yield view, parameters[own[view.name.removeprefix(front)].parameter]


def _hook(name: str, module: nn.Module, parameter: Tensor, ledger: _Ledger) -> Callable[..., None]:
    patches = _patches(name, module)

    def received(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        ledger.receive(name, x if patches is None else patches(x))
        ledger.inside.add(id(parameter))

    return received


def _is_hidden(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and (module.groups > 1 or isinstance(module, nn.Conv3d))


def _patches(name: str, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How a convolution's input becomes rows (positions, in * kernel); None for other modules."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    if _is_hidden(module):
        raise ValueError(
            f"the inputs of '{name}' ({type(module).__name__}, {module.groups} groups) cannot be observed: only Conv1d "
            f"and Conv2d of one group can. Skip it with exclude=['{name.rpartition('.')[2]}'], or score by magnitude."
        )
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sizes = [(1,) * (2 - len(each)) + each for each in (module.kernel_size, module.dilation, module.stride)]

    def rows(x: Tensor) -> Tensor:
        x = F.pad(x, module._reversed_padding_repeated_twice, mode)  # pads "same" and every mode as forward does
        x = x if isinstance(module, nn.Conv2d) else x.unsqueeze(-2)
        kernel, dilation, stride = sizes
        return F.unfold(x, kernel, dilation=dilation, stride=stride).mT  # (b, positions, in * kernel)

    return rows


@contextmanager
def _eager_experts(block: nn.Module) -> Generator[None]:
    """Experts multiply one by one meanwhile, as the model's own code has it, not in one grouped product."""
    configs: dict[int, Any] = {}
    for module in block.modules():
        config = getattr(module, "config", None)
        if isinstance(config, imported("transformers.configuration_utils", "PreTrainedConfig")):
            configs[id(config)] = config
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
