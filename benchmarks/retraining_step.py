"""Tokens per second of retraining

    python benchmarks/retraining_step.py
    python benchmarks/retraining_step.py --device cpu --scale 0.03    # scales down
    python benchmarks/retraining_step.py --profile     # instead: where the time of a step goes, ours and textbook
    python benchmarks/retraining_step.py --compile     # instead: compiled blocks, against both textbook loops

Eight blocks of OPT-6.7B's shape (random weights, bfloat16, pruned 2:4), 2 x 2,048 tokens a step, AdamW on float32
trainables. Ours is `adapt`, `recomputed` and `train` as `prunus run` calls them: fused AdamW, steps recorded as a CUDA
graph, of which those after the first third are timed. The textbook loop is written out below: activation checkpointing
of all blocks, mixed precision by autocast, logits and their loss in full, the adapter's published expression in place
of every linear layer of a block, masks applied after each step where everything is trained. Each row is a step; the
note has tokens per second.

"All recomputed" (`checkpointing: true`) recomputes every block in backward, as the textbook loop does. "In the
textbook's memory" and "in free memory" (`checkpointing: auto`) recompute only as many blocks as do not fit into the
textbook loop's extra memory, or the GPU's. "Kept weights": `keep_effective: true`; they live from step to step, so the
extra memory of a step does not show them.

Published MaskLoRA frees what it built in the forward pass and raises under checkpointing in torch today; its
expression is timed instead, without that. The floor counts the products alone, nothing recomputed: 2 operations a
weight and token in the forward pass, for the gradient of the input, and, where a weight or a masked update is trained,
for that of the weight.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from claims import Cost, Row, cost, device_name, floor_ms, main, parse, sized
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from prunus.adapt.adapt import adapt
from prunus.adapt.fused import compiled_forward
from prunus.blocks.recompute import kept_blocks, recomputed
from prunus.layers import View, find_layers
from prunus.machine import of_training
from prunus.masks import Masks
from prunus.patterns import NM
from prunus.train.train import train

BLOCKS, STEPS, RANK, ALPHA = 8, 8, 16, 32.0
Room = Literal["none", "textbook", "free"]  # for blocks that are not recomputed


@dataclass(frozen=True)
class Case:
    """A row: what is trained, and how."""

    name: str
    train: tuple[str, ...]
    room: Room = "none"
    keep: bool = False  # effective weights, for a step
    compile: bool = False


CASES = (
    Case("biases and norms, all recomputed", ("biases", "norms")),
    Case("biases and norms, in the textbook's memory", ("biases", "norms"), "textbook"),
    Case("LoRA-Prune, all recomputed", ("lora_prune",)),
    Case("LoRA-Prune, in the textbook's memory", ("lora_prune",), "textbook"),
    Case("MaskLoRA, all recomputed", ("mask_lora",)),
    Case("MaskLoRA, in the textbook's memory", ("mask_lora",), "textbook"),
    Case("MaskLoRA, in free memory, kept weights", ("mask_lora",), "free", keep=True),
    Case("everything, all recomputed", ("full",)),
    Case("everything, in free memory", ("full",), "free"),
)
COMPILED = (
    Case("MaskLoRA, in free memory, compiled", ("mask_lora",), "free", compile=True),
    Case("MaskLoRA, in free memory, kept weights, compiled", ("mask_lora",), "free", keep=True, compile=True),
    Case("everything, in free memory, compiled", ("full",), "free", compile=True),
    Case("biases and norms, in free memory, compiled", ("biases", "norms"), "free", compile=True),
)


@dataclass(frozen=True)
class Setting:
    """The pruned model and the batch that every case starts from."""

    args: argparse.Namespace
    model: OPTForCausalLM
    masks: Masks
    views: list[View]
    ids: Tensor

    @classmethod
    def make(cls, args: argparse.Namespace) -> Setting:
        """The setting of `args`, from its seed."""
        torch.manual_seed(args.seed)
        config = _config(args)
        ids = torch.randint(config.vocab_size, (2, sized(2048, args)), device=args.device)
        with torch.device(args.device):
            model = OPTForCausalLM(config).bfloat16()
        views = find_layers(model)
        return cls(args, model, _prune_(model, views), views, ids)


def measure(args: argparse.Namespace, cases: tuple[Case, ...] = CASES, setting: Setting | None = None) -> Iterator[Row]:
    """Biases and norms, LoRA-Prune, MaskLoRA, everything: ours and the textbook loop."""
    setting = setting or Setting.make(args)
    textbook: dict[str, Cost] = {}
    least: dict[str, Cost] = {}  # ours with everything recomputed
    for name in {case.train[0]: None for case in cases} | dict.fromkeys(["lora_prune"]):
        trained = next((case.train for case in cases if case.train[0] == name), (name,))
        with _textbook(setting, trained) as steps:
            textbook[name] = _each(cost(steps, args, repeats=2))
    for case in cases:
        spare = _spare(case, textbook, least)
        with _ours(setting, case, spare) as steps:
            ours = _recorded(steps, args, case.name)
            kept = kept_blocks(setting.model)
        if case.room == "none":
            least[case.train[0]] = ours
        yield _row(setting, case, ours, textbook, kept)


def profile(args: argparse.Namespace) -> None:
    """Prints the kernels that take most time in the last of three runs, ours and textbook, of every case."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    setting = Setting.make(args)
    cuda = torch.device(args.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"

    def show(name: str, steps: Callable[[], None]) -> None:
        steps()
        with record(activities=activities) as found:
            steps()
        table = found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=90)
        sys.stdout.write(f"\n{name}, {STEPS} steps\n{table}\n")

    for name in dict.fromkeys(case.train for case in CASES):
        with _textbook(setting, name) as steps:
            show(f"textbook loop: {', '.join(name)}", steps)
    for case in CASES:
        if case.room != "textbook":
            with _ours(setting, case, "free" if case.room == "free" else 0) as steps:
                show(f"ours: {case.name}", lambda steps=steps: steps(STEPS, lambda *_: None))


