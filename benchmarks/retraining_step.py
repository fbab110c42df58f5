"""Tokens per second of retraining

    python benchmarks/retraining_step.py
    python benchmarks/retraining_step.py --device cpu --scale 0.03    # scales down

Eight blocks of OPT-6.7B's shape (random weights, bfloat16, pruned 2:4), 2 x 2,048 tokens a step, activation
checkpointing, AdamW on float32 trainables. Ours is `adapt` and `train` as `prunus compress` calls them. The textbook
loop is written out below: mixed precision by autocast, logits and their loss in full, the adapter's published
expression in place of every linear layer of a block. Each row is a step; the note has tokens per second. "Without
autocast": all in the model's bfloat16 (`precision: fp32`); "kept weights": `keep_effective: true`.

Published MaskLoRA frees what it built in the forward pass and raises under checkpointing in torch today; its
expression is timed instead, without that. The floor counts the products alone: 2 operations a weight and token in the
forward pass, again in its repetition, for the gradient of the input, and, where a weight or a masked update is
trained, for that of the weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from claims import Cost, Row, cost, floor_ms, main, sized
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from prunus.adapt import adapt
from prunus.layers import View, find_layers
from prunus.masks import Masks
from prunus.patterns import NM
from prunus.precision import Precision
from prunus.prepared import recomputed
from prunus.train import train

STEPS, RANK, ALPHA = 5, 16, 32.0
CASES = {  # row -> what is trained, precision, whether effective weights are kept for a step
    "biases and norms": (["biases", "norms"], "bf16", False),
    "biases and norms, without autocast": (["biases", "norms"], "fp32", False),
    "LoRA-Prune": (["lora_prune"], "bf16", False),
    "MaskLoRA": (["mask_lora"], "bf16", False),
    "MaskLoRA, without autocast, kept weights": (["mask_lora"], "fp32", True),
    "everything": (["full"], "bf16", False),
}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Biases and norms, MaskLoRA, LoRA-Prune, everything: ours and the textbook loop."""
    torch.manual_seed(args.seed)
    config = _config(args)
    ids = torch.randint(config.vocab_size, (2, sized(2048, args)), device=args.device)
    with torch.device(args.device):
        model = OPTForCausalLM(config).bfloat16()
    views = find_layers(model)
    masks = _prune_(model, views)
    textbook: dict[str, Cost] = {}
    with recomputed(model):
        for row, (names, precision, keep) in CASES.items():
            if names[0] not in textbook:
                textbook[names[0]] = _textbook(args, model, masks, views, names, ids)
            ours = _ours(args, model, masks, views, names, ids, precision, keep)
            yield _row(args, config, ids, row, names[0], ours, textbook)


def _ours(
    args: argparse.Namespace,
    model: nn.Module,
    masks: Masks,
    views: list[View],
    names: list[str],
    ids: Tensor,
    precision: Precision,
    keep: bool,
) -> Cost:
    adaptation = adapt(model, names, masks=masks, views=views, rank=RANK, alpha=ALPHA)
    if keep:
        adaptation.keep_effective()
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-6), weight_decay=0.0)
    held = masks if "full" in names else None

    def steps() -> None:
        train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=STEPS, masks=held, precision=precision)

    try:
        return _each(cost(steps, args, repeats=3))
    finally:
        optimizer.state.clear()
        adaptation.merge_()


def _textbook(
    args: argparse.Namespace, model: nn.Module, masks: Masks, views: list[View], names: list[str], ids: Tensor
) -> Cost:
    """The loop that everybody writes."""
    with _published(model, masks, views, names) as trained:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
        model.train()

        def steps() -> None:
            for _ in range(STEPS):
                with torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                if names == ["full"]:
                    masks.apply_(model)
                optimizer.zero_grad()
            loss.item()

        return _each(cost(steps, args, repeats=3))


def _each(whole: Cost) -> Cost:
    return Cost(whole.ms / STEPS, whole.extra_bytes)


