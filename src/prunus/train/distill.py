"""Losses that also hold a network against a teacher, usually itself before it was pruned.

    L = a T^2 KL(softmax(z_T / T) || softmax(z_S / T)) + (1 - a) CE(z_S, labels)          (Hinton et al. 2015)

    dL/dz_S = a T (softmax(z_S / T) - softmax(z_T / T)) + (1 - a) (softmax(z_S) - onehot)

over the full vocabulary; a the weight, T the temperature; mean over predicted tokens, or images. For language models
both networks' logits are formed chunk by chunk, like those of `next_token_loss`. Encoders of texts have embeddings:

    e(x) = mean over attended positions of the last hidden state, or its first, to unit length
                                                                                        (Reimers & Gurevych 2019)
    L = mean over texts of 1 - <e_S(x), e_T(x)>

No labels are needed for these: any texts will do that are like those to come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunus.machine import class_logits
from prunus.masks import own_name, pack, unpack
from prunus.train.next_token import Aim, aimed_loss, row_logits, takes_logits
from prunus.train.train import squared_error

Pooling = Literal["mean", "first"]


@dataclass(frozen=True)
class _Mixed:
    """L of logits z (n, classes), those of the teacher and labels (n,), summed over rows."""

    weight: float
    temperature: float
    smoothing: float = 0.0  # of labels; `gradient` has none

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1 or not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"distillation needs a weight in (0, 1] and a temperature > 0; got weight={self.weight}, "
                f"temperature={self.temperature}"
            )

    def value(self, z: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The summed loss (scalar, float32), with its graph."""
        return self._divergence(z, teacher) + self._entropy(z, labels)

    def gradient(self, z: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same without a graph, and its gradient by z, in the dtype of z."""
        if takes_logits(z, teacher):
            from prunus.kernels import distilled_loss

            losses, dz = distilled_loss(z, teacher, labels, self.weight, self.temperature)
            return losses.sum(), dz
        a, T = self.weight, self.temperature
        student, taught = ((each.float() / T).log_softmax(-1) for each in (z, teacher))
        value = a * T**2 * _kl(taught, student)
        dz = student.exp().sub_(taught.exp_()).mul_(a * T)
        if a < 1:
            own = student if T == 1 else z.float().log_softmax(-1)
            value += (1 - a) * F.nll_loss(own, labels, reduction="sum")
            own.exp_()[torch.arange(len(labels), device=z.device), labels] -= 1
            dz.add_(own, alpha=1 - a)
        return value, dz.to(z.dtype)

    def _divergence(self, z: Tensor, teacher: Tensor) -> Tensor:
        a, T = self.weight, self.temperature
        taught = F.log_softmax(teacher.float() / T, -1)
        return a * T**2 * _kl(taught, F.log_softmax(z.float() / T, -1))

    def _entropy(self, z: Tensor, labels: Tensor) -> Tensor:
        if self.weight == 1:
            return z.new_zeros((), dtype=torch.float32)
        return (1 - self.weight) * F.cross_entropy(z.float(), labels, reduction="sum", label_smoothing=self.smoothing)


def _kl(taught: Tensor, student: Tensor) -> Tensor:
    """The summed divergence of rows of log-probabilities; a class that the teacher hides (-inf) adds nothing."""
    p = taught.exp()
    return (p * torch.where(p == 0, 0.0, taught - student)).sum()


def distilled_next_token(
    teacher: nn.Module, weight: float = 0.5, temperature: float = 1.0
) -> Callable[[nn.Module, Tensor | Sequence[Tensor]], Tensor]:
    """The loss of (model, batch) that holds a language model against a teacher of its vocabulary.

    batch: packed ids, with labels or without, as in `next_token_loss`. teacher: a transformers model, run without
    gradients in its mode and dtype, and under the autocast of `train`. weight: a; 1 is the divergence alone.
    temperature: T. Logits are never whole where there are more than 2^25 of them.

    The loss raises ValueError for a teacher with another number of words.

    >>> loss = distilled_next_token(dense, weight=0.5)
    >>> train(model, batches, optimizer, lr, steps=100, loss=loss)
    """
    mixed = _Mixed(weight, temperature)

    class Taught(Aim):
        """Next tokens, and what the teacher says of them."""

        def __init__(self, batch: Tensor | Sequence[Tensor]) -> None:
            super().__init__(batch)
            self.logits = row_logits(teacher, self)

        def value(self, z: Tensor, inside: slice) -> Tensor:
            return mixed.value(z, self._taught(z, inside), self.targets[inside])

        def gradient(self, z: Tensor, inside: slice) -> tuple[Tensor, Tensor]:
            return mixed.gradient(z, self._taught(z, inside), self.targets[inside])

        def _taught(self, z: Tensor, inside: slice) -> Tensor:
            with torch.no_grad():
                taught = self.logits(inside)
            _check_classes(z, taught)
            return taught

    return lambda model, batch: aimed_loss(model, Taught(batch))


def distilled_regression(teacher: nn.Module, weight: float = 0.5) -> Callable[[nn.Module, tuple[Any, Tensor]], Tensor]:
    """The loss of (model, (inputs, values)): weight (z_S - z_T)^2 + (1 - weight) (z_S - value)^2, the mean.

    Models return logits (batch, 1), or an object that has them; values are (batch,) or (batch, 1). Raises ValueError
    for a weight outside (0, 1]; the loss does for another number of values.

    >>> loss = distilled_regression(dense)
    """
    _Mixed(weight, 1.0)  # which checks it

    def loss(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        z = class_logits(model, batch[0])
        with torch.no_grad():
            taught = class_logits(teacher, batch[0]).float()
        return weight * squared_error(z, taught) + (1 - weight) * squared_error(z, batch[1])

    return loss


def distilled_classification(
    teacher: nn.Module, weight: float = 0.5, temperature: float = 1.0, *, smoothing: float = 0.0
) -> Callable[[nn.Module, tuple[Any, Tensor]], Tensor]:
    """The loss of (model, (inputs, labels)) that holds a classifier against a teacher of its classes.

    teacher, weight, temperature: as in `distilled_next_token`. inputs: a tensor, or the keywords that a tokenizer made.
    Models return logits (batch, classes), or an object that has them. smoothing: of labels, in the cross-entropy.
    The loss raises ValueError for a teacher with other classes.

    >>> loss = distilled_classification(dense)
    >>> loss(pruned, (torch.zeros(2, 4), torch.tensor([0, 1]))).shape
    torch.Size([])
    """
    mixed = _Mixed(weight, temperature, smoothing)

    def loss(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        z = class_logits(model, batch[0])
        with torch.no_grad():
            taught = class_logits(teacher, batch[0])
        _check_classes(z, taught)
        return mixed.value(z, taught, batch[1]) / len(batch[1])

    return loss


def embeddings(model: nn.Module, batch: Mapping[str, Tensor], pooling: Pooling = "mean") -> Tensor:
    """The embeddings (b, d) of a batch of a tokenizer, float32 and of unit length, with their graph.

    model: an encoder of transformers without a head, of width d. batch: its keywords, with an attention_mask
    (b, length) where texts were padded. pooling: over the attended positions, or the first of them alone (CLS).

    >>> batch = tokenizer(["a text", "another, longer one"], padding=True, return_tensors="pt")
    >>> embeddings(model, batch).shape
    torch.Size([2, 384])
    """
    hidden: Tensor = model(**batch).last_hidden_state.float()  # (b, length, d)
    marks = batch.get("attention_mask", hidden.new_ones(hidden.shape[:2])).unsqueeze(-1)
    if pooling == "first":
        marks = marks * (marks.cumsum(1) == 1)
    return F.normalize((hidden * marks).sum(1) / marks.sum(1), dim=-1)


def distilled_embeddings(
    teacher: nn.Module, pooling: Pooling = "mean"
) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The loss of (model, batch) that holds an encoder's embeddings against a teacher's: 1 less their mean cosine.

    teacher: an encoder of the same width, usually the model before it was pruned; it runs without gradients. pooling:
    as in `embeddings`.

    >>> train(model, batches, optimizer, lr, steps=100, loss=distilled_embeddings(dense), masks=masks)
    """

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            taught = embeddings(teacher, batch, pooling)
        return 1 - (embeddings(model, batch, pooling) * taught).sum(-1).mean()

    return loss


@torch.no_grad()
def lighten_(teacher: nn.Module, model: nn.Module) -> nn.Module:
    """The teacher, as a dense model that costs what the model beside it lost: it holds the model's frozen tensors.

    A frozen tensor is held alone where it is the teacher's; where it was pruned, with the values that are missing and a
    bit an entry that says where. The whole weight is formed while the layer that owns it runs. What is
    trained, has another dtype or differs in most entries (weights that a criterion moved) stays a copy of its own. No
    value changes by a bit. Adapted models will do, while they are adapted; they must not be merged while the teacher is
    asked. The teacher ends on the model's device, and is brought there tensor by tensor.

    >>> loss = distilled_next_token(lighten_(dense, model), weight=0.5)
    """
    own = {own_name(name): parameter for name, parameter in model.named_parameters()}
    owners = _owners(teacher)
    for name, parameter in list(teacher.named_parameters()):
        mine = own.get(name)
        if mine is None or mine.requires_grad or (mine.dtype, mine.shape) != (parameter.dtype, parameter.shape):
            continue
        dense = parameter.detach().to(mine.device)  # stays when the parameter changes
        missing = dense != mine
        present = missing.numel() - int(missing.sum())
        if present * dense.element_size() <= missing.numel() / 8:
            continue
        parameter.data = mine.data
        if present < missing.numel():
            filled = _Filled(missing, dense[missing])
            for owner, attribute in owners[id(parameter)]:
                filled.put(owner, attribute)
    return teacher.to(next(model.parameters()).device)


class _Filled(nn.Module):
    """The parametrization of a weight that is held with gaps: what its module sees has them filled.

    Between the beginning and the end of the module's forward it is filled once: experts are read one by one.
    """

    missing: Tensor  # bits of the flat weight
    values: Tensor  # of those entries, in order

    def __init__(self, missing: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("missing", pack(missing.flatten()))
        self.register_buffer("values", values)
        self._open, self._whole = False, None

    def put(self, owner: nn.Module, attribute: str) -> None:
        """Show the owner the whole weight."""
        parametrize.register_parametrization(owner, attribute, self, unsafe=True)
        owner.register_forward_pre_hook(self._begin)
        owner.register_forward_hook(self._end, always_call=True)

    def forward(self, held: Tensor) -> Tensor:
        """The whole weight, in the shape of what is held."""
        if self._whole is not None:
            return self._whole
        missing = unpack(self.missing, held.numel()).view(held.shape)
        whole = held.masked_scatter(missing, self.values)
        self._whole = whole if self._open else None
        return whole

    def _begin(self, *_: Any) -> None:
        self._open = True

    def _end(self, *_: Any) -> None:
        self._open, self._whole = False, None


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Parameter's id -> the modules that hold it, with the attribute: several where it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return found


def _check_classes(z: Tensor, taught: Tensor) -> None:
    if z.shape != taught.shape:
        raise ValueError(
            f"the teacher returns {taught.shape[-1]} logits and the model {z.shape[-1]}: a teacher knows the same "
            "words or classes"
        )
