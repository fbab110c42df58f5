"""Selection by Triton programs gives the plain functions' bits: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from prunus.during.choose import keep_global
from prunus.kernels.switch import kernels, uses_kernels
from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Block, Pattern, Unstructured, mask_scaled, scaled, selection
from prunus.patterns.selection import keep_largest, keep_largest_of_all, keep_largest_of_row, select_global_share
from prunus.score import criterion
from prunus.score.criteria import magnitude, wanda
from tests.conftest import unwaited

pytest.importorskip("triton")

from prunus.kernels import groups as of_groups
from prunus.kernels import threshold
from prunus.kernels.groups import keep_of_groups
from prunus.kernels.order import key_of
from prunus.kernels.rows import keep_of_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)  # the interpreter's

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles"))
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(params=[ON_CPU, ON_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where programs run; all of the library uses them meanwhile."""
    with kernels(True):
        yield request.param


def made(kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of numbers that are hard to order."""
    g = torch.Generator().manual_seed(rows * 1000 + columns)
    normal = torch.randn(rows, columns, generator=g)
    few = torch.randint(-2, 3, (rows, columns), generator=g)
    values: dict[str, Callable[[], Tensor]] = {
        "random": lambda: normal,
        "tied": lambda: normal.mul(2).round(),
        "constant": lambda: torch.full_like(normal, -3.0),
        "zeros of both signs": lambda: torch.where(few > 0, 0.0, -0.0),
        "half zeros": lambda: normal.relu(),
        "denormal": lambda: few * float(torch.finfo(dtype).smallest_normal) / 8,
        "huge": lambda: normal.clamp(-1, 1) * min(float(torch.finfo(dtype).max), 3e38),
        "infinite": lambda: torch.where(few == 2, INF, torch.where(few == -2, -INF, normal)),
        "far outliers": lambda: torch.where(few == 2, normal * 1e4, normal * 1e-4),
    }
    return values[kind]().to(dtype)


KINDS = ["random", "tied", "constant", "zeros of both signs", "half zeros", "denormal", "huge", "infinite"]


def laid(score: Tensor, layout: str) -> Tensor:
    """The same matrix, stored otherwise."""
    if layout == "transposed":
        return score.T.contiguous().T
    if layout == "slice":  # of a wider matrix, and not on a multiple of 16 bytes
        wide = torch.full((score.shape[0], score.shape[1] + 3), 9.0, dtype=score.dtype, device=score.device)
        wide[:, 1:-2] = score
        return wide[:, 1:-2]
    return score


def first_best(score: Tensor, kept: int) -> Tensor:
    """The oracle: the mask of the `kept` first of each row in a stable sort, float64, on the CPU."""
    order = score.cpu().double().sort(dim=1, descending=True, stable=True).indices
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(1, order[:, :kept], True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "far outliers"])
def test_rows_equal_a_stable_sort(device: str, kind: str, dtype: torch.dtype):
    for rows, columns in [(2, 7), (1, 1), (2, 300)]:
        score = made(kind, rows, columns, dtype)
        for kept in sorted({0, 1, columns // 3, columns}):
            mask, nans = keep_of_rows(score.to(device), kept)
            assert mask.dtype == torch.bool
            assert torch.equal(mask.cpu(), first_best(score, kept))
            assert int(nans) == 0


@pytest.mark.parametrize("layout", ["transposed", "slice"])
def test_rows_follow_any_strides(device: str, layout: str):
    score = made("tied", 3, 33)
    mask, _ = keep_of_rows(laid(score.to(device), layout), 11)
    assert torch.equal(mask.cpu(), first_best(score, 11))


def test_the_first_rows_keep_one_more(device: str):
    score = made("tied", 4, 20)
    mask = keep_largest_of_row(score.to(device), 5, 3).cpu()
    assert torch.equal(mask, torch.cat([first_best(score[:3], 6), first_best(score[3:], 5)]))
    with kernels(False):
        assert torch.equal(keep_largest_of_row(score, 5, 3), mask)
    assert keep_largest_of_row(score[:0].to(device), 5).shape == (0, 20)


def test_rows_that_do_not_fit_take_the_plain_path(device: str):
    score = made("random", 1, 40_000)
    assert torch.equal(keep_largest_of_row(score.to(device), 9).cpu(), first_best(score, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_equal_a_stable_sort(device: str, kind: str, dtype: torch.dtype):
    for n, m, groups in [(2, 4, 5), (1, 4, 1), (3, 4, 70), (1, 2, 9), (2, 3, 5)]:
        score = made(kind, 3, groups * m, dtype)
        mask, nans = keep_of_groups(score.to(device), n, m)
        assert torch.equal(mask.cpu().view(-1, m), first_best(score.reshape(-1, m), n))
        assert int(nans) == 0


@pytest.mark.parametrize(("n", "m"), [(4, 8), (5, 8), (16, 32), (8, 8)])
def test_wide_groups_equal_a_stable_sort(device: str, n: int, m: int, monkeypatch: pytest.MonkeyPatch):
    """In small tiles: the interpreter takes long over a network."""
    if device == "cpu":
        monkeypatch.setattr(of_groups, "_TILE", 64)
    for kind, dtype in zip(KINDS, 3 * DTYPES, strict=False):
        score = made(kind, 3, m, dtype)
        mask, nans = keep_of_groups(score.to(device), n, m)
        assert torch.equal(mask.cpu(), first_best(score, n)), kind
        assert int(nans) == 0


@pytest.mark.parametrize("layout", ["transposed", "slice"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (5, 8)])
def test_groups_follow_any_strides(device: str, layout: str, n: int, m: int):
    score = made("tied", 5, 6 * m)
    mask, _ = keep_of_groups(laid(score.to(device), layout), n, m)
    assert torch.equal(mask.cpu().view(-1, m), first_best(score.reshape(-1, m), n))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs also for few scores, and several blocks and a bracket for them; a histogram that takes no longer."""
    monkeypatch.setattr(selection, "_TOPK", 0)
    monkeypatch.setattr(threshold, "_STRIDE", 3)
    monkeypatch.setattr(threshold, "_BLOCK", 256)
    monkeypatch.setattr(threshold, "_STEP", 128)
    monkeypatch.setattr(threshold, "_STEPS", 2)
    monkeypatch.setattr(threshold, "_BINS", 16)  # two readings tell all keys apart, as with the library's 21
    monkeypatch.setattr(threshold, "_ROOM", 1 << 17)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("listed", [0, 1 << 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_equals_a_stable_sort(
    device: str, kind: str, dtype: torch.dtype, listed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(threshold, "LISTED", listed)
    for rows, columns, layout in [(1, 1, ""), (9, 101, ""), (7, 33, "transposed")]:
        score = made(kind, rows, columns, dtype)
        for kept in sorted({1, rows * columns // 2, rows * columns - 1}):
            mask = keep_largest(laid(score.to(device), layout), kept)
            assert torch.equal(mask.cpu().view(1, -1), first_best(score.view(1, -1), kept))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ends", [(5.0, 6.0), (-6.0, -5.0), (6.0, 5.0), (7.0, 7.0)], ids=str)
def test_a_sample_that_misleads_is_noticed(device: str, ends: tuple[float, float], monkeypatch: pytest.MonkeyPatch):
    score = made("random", 9, 101)
    monkeypatch.setattr(threshold, "_bracket", lambda *_: (key_of(ends[0]), key_of(ends[1])))
    part = score.to(device)
    assert threshold.kth_of([part], threshold.sample_of(part), 400, score.numel()) is None
    assert torch.equal(keep_largest(part, 400).cpu().view(1, -1), first_best(score.view(1, -1), 400))
    assert selection._first_reading({"a": part})[1](400)[0] == score.flatten().sort(descending=True).values[399]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [3, 11, 16])
def test_a_wide_bracket_is_narrowed(device: str, kind: str, bins: int, monkeypatch: pytest.MonkeyPatch):
    """A sample that says nothing, and so few bins that several readings are needed."""
    monkeypatch.setattr(threshold, "_bracket", lambda *_: (key_of(-INF), key_of(INF)))
    monkeypatch.setattr(threshold, "_BINS", bins)
    score = made(kind, 9, 31).to(device)
    ordered = score.flatten().sort(descending=True).values  # in place of a sample: on the device that does the work
    for k in (1, 100, 279):
        found = threshold.kth_of([score], ordered, k, score.numel())
        assert found is not None
        assert found.value == ordered[k - 1]
        assert found.above == (score > ordered[k - 1]).sum()
        assert found.equal == (score == ordered[k - 1]).sum()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("listed", [0, 1 << 16])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "zeros of both signs", "denormal", "infinite"])
def test_a_model_equals_one_direct_selection(device: str, kind: str, listed: int, monkeypatch: pytest.MonkeyPatch):
    """Equals that must go are taken out by their places, or counted where they are many."""
    monkeypatch.setattr(threshold, "LISTED", listed)
    shapes = [(3, 50), (1, 1), (20, 31), (0, 4), (8, 9)]
    scores = {str(i): made(kind, *shape, DTYPES[i % 3]) for i, shape in enumerate(shapes)}
    there = {name: score.to(device) for name, score in scores.items()}
    joined = torch.cat([score.double().flatten() for score in scores.values()])[None]
    for kept in (0, 1, 333, joined.numel()):
        counts = select_global_share(there, 1 - kept / joined.numel()) if kept else dict.fromkeys(there, 0)
        masks = [keep_largest(score, counts[name]).flatten().cpu() for name, score in there.items()]
        assert torch.equal(torch.cat(masks)[None], first_best(joined, kept))
        at_once = keep_largest_of_all(there, kept)
        assert torch.equal(torch.cat([mask.flatten().cpu() for mask in at_once.values()]), torch.cat(masks))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_nan_in_a_model_is_refused_by_name(device: str, sign: float, share: float):
    """Found by the program that counts, where few or all of a sample are NaN; and where nothing is to be kept."""
    scores = {"a": made("random", 9, 31), "b": made("tied", 20, 31)}
    scores["b"].view(-1)[-max(1, round(620 * share)) :] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    there = {name: score.to(device) for name, score in scores.items()}
    words = f"score of 'b' has {max(1, round(620 * share))} NaN of 620"
    for kept in (0, 1, 300, 899):
        with pytest.raises(ValueError, match=words):
            keep_largest_of_all(there, kept)
    with pytest.raises(ValueError, match=words):
        select_global_share(there, 0.5)


@pytest.mark.usefixtures("small")
def test_a_captured_step_is_not_waited_for(device: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("waits")

    monkeypatch.setattr("prunus.kernels.kth_of", refuse)
    scores = {"a": made("tied", 9, 31).to(device), "b": made("random", 5, 7).to(device)}
    with unwaited() if device == "cuda" else nullcontext():
        masks = keep_global(scores, 100)
    joined = torch.cat([score.flatten() for score in scores.values()])[None]
    assert torch.equal(torch.cat([mask.flatten().cpu() for mask in masks.values()])[None], first_best(joined, 100))
    with pytest.raises(AssertionError, match="waits"):
        keep_largest(scores["a"], 100)


def test_model_wide_selection_reads_lazy_scores_again_where_they_are_few(device: str):
    tensors = {"a": torch.tensor([1.0, 2.0, 2.0, 5.0]), "b": torch.tensor([2.0, 2.0, 7.0])}
    reads: list[str] = []

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            reads.append(name)
            return tensors[name].to(device)

        def __iter__(self) -> Iterator[str]:
            return iter(tensors)

        def __len__(self) -> int:
            return len(tensors)

    assert select_global_share(Lazy(), 0.6) == {"a": 2, "b": 1}
    assert reads == ["a", "b"] * 4


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "tied", "denormal", "huge", "constant"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), Unstructured("row"), Unstructured("layer")], ids=repr)
def test_scores_that_are_not_written_down_give_the_same_mask(
    device: str, pattern: Pattern, kind: str, dtype: torch.dtype
):
    weight = made(kind, 3, 40, dtype)
    kept = pattern.counts((3, 40), pattern.sparsity or 0.6) + (1 if pattern.sparsity is None else 0)
    norms = made("random", 1, 40)[0].abs().mul(3).mul(torch.arange(40) % 5)  # zeros among them
    for scale in (None, norms):
        there = None if scale is None else scale.to(device)
        mask = mask_scaled(pattern, weight.to(device), there, kept)
        with kernels(False):
            assert torch.equal(mask.cpu(), pattern.mask(scaled(weight, scale), kept))
        assert int(mask.sum()) == kept


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured("row"), Unstructured("layer"), Block(2, 4)], ids=repr)
def test_solvers_give_the_same_bits(device: str, pattern: Pattern):
    inputs = Inputs(16, device=device)
    inputs.add_(made("random", 20, 16).to(device))
    layer = Layer("fc", made("random", 8, 16, torch.bfloat16).to(device), inputs)
    kept = pattern.counts((8, 16), pattern.sparsity or 0.5)
    for ours in (magnitude, wanda):
        plain = criterion()(ours.score)  # the same score, written out
        weight, mask = ours.solve(layer, pattern, kept)
        with kernels(False):
            expected, chosen = plain.solve(layer, pattern, kept)
        assert torch.equal(mask, chosen)
        assert torch.equal(weight, expected)
        assert weight.dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 2), Unstructured("row"), Unstructured("layer")], ids=repr)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_refused_with_the_same_words(device: str, pattern: Pattern, sign: float):
    weight = made("random", 2, 8).to(device)
    weight[0, 2], weight[1, 1:3] = torch.tensor(float("nan")).copysign(torch.tensor(sign)), INF
    scale = torch.ones(8, device=device)
    scale[1:3] = 0.0  # inf * 0 makes two more
    words = r"the score of 'fc' has 3 NaN of 16 entries"
    with pytest.raises(ValueError, match=words):
        mask_scaled(pattern, weight, scale, 8, name="fc")
    with kernels(False), pytest.raises(ValueError, match=words):
        mask_scaled(pattern, weight, scale, 8, name="fc")
    with pytest.raises(ValueError, match="has 1 NaN of 16"):
        pattern.mask(weight, 8, name="fc")


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured("row")], ids=repr)
def test_counts_are_checked_before_a_program_runs(device: str, pattern: Pattern):
    with pytest.raises(ValueError, match="'fc'"):
        mask_scaled(pattern, torch.ones(2, 8, device=device), None, 17, name="fc")
    with pytest.raises(ValueError, match="shape"):
        mask_scaled(pattern, torch.ones(8, device=device), None, 4, name="fc")


