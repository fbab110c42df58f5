"""Retraining steps of a small language model, recorded as a CUDA graph

    python benchmarks/recorded_step.py
    python benchmarks/recorded_step.py --device cpu --scale 0.03    # scales down; nothing is recorded on a CPU
    python benchmarks/recorded_step.py --compile     # instead: compiled blocks, recorded and not, 16 x 1,024 tokens
    python benchmarks/recorded_step.py --long        # instead: 200 steps of 4 x 1,024 tokens, for their losses

SmolLM2-135M's shape (random weights, bfloat16, pruned 50 %), 4 and 16 x 1,024 tokens a step, AdamW on float32
trainables through `prunus.train`, with `capture="auto"` and, as the reference, without. The note has tokens per second
and the largest relative difference between the two runs' losses; compiled, also the seconds until the first third is
done, in which all is compiled. The floor counts the products alone: 2 operations a weight and token in the forward
pass, for the gradient of the input, and, where a weight or a masked update is trained, for its own; a teacher's are
left out. On an H200, compiled and recorded: norms 391,000 tokens a second, MaskLoRA 318,000, everything 295,000, with a
teacher 235,000 (docs/results/recorded-steps.md).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from claims import Row, floor_ms, main, sized
from transformers import LlamaConfig, LlamaForCausalLM

from prunus.adapt import adapt, compiled_forward
from prunus.data import PackedTokens
from prunus.layers import find_layers
from prunus.machine import of_training
from prunus.prune import prune
from prunus.train import distilled_next_token, linear_warmup_decay, next_token_loss, train

STEPS, LONG = 24, 200  # of a run; the first third is not timed
BATCHES = (4, 16)
SUBSETS = {"norms": ("norms",), "MaskLoRA": ("mask_lora",), "everything": ("full",)}
TAUGHT = "everything, the dense model as teacher"


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Each subset at both batches."""
    for batch in BATCHES:
        for name, subset in SUBSETS.items():
            yield _row(args, name, subset, batch)


def compiled(args: argparse.Namespace) -> Iterator[Row]:
    """Each subset through compiled blocks, and everything with a teacher besides."""
    for name, subset in [*SUBSETS.items(), (TAUGHT, ("full",))]:
        yield _row(args, name, subset, 16, compiled=True)


def long(args: argparse.Namespace) -> Iterator[Row]:
    """Each subset over so many steps that what rounding does to the losses adds up."""
    for name, subset in SUBSETS.items():
        yield _row(args, name, subset, 4, steps=LONG)


def _row(
    args: argparse.Namespace,
    name: str,
    subset: tuple[str, ...],
    batch: int,
    *,
    compiled: bool = False,
    steps: int = STEPS,
) -> Row:
    shape, steps = (batch, sized(1024, args)), steps if args.scale == 1 else steps // 4
    how = {"compiled": compiled, "taught": name == TAUGHT}
    plain, expected, _, cold = _run(args, subset, shape, steps, capture=False, **how)
    ours, losses, weights, warm = _run(args, subset, shape, steps, capture=True, **how)
    name, far = f"{name}, compiled" if compiled else name, float(((losses - expected) / expected).abs().max())
    tokens = batch * shape[1]
    rates = f"{tokens / ours * 1e3:,.0f} tokens a second, {tokens / plain * 1e3:,.0f} without"
    rates += f"; begun after {warm:.0f} s, {cold:.0f} s with nothing in the compiler's cache" if compiled else ""
    return Row(
        name, f"{batch} x {shape[1]} tokens", "steps not recorded", ours, plain,
        floor_ms(args, operations=(4 if subset == ("norms",) else 6) * weights * tokens),
        note=f"{rates}; losses of {len(losses)} steps differ by at most {far:.0e}",
    )  # fmt: skip


def _run(
    args: argparse.Namespace, subset: tuple[str, ...], shape: tuple[int, int], steps: int, **how: bool
) -> tuple[float, torch.Tensor, int, float]:
    """Milliseconds of a step after the first third, all losses, the products' weights, seconds of the first third."""
    marks, begun = list[float](), time.perf_counter()

    def mark(_done: int, _loss: float) -> None:
        marks.append(time.perf_counter())

    model, losses = _trained(args, subset, shape, steps, mark, **how)
    weights = sum(each.numel() for each in model.parameters() if each.ndim == 2)
    return (marks[-1] - marks[0]) / (steps - steps // 3) * 1e3, torch.tensor(losses), weights, marks[0] - begun


def _trained(args, subset, shape, steps, on_step, *, capture, compiled, taught):  # type: ignore[no-untyped-def]
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=sized(49152, args),
        hidden_size=sized(576, args),
        intermediate_size=sized(1536, args),
        num_hidden_layers=30 if args.scale == 1 else 2,
        num_attention_heads=9 if args.scale == 1 else 1,
        num_key_value_heads=3 if args.scale == 1 else 1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config).bfloat16()
    teacher = copy.deepcopy(model).requires_grad_(False) if taught else None
    loss = next_token_loss if teacher is None else distilled_next_token(teacher)
    views = [view for view in find_layers(model) if "layers" in view.name]
    masks = prune(model, sparsity=0.5, views=views)
    generator = torch.Generator().manual_seed(args.seed)
    adaptation = adapt(model, subset, masks=masks, views=views, generator=generator)
    precision = "bf16" if subset == ("full",) else of_training(model, "bf16")
    cuda = torch.device(args.device).type == "cuda"
    packed = PackedTokens(torch.randint(config.vocab_size, (1 << 18,), generator=generator), shape[1])
    with ExitStack() as stack:
        for each in (model, teacher) if compiled else ():
            if each is not None:
                stack.enter_context(compiled_forward(each))
        trace = train(
            model,
            lambda step: packed.at(step, batch=shape[0], seed=0),
            torch.optim.AdamW(adaptation.param_groups(1e-4), weight_decay=0.0, capturable=cuda, fused=cuda or None),
            linear_warmup_decay(steps, 0.1),
            steps=steps,
            loss=loss,
            masks=masks if subset == ("full",) else None,
            precision=precision if cuda else "fp32",
            clip=1.0,
            capture="auto" if capture else False,
            report_every=steps // 3,
            on_step=on_step,
        )
    return model, trace.losses


if __name__ == "__main__":
    others = {"--compile": compiled, "--long": long}
    asked = next((each for each in others if each in sys.argv), None)
    if asked:
        sys.argv.remove(asked)
    main(__doc__, others.get(asked or "", measure))
