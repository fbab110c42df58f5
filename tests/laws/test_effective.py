"""The masked low-rank effective weight and its gradient: programs against plain operations, and packed masks.

Without a GPU the programs run in Triton's interpreter, whose rounding to bfloat16 cuts off.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunus.adapt import adapters, effective
from prunus.adapt.adapt import adapt
from prunus.adapt.effective import Terms, effective_linear, effective_weight
from prunus.kernels import switch
from prunus.kernels.switch import kernels, uses_kernels
from prunus.layers import find_layers
from prunus.masks import Masks, pack, unpack
from prunus.patterns import NM

pytest.importorskip("triton")

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="programs are compiled where there is a GPU")
DEVICES = [pytest.param("cpu", marks=in_interpreter), pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]
CLOSE = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}  # relative, of the norm


def _gap(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _all(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, g: Tensor, product: bool
) -> tuple[Tensor, ...]:
    """Output, dx, dA, dB."""
    leaves = [each.detach().clone().requires_grad_() for each in (x, A, B)]
    x, A, B = leaves
    y = effective_linear(x, Terms(weight, A, B, None if product else mask, None if product else 2.0))
    return (y.detach(), *torch.autograd.grad(y, leaves, g))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", ["bits", "bool", "none", "transposed", "product"])
@pytest.mark.parametrize(("out", "in_", "rank"), [(70, 37, 3), (33, 130, 20), (300, 64, 16)])
def test_programs_do_what_plain_operations_do(
    device: str, dtype: torch.dtype, stored: str, out: int, in_: int, rank: int
) -> None:
    generator = torch.Generator().manual_seed(out)
    kept = torch.rand(out, in_, generator=generator) > 0.5
    weight = (torch.randn(out, in_, generator=generator) * kept).to(dtype)
    A, B = torch.randn(rank, in_, generator=generator), torch.randn(out, rank, generator=generator)
    x, g = torch.randn(9, in_, generator=generator).to(dtype), torch.randn(9, out, generator=generator).to(dtype)
    mask = {"bits": pack(kept), "bool": kept, "transposed": kept.T.contiguous().T}.get(stored)
    weight = weight.T.contiguous().T if stored == "transposed" else weight
    mask = None if mask is None else mask.to(device)
    moved = [each.to(device) for each in (x, weight, A, B)]
    with kernels(True):
        found = _all(*moved, mask, g.to(device), stored == "product")
    wide = [each.double() for each in (x, weight, A, B)]
    with kernels(False):
        expected = _all(*wide, None if mask is None else mask.cpu(), g.double(), stored == "product")
    for name, one, other in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
        assert one.isfinite().all(), name
        assert _gap(one.cpu(), other) < CLOSE[dtype], name


@pytest.mark.parametrize("device", DEVICES)
def test_float32_weights_of_another_dtype_outside(device: str) -> None:
    """Under autocast a float32 weight is rounded once, to the dtype of the product."""
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(*shape, generator=generator).to(device) for shape in ((40, 24), (2, 24), (40, 2)))
    kept = torch.rand(40, 24, generator=generator) > 0.5
    with kernels(True):
        built = effective_weight(Terms(weight, A, B, pack(kept).to(device), 0.5), torch.bfloat16)
    exact = weight.double() + 0.5 * kept.to(device) * (B.double() @ A.double())
    assert built.dtype == torch.bfloat16
    assert _gap(built, exact) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_several_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 rows, the last of 88, each by one program: sums are those of many, and the same bits every time."""
    from prunus.kernels import effective

    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(600, 40, generator=generator) > 0.5
    weight, A, B = (torch.randn(*shape, generator=generator) for shape in ((600, 40), (4, 40), (600, 4)))
    x, g = torch.randn(8, 40, generator=generator), torch.randn(8, 600, generator=generator)
    tensors = [each.to(device) for each in (x, weight, A, B)]
    with kernels(True):
        whole = _all(*tensors, pack(kept).to(device), g.to(device), False)
        monkeypatch.setattr(effective, "_TILE", 256 * 40)
        monkeypatch.setattr(effective, "_DEPTH", 256)
        monkeypatch.setattr(effective, "_PROGRAMS", 1)
        parts = _all(*tensors, pack(kept).to(device), g.to(device), False)
        again = _all(*tensors, pack(kept).to(device), g.to(device), False)
    for one, other, third in zip(whole, parts, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert torch.equal(other, third)


def test_a_small_matrix_is_reduced_by_many_programs() -> None:
    from prunus.kernels import effective

    rows, across, tile = 4096, 32, effective._REDUCE[0]
    assert effective._depth(rows, across, tile) == effective._DEPTH
    assert effective._depth(2048, 16, tile) == 256
    assert effective._depth(576, 5, tile) == effective._depth(8, 1, tile) == tile


def test_a_stack_a_wide_rank_and_float64_take_plain_operations() -> None:
    weight = torch.ones(8, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    with kernels(True):
        for dtype, most in ((torch.float32, 32), (torch.bfloat16, 64), (torch.float16, 64)):
            assert effective._in_kernels(weight.to(dtype), torch.ones(most, 8))
            assert not effective._in_kernels(weight.to(dtype), torch.ones(most + 1, 8))
        assert not effective._in_kernels(weight.expand(2, 8, 8), torch.ones(2, 4, 8))
        assert not effective._in_kernels(weight.double(), torch.ones(4, 8).double())
    assert not effective._in_kernels(weight.cpu(), torch.ones(4, 8))


@pytest.mark.parametrize("interpreted", [False, True])
def test_programs_never_get_what_they_cannot_read(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a CPU only in the interpreter, even if programs are forced on."""
    monkeypatch.setattr(switch, "_INTERPRETED", interpreted)
    with kernels(True):
        assert uses_kernels(torch.ones(1)) == interpreted
    with kernels(False):
        assert not uses_kernels(torch.ones(1))


def _losses(
    device: str,
    dtype: torch.dtype,
    steps: int,
    *,
    recompute: bool = False,
    keep: bool = False,
    accumulate: int = 1,
    nudge: int = 0,
) -> list[float]:
    """Of MaskLoRA and norms on two pruned layers, fitting random outputs.

    nudge: not 0 moves 16-bit inputs to a neighbouring number, up or down or not, by this seed.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 24)).to(device, dtype)
    views = find_layers(model)
    scores = {view.name: torch.rand(view.shape) for view in views}
    matrices = {name: NM(2, 4).mask(score, score.numel() // 2) for name, score in scores.items()}
    masks = Masks.of(views, matrices, {name: p.shape for name, p in model.named_parameters()})
    masks.apply_(model)
    adaptation = adapt(model, ["mask_lora", "norms"], masks=masks, views=views, rank=4)
    if keep:
        adaptation.keep_effective()
    optimizer = torch.optim.AdamW(adaptation.param_groups(5e-3), weight_decay=0.0, fused=True)  # which hides changes
    x, y = torch.randn(32, 24, device=device, dtype=dtype), torch.randn(32, 24, device=device)
    if nudge:
        moves = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(nudge), dtype=torch.int16)
        x.view(torch.int16).add_(moves.to(device))
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            output = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
            loss = (output.float() - y).square().mean()  # type: ignore[union-attr]
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adaptation.merge_()
    masks.check(model)
    return losses


@pytest.mark.parametrize("device", DEVICES)
def test_losses_with_programs_and_without_agree_to_rounding(device: str) -> None:
    steps = 12 if device == "cpu" else 200
    with kernels(True):
        found = _losses(device, torch.float32, steps)
    with kernels(False):
        expected = _losses(device, torch.float32, steps)
    assert expected[-1] < 0.98 * expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.gpu
@on_gpu
def test_losses_in_bfloat16_part_no_further_than_those_of_neighbouring_inputs() -> None:
    """200 steps in bfloat16 blow up one last bit to some per cent of the loss, with programs or without.

    So programs may move a run no more than twice as far as neighbours of its inputs move the plain one. The interpreter
    has no part in this: its bfloat16 cuts off.
    """
    dtype = torch.bfloat16
    with kernels(True):
        found = torch.tensor(_losses("cuda", dtype, 200))
    with kernels(False):
        expected = torch.tensor(_losses("cuda", dtype, 200))
        neighbours = [torch.tensor(_losses("cuda", dtype, 200, nudge=seed)) for seed in (1, 2, 3, 4)]
    torch.testing.assert_close(found[:10], expected[:10], rtol=1e-2, atol=0)
    apart = [float((other / expected - 1).abs().max()) for other in (found, *neighbours)]
    assert apart[0] < 2 * max(apart[1:]), apart
    assert max(apart[1:]) < 0.5, apart  # else nothing is compared


@pytest.mark.parametrize("device", DEVICES)
def test_checkpointing_changes_nothing(device: str) -> None:
    with kernels(True):
        assert _losses(device, torch.float32, 3, recompute=True) == _losses(device, torch.float32, 3)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_kept_effective_weight_is_built_once_a_step(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, three steps of two micro batches: 2 x 3 builds, and 2 to check the merging; the same losses."""
    build, calls = effective_weight, []
    for module in (adapters, effective):
        monkeypatch.setattr(module, "effective_weight", lambda *a, **k: calls.append(1) or build(*a, **k))
    kept = _losses("cpu", torch.float32, 3, recompute=recompute, keep=True, accumulate=2)
    assert len(calls) == 8
    calls.clear()
    assert _losses("cpu", torch.float32, 3, recompute=recompute, accumulate=2) == kept
    assert len(calls) >= 20


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_packing_loses_nothing(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack(mask)
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack(packed, columns), mask)
    assert torch.equal(pack(mask.T.contiguous().T), packed)


def test_packing_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(11, 13) > 0.5
    whole = pack(mask)
    monkeypatch.setattr("prunus.masks._PACKED", 40)
    assert torch.equal(pack(mask), whole)


COMPILED = """
import re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from prunus.kernels import effective

def build(program, types, tile, **fixed):
    types = {name: kind for name, kind in (item.split(":") for item in types.split())}
    ones = {name: 1 for name in program.arg_names if name.endswith("_column")}
    fixed = {**fixed, **ones, "PRODUCT": False, "RANK": 16, "ROWS": tile[0], "COLUMNS": tile[1]}
    fixed["OPERAND"] = effective._operand(fixed["HALVES"])
    signature = {name: types.get(name, "constexpr" if name in fixed else "i32") for name in program.arg_names}
    plain = {*fixed, "scale"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(program.arg_names) if name not in plain}
    source = ASTSource(fn=program, signature=signature, constexprs=fixed, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile[2], "num_stages": 2})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(done.asm["ptx"])
        file.flush()
        report = subprocess.run([nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"],
                                capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report, (program.__name__, fixed, report)
    return re.findall(r"= \\S*dot\\S* %\\w+, %\\w+, (%\\w+)", done.asm["ttir"])

for dtype, tile, other in (("bf16", effective._BUILD, effective._REDUCE), ("fp32", effective._WIDE, effective._WIDE)):
    types = f"OUT:*{dtype} W:*{dtype} A:*fp32 B:*fp32 M:*u8 scale:fp32"
    for kind in (0, 2):
        first = build(effective._build, types, tile, KIND=kind, HALVES=dtype == "bf16")[0]
        assert first.startswith("%cst"), (dtype, kind, first)
    types = types.replace("OUT:", "G:") + " DA:*fp32 DB:*fp32"
    for first in (True, False):
        deep = effective._DEPTH // other[0]
        build(effective._reduce, types, other, KIND=2, HALVES=dtype == "bf16", STEPS=deep, FIRST=first)
"""


@pytest.mark.slow
def test_the_product_of_the_factors_is_summed_before_the_weight_is_added() -> None:
    """With a mask and without: a compiler that starts the sum with W gives merged weights other bits than forward's."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@on_gpu
def test_memory_of_a_step_is_no_more_than_full_fine_tuning_takes() -> None:
    weight = torch.randn(16384, 8192, device="cuda", dtype=torch.bfloat16)
    kept = pack(torch.rand(16384, 8192, device="cuda") > 0.5)
    A, B = torch.randn(16, 8192, device="cuda"), torch.randn(16384, 16, device="cuda")
    x, g = (torch.randn(1024, n, device="cuda", dtype=torch.bfloat16) for n in (8192, 16384))

    def peak(run: object) -> int:
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()  # type: ignore[operator]
        return torch.cuda.max_memory_allocated() - start

    def full() -> None:
        leaves = [each.detach().requires_grad_() for each in (x, weight)]
        torch.nn.functional.linear(*leaves).backward(g)

    def ours() -> None:
        _all(x, weight, A, B, kept, g, False)

    for run in (ours, full):
        run()  # the first product of a process takes a workspace besides
    assert peak(ours) < 1.1 * peak(full)
