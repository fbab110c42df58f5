"""How a model runs: its precision and mode, a rank's part of a sharded tensor, random numbers, optional packages.

One word for the precision of matrix products serves training, calibration and evaluation.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Context in which products run in `precision`; with "fp32" every operation keeps its operands' own dtype.

    Raises ValueError for another word.

    >>> with autocast(torch.device("cpu"), "bf16"):
    ...     print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    torch.bfloat16
    """
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision is fp32, bf16 or fp16; got {precision!r}")
    dtype = dtypes[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context without autocast on the device of `x`.

    >>> with torch.autocast("cpu"), no_autocast(torch.ones(1)):
    ...     torch.is_autocast_enabled("cpu")
    False
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def of_training(model: nn.Module, precision: Precision) -> Precision:
    """`precision`, or "fp32" (every operation in its operands' dtype) where all parameters are stored in it already.

    Products are the same. Autocast would take what enters and leaves every norm through float32, a tenth of a step's
    time, and norms reckon in float32 inside anyway. Call it before `adapt`, and not for "full", whose weights turn
    float32.

    >>> of_training(nn.Linear(2, 2).bfloat16(), "bf16")
    'fp32'
    """
    stored = {parameter.dtype for parameter in model.parameters()}
    return "fp32" if precision == "bf16" and stored == {torch.bfloat16} else precision


_changing = threading.Lock()


@contextmanager
def put_back(inside: list[list[T]], now: Callable[[], T], put: Callable[[T], object]) -> Generator[None]:
    """Context in which a thread may change what the whole process has set, such as a level of messages.

    What was set before is back when the last thread leaves, in whatever order they came. now: reads it; put: sets it;
    inside: what each of those that are inside puts back, an empty list at first, one for each thing that is set.

    >>> inside, level = list[list[int]](), [3]
    >>> with put_back(inside, lambda: level[0], lambda before: level.__setitem__(0, before)):
    ...     level[0] = 5
    >>> level
    [3]
    """
    with _changing:
        mine = [now()]
        inside.append(mine)
    try:
        yield
    finally:
        with _changing:
            place = next(place for place, each in enumerate(inside) if each is mine)
            later = inside[place + 1 : place + 2]  # who came next has what is set now, and goes on with it
            del inside[place]
            for each in later:
                each[:] = mine
            if not later:
                put(mine[0])


_products: list[list[str]] = []
_levels: list[list[int]] = []
_bars: list[list[bool]] = []


@contextmanager
def full_products() -> Generator[None]:
    """While active, products of float32 matrices on CUDA are float32 too, not TF32, whatever the process has set.

    In every thread: what was set is back when the last of them leaves.

    >>> with full_products():
    ...     print(torch.backends.cuda.matmul.fp32_precision)
    ieee
    """
    products: Any = torch.backends.cuda.matmul
    with put_back(_products, lambda: products.fp32_precision, partial(setattr, products, "fp32_precision")):
        products.fp32_precision = "ieee"
        yield


def product_dtype(weight: Tensor) -> torch.dtype:
    """In which dtype products with a weight run: autocast's, or the weight's own.

    >>> product_dtype(torch.ones(1))
    torch.float32
    """
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Generator[None]:
    """Context in which every module is in training or in evaluation mode; afterwards each is in its own again.

    >>> with in_mode(nn.Dropout(), training=False):
    ...     pass
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Generator[None]:
    """Context in which each module calls its hook before its forward; afterwards, also by an exception, none does.

    >>> with hooked([(nn.Identity(), print)]):
    ...     pass
    """
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def with_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Generator[None]:
    """Context in which modules run by other forwards, inside of their hooks; afterwards by what they had before.

    That may be a forward that another library put on a module.

    >>> with with_forwards({(module := nn.Identity()): lambda x: 2 * x}):
    ...     module(3)
    6
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank has; an ordinary tensor itself."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # slow to import, and loaded where there is one

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def give_back_memory() -> None:
    """Let go of what torch keeps of a GPU for later, so that others can have it; without a GPU it does nothing.

    >>> give_back_memory()
    """
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def import_extra(module: str, extra: str, needed: str) -> Any:
    """An optional package. Raises ImportError with what `needed` it and how to install it.

    >>> import_extra("math", "images", "pi is needed").pi
    3.141592653589793
    """
    try:
        return import_module(module)
    except ImportError as error:
        broken = error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]
        raise ImportError(f"{needed}: pip install 'prunus[{extra}]'" + (f" ({error})" if broken else "")) from error