def compiled(args: argparse.Namespace) -> Iterator[Row]:
    """In free memory, with compiled blocks: each case against the textbook loop, and against that loop compiled."""
    setting = Setting.make(args)
    fused: dict[str, Cost] = {}
    for name, trained in (("biases", ("biases", "norms")), ("lora_prune", ("lora_prune",)), ("full", ("full",))):
        with _textbook(setting, trained) as steps, compiled_forward(setting.model):
            _first(steps, f"textbook loop, {name}")
            fused[name] = _each(cost(steps, args, repeats=2))
    for row in measure(args, COMPILED, setting):
        other = fused["lora_prune" if "MaskLoRA" in row.name else "full" if "everything" in row.name else "biases"]
        yield row
        yield replace(
            row, against=f"{row.against}, compiled", reference_ms=other.ms, reference_extra_bytes=other.extra_bytes,
            target=None, note="",
        )  # fmt: skip


def _first(steps: Callable[[], None], name: str) -> None:
    """Runs the steps that compile, and says how long they take."""
    started = time.perf_counter()
    steps()
    sys.stderr.write(f"{name}: {time.perf_counter() - started:.1f} s with compilation\n")


def _spare(case: Case, textbook: dict[str, Cost], least: dict[str, Cost]) -> int | Literal["free"]:
    if case.room != "textbook":
        return "free" if case.room == "free" else 0
    name = case.train[0]
    most, used = textbook[name].extra_bytes, least[name].extra_bytes
    return 1 << 40 if most is None or used is None else max(0, most - used)  # a CPU's is not measured


