"""Laws of compiled retraining: one program for all blocks alike, no broken graph, losses and masks of the plain run."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from types import MethodType

import pytest
import torch
from torch import nn

from prunus.adapt.adapt import adapt
from prunus.adapt.fused import compiled_forward
from prunus.blocks.recompute import kept_blocks, recomputed
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.patterns import NM
from prunus.train.distill import distilled_next_token
from prunus.train.train import train
from tests.conftest import VOCABULARY, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # dynamo looks at that of inputs
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's own, while tracing
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def run(
    subsets: list[str], backend: str | None, *, keep: bool = False, spare: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[float], int]:
    """Losses of three steps and the blocks that were not recomputed, after checks of what was merged."""
    model = tiny_llama().to(dtype)
    views = find_layers(model)
    masks = Masks({v.parameter: NM(2, 4).choose(w := model.get_parameter(v.parameter).detach().float().abs(),
                                                w.numel() // 2) for v in views})  # fmt: skip
    masks.apply_(model)
    adaptation = adapt(model, subsets, masks=masks, views=views, rank=2)
    if keep:
        adaptation.keep_effective()
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-2), weight_decay=0.0)
    with recomputed(model, spare=spare):
        losses = _losses(model, ids, optimizer, backend)
        kept = kept_blocks(model)
    assert not any("forward" in vars(module) for module in model.modules())
    adaptation.merge_()
    masks.check(model)
    return losses, kept


def _losses(model: nn.Module, ids: torch.Tensor, optimizer: torch.optim.Optimizer, backend: str | None) -> list[float]:
    if backend is None:
        return train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=3).losses
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled_forward(model, backend=backend) as blocks:
        assert blocks == 2
        return train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=3).losses


@pytest.mark.parametrize("subsets", [["norms", "mask_lora"], ["norms"], ["scale_lora"], ["lora_prune"]])
def test_a_compiled_run_has_the_losses_of_the_plain_one_and_a_program_or_two(subsets: list[str]) -> None:
    found, expected = run(subsets, "aot_eager"), run(subsets, None)
    assert found == expected
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert (
        counters["stats"]["unique_graphs"] <= 3
    )  # the first block may measure itself, and its input needs no gradient


@pytest.mark.parametrize("spare", [0, 1 << 40])
def test_kept_effective_weights_are_those_of_the_step(spare: int) -> None:
    found = run(["mask_lora"], "aot_eager", keep=True, spare=spare)
    assert found == run(["mask_lora"], None, spare=spare)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_teacher_says_what_it_says_uncompiled() -> None:
    """Everything is trained, so that the teacher holds weights of its own: one more program."""

    def losses(*, compiled: bool) -> list[float]:
        model, teacher = tiny_llama(), tiny_llama().requires_grad_(False)
        ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with ExitStack() as stack:
            for each in (model, teacher) if compiled else ():
                stack.enter_context(compiled_forward(each, backend="aot_eager"))
            loss = distilled_next_token(teacher)
            return train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=3, loss=loss).losses

    expected = losses(compiled=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses(compiled=True) == expected
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="no C compiler")
def test_fused_programs_differ_by_rounding() -> None:
    """Where the input of the first block needs a gradient as well, so that there is one program to compile."""
    subsets = ["norms", "mask_lora", "embeddings"]
    plain = run(subsets, None, dtype=torch.float32)[0]
    here = {"compile_threads": 1, "cpp.vec_isa_ok": False}  # no processes for few programs, nor trials of instructions
    with torch._inductor.config.patch(here):
        assert run(subsets, "inductor", dtype=torch.float32)[0] == pytest.approx(plain, abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_forwards_of_another_library_are_there_again() -> None:
    model = tiny_llama()
    block = model.model.layers[0]
    block.forward = own = MethodType(type(block).forward, block)
    with compiled_forward(model, backend="aot_eager"):
        assert block.forward is not own
    assert vars(block)["forward"] is own
    assert "forward" not in vars(model.model.layers[1])


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no repeated blocks"), compiled_forward(nn.Linear(2, 2)):
        pass