def test_a_cpu_takes_the_plain_path():
    assert not uses_kernels(torch.ones(1))


COMPILED = """
import re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from prunus.kernels import divergence, groups, rows, threshold

SCALARS = "kept extra parts low high shift bins copies start room weight temperature".split()

def build(program, warps, types, **fixed):
    places = {name: (i,) for i, name in enumerate(program.arg_names)}
    types = dict(item.split(":") for item in types.split())
    aligned = {places[name]: [["tt.divisibility", 16]] for name in types if name not in SCALARS}
    signature = {name: types.get(name, "constexpr") for name in program.arg_names}
    source = ASTSource(fn=program, signature=signature, constexprs=fixed, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        report = subprocess.run([nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"],
                                capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report, (program.__name__, fixed, report)
    assert "ld.global.v4" in ptx, (program.__name__, fixed)
    assert "st.global.v4" in ptx or program is threshold._histogram, (program.__name__, fixed)

for quarter, four, warps in ((2048, True, 4), (4096, False, 8), (8192, True, 16)):
    build(rows._keep, warps, "X:*bf16 S:*fp32 M:*u8 NANS:*i32 columns:i32 stride:i32 kept:i32 extra:i32",
          ABSOLUTE=True, SCALED=True, QUARTER=quarter, FOUR=four, SHIFT=0, PART=512 * warps)
build(groups._keep_of_wide, 1, "X:*bf16 S:*fp32 M:*u8 NANS:*i32 groups:i32 across:i32 stride:i32",
      N=16, ABSOLUTE=True, SCALED=True, M_=32, GROUPS=32)
build(groups._keep_of_four, 4, "X:*bf16 S:*fp32 WORDS:*i32 NANS:*i32 columns:i32 stride:i32 parts:i32",
      N=2, ABSOLUTE=True, SCALED=True, BLOCK=2048)
build(threshold._above, 4, "X:*fp32 threshold:fp32 M:*u8 numel:i32", BLOCK=4096)
build(threshold._above_listed, 4, "X:*fp32 threshold:fp32 M:*u8 PLACES:*i64 TAKEN:*i32 start:i64 room:i32 numel:i32",
      BLOCK=threshold._BLOCK)
build(threshold._histogram, 4,
      "X:*fp32 COUNTS:*i64 HISTOGRAM:*i32 low:i32 high:i32 shift:i32 bins:i32 copies:i32 numel:i32",
      BLOCK=threshold._STEP, STEPS=threshold._STEPS)
build(threshold._keep, 4, "X:*fp32 T:*fp32 LEFT:*i64 EQUAL:*i32 M:*u8 numel:i32", BLOCK=4096)
logits = "Z:*bf16 TAUGHT:*bf16 Y:*i64 LOSSES:*fp32 DZ:*bf16 words:i32 z_row:i32 taught_row:i32"
build(divergence._divergence, 8, f"{logits} weight:fp32 temperature:fp32", WARM=True, BLOCKS=12, BLOCK=4096)
"""


@pytest.mark.slow
def test_programs_compile_for_a_hopper_gpu_without_spills_and_with_wide_loads():
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