class _Published(nn.Module):
    """A linear layer as the papers write it: LoRA's path beside it, or the masked update added to the weight."""

    def __init__(self, layer: nn.Linear, mask: Tensor, *, masked: bool) -> None:
        super().__init__()
        self.layer, self.mask, self.masked = layer, mask, masked
        self.A = nn.Parameter(torch.randn(RANK, layer.in_features, device=mask.device) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, RANK, device=mask.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.masked:
            update = ALPHA / RANK * self.mask * (self.B @ self.A)
            return F.linear(x, (self.layer.weight + update).to(x.dtype), self.layer.bias)
        return self.layer(x) + ALPHA / RANK * F.linear(F.linear(x, self.A), self.B)


@contextmanager
def _published(model: nn.Module, masks: Masks, views: list[View], names: list[str]) -> Iterator[list[nn.Parameter]]:
    """The trainables, float32, of the model with what the papers put into it; afterwards it is as before."""
    model.requires_grad_(False)
    before = {name: (p, p.data) for name, p in model.named_parameters()}
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    if names[0] in ("mask_lora", "lora_prune"):
        for view in views:
            parent, _, child = view.name.rpartition(".")
            layer = model.get_submodule(view.name)
            assert isinstance(layer, nn.Linear)
            new = _Published(layer, masks[view.parameter], masked=names[0] == "mask_lora")
            replaced.append((model.get_submodule(parent), child, layer))
            setattr(model.get_submodule(parent), child, new)
        trained = [p for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    else:
        small = [p for p, _ in before.values() if p.ndim == 1]  # biases and norms
        trained = small if names != ["full"] else [p for p, _ in before.values()]
        for parameter in trained:
            parameter.data = parameter.data.float()
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield trained
    finally:
        for parent, child, layer in replaced:
            setattr(parent, child, layer)
        for parameter, data in before.values():
            parameter.data, parameter.grad = data, None


def _row(
    args: argparse.Namespace,
    config: OPTConfig,
    ids: Tensor,
    row: str,
    name: str,
    ours: Cost,
    textbook: dict[str, Cost],
) -> Row:
    tokens = ids.numel()
    matrices = config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.ffn_dim)
    head = config.hidden_size * config.vocab_size
    products = 4 if name in ("mask_lora", "full") else 3
    floor = floor_ms(args, operations=2 * tokens * (products * matrices + (3 if name == "full" else 2) * head))
    reference, against = textbook[name], "textbook loop"
    if name == "mask_lora":
        reference, against = textbook["lora_prune"], "LoRA-Prune's textbook loop"
    note = f"{tokens / ours.ms * 1e3:,.0f} tokens/s, textbook {tokens / reference.ms * 1e3:,.0f}"
    if name == "mask_lora":
        note += f", MaskLoRA's published expression {tokens / textbook[name].ms * 1e3:,.0f}"
    target = {"biases": 1.15, "mask_lora": 1.5}.get(name)
    shape = f"{config.num_hidden_layers} blocks of {config.hidden_size}, {ids.shape[0]} x {ids.shape[1]} tokens"
    return Row(
        f"retraining step, {row}", shape, against, ours.ms, reference.ms, floor,
        ours.extra_bytes, reference.extra_bytes, target, note,
    )  # fmt: skip


def _config(args: argparse.Namespace) -> OPTConfig:
    hidden = sized(4096, args)
    return OPTConfig(
        hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=8,
        num_attention_heads=hidden // min(128, hidden), vocab_size=sized(50272, args, 32), dropout=0.0,
        max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip


def _prune_(model: nn.Module, views: list[View]) -> Masks:
    parameters = dict(model.named_parameters())
    matrices: dict[str, Tensor] = {}
    for view in views:
        score = view.matrix(parameters[view.parameter]).detach().float().abs()
        matrices[view.name] = NM(2, 4).choose(score, score.numel() // 2)
    masks = Masks.of(views, matrices, {name: p.shape for name, p in parameters.items()})
    masks.apply_(model)
    return masks


if __name__ == "__main__":
    main(__doc__, measure)