@contextmanager
def _ours(setting: Setting, case: Case, spare: int | Literal["free"]) -> Iterator[Callable[..., None]]:
    model, cuda = setting.model, torch.device(setting.args.device).type == "cuda"
    precision = "bf16" if "full" in case.train else of_training(model, "bf16")
    adaptation = adapt(model, case.train, masks=setting.masks, views=setting.views, rank=RANK, alpha=ALPHA)
    if case.keep:
        adaptation.keep_effective()
    groups = adaptation.param_groups(1e-6)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, capturable=cuda, fused=cuda or None)
    held = setting.masks if "full" in case.train else None

    def steps(count: int, mark: Callable[[int, float], None]) -> None:
        train(
            model, lambda _: setting.ids, optimizer, lambda _: 1.0, steps=count, masks=held, precision=precision,
            capture="auto" if cuda else False, report_every=max(1, count // 3), on_step=mark,
        )  # fmt: skip

    try:
        with compiled_forward(model) if case.compile else nullcontext(), recomputed(model, spare=spare):
            yield steps
    finally:
        optimizer.state.clear()
        adaptation.merge_()


@contextmanager
def _textbook(setting: Setting, names: tuple[str, ...]) -> Iterator[Callable[[], None]]:
    """The loop that everybody writes."""
    model, ids = setting.model, setting.ids
    with ExitStack() as stack:
        trained = stack.enter_context(_published(model, setting.masks, setting.views, names))
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
        model.train()
        newer = hasattr(model, "activation_checkpointing_enable")
        (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)(
            {"use_reentrant": False}
        )
        stack.callback(model.disable_input_require_grads)  # which enabling switched on
        stack.callback(model.activation_checkpointing_disable if newer else model.gradient_checkpointing_disable)

        def steps() -> None:
            for _ in range(STEPS):
                with torch.autocast(torch.device(setting.args.device).type, dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                if "full" in names:
                    setting.masks.apply_(model)
                optimizer.zero_grad()
            loss.item()

        yield steps


def _recorded(steps: Callable[..., None], args: argparse.Namespace, name: str) -> Cost:
    """A step of ours, of those after the first third, which warm up and are recorded."""
    cuda, marks, begun = torch.device(args.device).type == "cuda", list[tuple[int, float]](), time.perf_counter()
    if cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    steps(3 * STEPS if cuda else STEPS, lambda done, _: marks.append((done, time.perf_counter())))
    (first, started), (last, ended) = marks[0], marks[-1]
    sys.stderr.write(f"{name}: {started - begun:.1f} s for the first {first} steps\n")
    return Cost((ended - started) / (last - first) * 1e3, torch.cuda.max_memory_allocated() - before if cuda else None)


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
def _published(
    model: nn.Module, masks: Masks, views: list[View], names: tuple[str, ...]
) -> Iterator[list[nn.Parameter]]:
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
        trained = small if "full" not in names else [p for p, _ in before.values()]
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


def _row(setting: Setting, case: Case, ours: Cost, textbook: dict[str, Cost], kept: int) -> Row:
    config, tokens, name = setting.model.config, setting.ids.numel(), case.train[0]
    matrices = config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.ffn_dim)
    head = config.hidden_size * config.vocab_size
    products = 3 if name in ("mask_lora", "full") else 2
    operations = 2 * tokens * (products * matrices + (3 if name == "full" else 2) * head)
    reference, against = textbook[name], "textbook loop"
    if name == "mask_lora":
        reference, against = textbook["lora_prune"], "LoRA-Prune's textbook loop"
    note = f"{tokens / ours.ms * 1e3:,.0f} tokens/s, textbook {tokens / reference.ms * 1e3:,.0f}"
    if name == "mask_lora":
        note += f", MaskLoRA's published expression {tokens / textbook[name].ms * 1e3:,.0f}"
    if kept:
        note += f"; {kept} of {config.num_hidden_layers} blocks not recomputed"
    rows, length = setting.ids.shape
    shape = f"{config.num_hidden_layers} blocks of {config.hidden_size}, {rows} x {length} tokens"
    floor = floor_ms(setting.args, operations=operations)
    return Row(
        f"retraining step, {case.name}", shape, against, ours.ms, reference.ms, floor,
        ours.extra_bytes, reference.extra_bytes, {"biases": 1.15, "mask_lora": 1.5, "full": 1.3}.get(name), note,
    )  # fmt: skip


def _config(args: argparse.Namespace) -> OPTConfig:
    hidden = sized(4096, args)
    return OPTConfig(
        hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=BLOCKS,
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
    if "--profile" in sys.argv:
        sys.argv.remove("--profile")
        given = parse(__doc__)
        sys.stdout.write(f"{device_name(given.device)}, torch {torch.__version__}, scale {given.scale:g}\n")
        profile(given)
    elif "--compile" in sys.argv:
        sys.argv.remove("--compile")
        main(__doc__, compiled)
    else:
        main(__doc__, measure)
