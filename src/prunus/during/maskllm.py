"""MaskLLM: N:M masks that are learnt, a choice among all of a group's for every group (Fang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_allocated, magnitudes
from prunus.during.learned import train_with_
from prunus.layers import View
from prunus.masks import Masks
from prunus.patterns import NM, check_sparsity, parse
from prunus.score import uniform
from prunus.train import During, Plan


class MaskLLM(During):
    """Learnt N:M masks: each group of M weights draws one of its C(M, N) masks S_c, and learns how likely each is.

        y = softmax((scale z + g) / temperature)     z: (groups, C) logits, g: Gumbel noise, new in every step
        forward  w * m,  m = sum_c y_c S_c           loss - keep * sum (w m)^2 / sum w^2
        z at the start = trust * (<S_0, S_c> - N^2 / M)     S_0: the mask of `prior`; its mean over c is taken off

    No weight is trained, neither these nor others: the logits are, at the learning rate of the optimizer's first group,
    without weight decay. Temperature and scale go linearly from their first value to their second, so that draws become
    choices. At the end each group has its likeliest mask, and the weights are as they were.

    sparsity: the pattern's own. prior: masks to begin with; None is those of largest |w|. keep: how much large weights
    are held on to, which keeps gradients of what is trained afterwards large.
    Besides the model there are 4 C / M numbers a weight (6 at 2:4: logits, Adam's moments, noise); soft masks exist for
    one layer at a time. Where that is too much, learn some layers after others: `train(..., views=views[:20])`.
    Source: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models" (NeurIPS 2024).
    Deviations: logits are counted in units of the first scale; `keep` is of the kept share, not of the sum.
    Raises ValueError for a pattern that is not N:M, a sparsity beside its own, temperatures or scales that are not
    positive, keep < 0, and (in `attach`) layers that the pattern does not fit or the masks of the training prune, and a
    prior of other ones.

    >>> learned, optimizer = MaskLLM(0.5), torch.optim.Adam(model.parameters(), lr=0.1)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[learned])
    >>> masks = learned.finish()
    """

    heat: Tensor
    choices: Tensor

    def __init__(
        self,
        sparsity: float,
        *,
        pattern: str = "2:4",
        prior: Masks | None = None,
        trust: float = 3.0,
        temperature: tuple[float, float] = (4.0, 0.05),
        scale: tuple[float, float] = (1.0, 5.0),
        keep: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        found = parse(pattern, "layer")
        if not isinstance(found, NM):
            raise ValueError(f"MaskLLM learns which N of M weights stay; got the pattern {pattern!r}: take 2:4, say")
        if min(*temperature, *scale) <= 0 or keep < 0:
            raise ValueError(
                f"MaskLLM needs temperatures and scales > 0, keep >= 0; got {temperature=}, {scale=}, {keep=}"
            )
        self.pattern, self.sparsity = found, check_sparsity(found, sparsity)
        self.prior, self.trust, self.keep, self.seed = prior, trust, keep, seed
        self.ends = (scale, temperature)

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Make the logits and train them in place of the model."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        for name, mask in self.given.items():
            if not mask.all():
                raise ValueError(
                    f"MaskLLM chooses among all masks of a group, and the masks of the training prune some of '{name}' "
                    "already: leave them out, or give them as prior instead"
                )
        self.views, self.last, pattern = plan.views, max(1, plan.steps - 1), self.pattern
        device = next(iter(self.pruned_parameters.values())).device
        masks = [
            [float(place in kept) for place in range(pattern.m)] for kept in combinations(range(pattern.m), pattern.n)
        ]
        self.register_buffer("choices", torch.tensor(masks, device=device), persistent=False)
        self.register_buffer("heat", torch.ones(2, device=device))
        begun = self._first()
        mean = pattern.n**2 / pattern.m
        starts = (begun[view.name].float().reshape(-1, pattern.m) @ self.choices.T - mean for view in self.views)
        self.logits = nn.ParameterList(self.trust * start for start in starts)
        self.noise = [torch.empty_like(each) for each in self.logits]  # a function of the step: nothing to save
        squares = sum(float(weight.detach().float().square().sum()) for weight in self.pruned_parameters.values())
        # Every backward pass of a step adds it.
        self.pull = self.keep / max(squares, torch.finfo(torch.float32).tiny) / plan.accumulate
        model.requires_grad_(False)  # `train` takes it back
        train_with_(optimizer, self.logits, lr=None, weight_decay=0.0)

    def before_step(self, step: int) -> None:
        """Set scale and temperature, and draw."""
        for place, (first, last) in enumerate(self.ends):
            self.heat[place] = first + (last - first) * step / self.last
        generator = torch.Generator(self.heat.device).manual_seed(1_000_003 * self.seed + step)
        for noise in self.noise:
            noise.exponential_(generator=generator).clamp_min_(torch.finfo(noise.dtype).tiny).log_().neg_()

    def weights(self) -> dict[str, Tensor]:
        """The weights under what was drawn."""
        parts: dict[str, list[_Part]] = {name: [] for name in self.pruned_parameters}
        for view, logits, noise in zip(self.views, self.logits, self.noise, strict=True):
            parts[view.parameter].append(_Part(view, logits, noise))
        how = (self.choices, self.heat, self.pull)
        return {
            name: _Drawn.apply(self.pruned_parameters[name].detach(), mine, how, *(part.logits for part in mine))  # type: ignore[misc]
            for name, mine in parts.items()
        }

    @torch.no_grad()
    def finish(self) -> Masks:
        """Keep the likeliest mask of each group."""
        pairs = zip(self.views, self.logits, strict=True)
        chosen = {view.name: self.choices[z.argmax(1)].view(view.shape).bool() for view, z in pairs}
        self.set_masks_(Masks.of(self.views, chosen, self._shapes()))
        self.enforce_()
        return self.masks()

    def _first(self) -> dict[str, Tensor]:
        """Layer name -> the mask that the choice begins with."""
        if self.prior is not None:
            for name, shape in self._shapes().items():
                if name not in self.prior or self.prior[name].shape != shape:
                    found = f"has one of {tuple(self.prior[name].shape)}" if name in self.prior else "has none"
                    raise ValueError(f"MaskLLM begins with a mask of '{name}' {tuple(shape)}, and its prior {found}")
            return {view.name: view.matrix(self.prior[view.parameter]).to(self.heat.device) for view in self.views}
        sizes = magnitudes(self.pruned_parameters)
        return keep_allocated(
            {view.name: view.matrix(sizes[view.parameter]) for view in self.views}, self.sparsity, uniform, self.pattern
        )

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.pruned_parameters.items()}


@dataclass(frozen=True)
class _Part:
    """One matrix of a parameter. logits, noise: (groups, C)."""

    view: View
    logits: Tensor
    noise: Tensor

    def shares(self, heat: Tensor) -> Tensor:
        """y, (groups, C)."""
        return ((heat[0] * self.logits.detach() + self.noise) / heat[1]).softmax(1)


class _Drawn(torch.autograd.Function):
    """w * m of one parameter. The backward pass forms y again, and adds the gradient of what `keep` asks for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: list[_Part], how: tuple[Tensor, Tensor, float], *_: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight, ctx.parts, ctx.how = weight, parts, how
        choices, heat, _pull = how
        drawn = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for part in parts:
            mask = (part.shares(heat) @ choices).view(part.view.shape)
            part.view.write_(drawn, part.view.matrix(weight) * mask)
        return drawn

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        choices, heat, pull = ctx.how
        grads: list[Tensor] = []
        for part in ctx.parts:
            y, w = part.shares(heat), part.view.matrix(ctx.weight).to(choices.dtype)
            mask = (y @ choices).view(w.shape)
            of_mask = part.view.matrix(grad).to(w.dtype) * w - 2 * pull * w * w * mask
            of_y = of_mask.reshape(y.shape[0], -1) @ choices.T
            grads.append(heat[0] / heat[1] * y * (of_y - (y * of_y).sum(1, keepdim=True)))
        return None, None, None, *grads