def imported(module: str, name: str) -> tuple[type, ...]:
    """The class of this name, for isinstance; none where its module is not imported yet, for then nothing is one.

    Importing transformers takes two seconds, which a model of another kind need not wait for.

    >>> isinstance(nn.Linear(2, 2), imported("transformers.pytorch_utils", "Conv1D"))
    False
    """
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def is_pretrained(model: object) -> TypeGuard[PreTrainedModel]:
    """Whether a model is one of transformers, which is not imported to say no.

    >>> is_pretrained(nn.Linear(2, 2))
    False
    """
    return isinstance(model, imported("transformers.modeling_utils", "PreTrainedModel"))


def called(model: nn.Module, inputs: Any) -> Any:
    """The output of a model on `inputs`, a tensor or a mapping of keywords; tensors are moved to its first parameter.

    >>> called(nn.Linear(2, 3), torch.zeros(1, 2)).shape
    torch.Size([1, 3])
    """
    own = next(model.parameters(), None)
    if isinstance(inputs, Mapping):
        found = cast("Mapping[str, Any]", inputs)
        moved = {
            key: each.to(own.device) for key, each in found.items() if own is not None and isinstance(each, Tensor)
        }
        return model(**{**found, **moved})
    return model(inputs if own is None else inputs.to(own.device))


def class_logits(model: nn.Module, inputs: Any) -> Tensor:
    """The logits (batch, classes) of a tensor, or of a mapping of keywords.

    >>> class_logits(nn.Linear(4, 3), torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """
    out = called(model, inputs)
    return out if isinstance(out, Tensor) else out.logits


def generator_state(device: torch.device) -> Tensor:
    """The state of torch's own generator of a device, by which dropout draws there."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Put torch's own generator of a device to a state."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def seed_of(seed: int, place: int) -> int:
    """The seed of a part of what is drawn: an epoch, a member. That of (seed + 1, place - 1) is another.

    >>> seed_of(0, 3)
    3
    """
    return (seed * 0x9E3779B97F4A7C15 + place) % 2**63


def generator_of(seed: int, place: int) -> torch.Generator:
    """The CPU generator from which a part of a seed is drawn."""
    return torch.Generator().manual_seed(seed_of(seed, place))


def random_state(model: nn.Module | None = None) -> dict[str, Tensor]:
    """The states of the CPU's generator and, where CUDA is in use, of a GPU's: the model's, or else the current one."""
    states = {"cpu": generator_state(torch.device("cpu"))}
    return states | ({"cuda": generator_state(_gpu(model))} if torch.cuda.is_initialized() else {})


def set_random_state(states: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
    """Put the generators back to what `random_state` returned; CUDA's is left out where there is none."""
    set_generator_state(torch.device("cpu"), states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        set_generator_state(_gpu(model), states["cuda"])


def _gpu(model: nn.Module | None) -> torch.device:
    own = None if model is None else next((each.device for each in model.parameters()), None)
    return own if own is not None and own.type == "cuda" else torch.device("cuda")


@contextmanager
def quiet(level: int) -> Generator[None]:
    """Without bars, and without messages of transformers below a level of `logging`, such as its report of a loading.

    >>> with quiet(logging.ERROR):
    ...     model = AutoModel.from_pretrained("folder")
    """
    from transformers.utils import logging

    with put_back(_levels, logging.get_verbosity, logging.set_verbosity), without_bars():
        logging.set_verbosity(level)
        yield


@contextmanager
def without_bars() -> Generator[None]:
    """Without the bars that transformers draws of loading and writing, between ours.

    >>> with without_bars():
    ...     model.save_pretrained("folder")
    """
    from transformers.utils import logging

    def put(shown: bool) -> None:
        logging.enable_progress_bar() if shown else logging.disable_progress_bar()

    with put_back(_bars, logging.is_progress_bar_enabled, put):
        logging.disable_progress_bar()
        yield
