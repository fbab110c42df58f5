# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false, reportPrivateImportUsage=false
# pyright: reportOptionalMemberAccess=false
"""AdamW's step of pruned parameters with their masks, in one pass over weights, gradients and moments.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2                         (Loshchilov & Hutter 2019, Algorithm 2)
    w <- w - lr (decay w + m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps));     w, m, v are +0.0 where they are pruned

A weight moves 29 bytes: 16 in, 12 out, and its mask. To zero w, m and v afterwards took 24 more, with wide masks 36.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIZE, _WARPS = 2048, 8  # entries of a program


def takes_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps of an optimizer can be taken here: those of a fused `torch.optim.AdamW` without variations."""
    return type(optimizer) is torch.optim.AdamW and all(map(_is_usual, optimizer.param_groups))


def _is_usual(group: Mapping[str, Any]) -> bool:
    odd = any(group[key] for key in ("amsgrad", "maximize", "differentiable"))
    return group["fused"] and not odd and all(isinstance(beta, float) and beta > 0 for beta in group["betas"])


@torch.no_grad()
def adamw_(optimizer: torch.optim.Optimizer, pruned: Mapping[int, Tensor]) -> set[int]:
    """Takes the step for parameters with masks, and their gradients away, so that the optimizer passes them by.

    pruned: id of a parameter -> bool in its shape, contiguous, True where it is pruned. Returns the ids of those that
    were taken: contiguous float32 ones with a gradient that is not scaled. Their state is the optimizer's.
    """
    taken: set[int] = set()
    if vars(optimizer).get("found_inf") is None:  # which a scaler of gradients sets
        for group in optimizer.param_groups:
            mine = [each for each in group["params"] if id(each) in pruned and _is_plain(each)]
            if mine:
                _group_(optimizer, group, mine, pruned)
            taken |= {id(each) for each in mine}
    return taken


def _is_plain(parameter: Tensor) -> bool:
    g = parameter.grad
    return g is not None and parameter.is_contiguous() and parameter.dtype == g.dtype == torch.float32


def _group_(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], mine: list[Tensor], pruned: Mapping[int, Tensor]
) -> None:
    states = [_state(optimizer, each) for each in mine]
    torch._foreach_add_([state["step"] for state in states], 1)
    lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.full((), group["lr"], device=mine[0].device)
    beta1, beta2 = group["betas"]
    for parameter, state in zip(mine, states, strict=True):
        count = parameter.numel()
        _step[(triton.cdiv(count, _SIZE),)](
            parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], pruned[id(parameter)],
            state["step"], lr, count, BETA1=beta1, BETA2=beta2, LOG1=math.log2(beta1), LOG2=math.log2(beta2),
            EPS=group["eps"], DECAY=group["weight_decay"], SIZE=_SIZE, num_warps=_WARPS,
        )  # fmt: skip
        parameter.grad = None


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of a parameter, as it would make it."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state


@triton.jit
def _step(
    W, G, FIRST, SECOND, PRUNED, STEP, LR, count,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = at < count
    done, lr = tl.load(STEP).to(tl.float64), tl.load(LR)
    by_first = (1 - tl.exp2(done * LOG1)).to(tl.float32)
    by_second = (1 - tl.exp2(done * LOG2)).to(tl.float32)
    kept = tl.load(PRUNED + at, mask=live, other=1) == 0
    w, g = tl.load(W + at, mask=live, other=0.0), tl.load(G + at, mask=live, other=0.0)
    first = BETA1 * tl.load(FIRST + at, mask=live, other=0.0) + (1 - BETA1) * g
    second = BETA2 * tl.load(SECOND + at, mask=live, other=0.0) + (1 - BETA2) * g * g
    w = w - lr * DECAY * w - lr / by_first * first / (tl.sqrt(second) / tl.sqrt(by_second) + EPS)
    tl.store(W + at, tl.where(kept, w, 0.0), mask=live)
    tl.store(FIRST + at, tl.where(kept, first, 0.0), mask=live)
    tl.store(SECOND + at, tl.where(kept, second, 0.0), mask=live)
