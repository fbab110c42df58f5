"""SparseGPT's block in one launch against the same block by plain operations, and what surrounds both.

Without a GPU the program runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunus.kernels.switch import kernels
from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Block, Pattern, Unstructured
from prunus.solve import quadratic, sweep
from prunus.solve.sweep import sparsegpt

pytest.importorskip("triton")

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="programs are compiled where there is a GPU")
PATTERNS = [NM(2, 4), NM(1, 2), NM(4, 8), NM(8, 16), Unstructured("row"), Unstructured("layer"), Block(1, 2)]
DEVICES = [pytest.param("cpu", marks=in_interpreter), pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]


def _layer(rows: int, columns: int, device: str, dtype: torch.dtype = torch.float32) -> Layer:
    """Correlated inputs, and weights whose scores keep a distance from each other."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(2 * columns, columns, generator=generator) + torch.randn(2 * columns, 1, generator=generator)
    inputs = Inputs(columns, gram=True, device=device)
    inputs.add_(x.to(device))
    return Layer("fc", torch.randn(rows, columns, generator=generator).to(device, dtype), inputs)


def _kept(pattern: Pattern, rows: int, columns: int) -> int:
    return pattern.counts((rows, columns), None if pattern.sparsity is not None else 0.5)


def _error(layer: Layer, weight: Tensor) -> float:
    """||X (W - W')^T||^2."""
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    change = (layer.weight - weight).double()
    return float((change @ layer.inputs.gram.double() * change).sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(5, 16, 128), (40, 80, 32), (5, 48, 16)])
def test_the_program_does_what_plain_operations_do(
    device: str, pattern: Pattern, rows: int, columns: int, blocksize: int
) -> None:
    layer = _layer(rows, columns, device)
    found: list[tuple[Tensor, Tensor]] = []
    for on in (False, True):
        with kernels(on):
            found.append(sparsegpt(blocksize=blocksize).solve(layer, pattern, _kept(pattern, rows, columns)))
    (plain, plain_mask), (weight, mask) = found
    assert torch.equal(mask, plain_mask)
    torch.testing.assert_close(weight, plain, rtol=1e-4, atol=1e-4)
    assert _error(layer, weight) <= 1.001 * _error(layer, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_odd_columns_and_ties(device: str) -> None:
    """37 columns in blocks of 10, all weights equal: ties go to the lower index in both."""
    layer = _layer(7, 37, device)
    assert layer.inputs is not None
    layer.inputs.gram = torch.eye(37, device=device)
    layer = Layer("fc", torch.ones(7, 37, device=device), layer.inputs)
    for pattern in (Unstructured("row"), Unstructured("layer")):
        with kernels(True):
            weight, mask = sparsegpt(blocksize=10).solve(layer, pattern, 7 * 20)
        with kernels(False):
            plain, plain_mask = sparsegpt(blocksize=10).solve(layer, pattern, 7 * 20)
        assert int(mask.sum()) == 7 * 20
        assert torch.equal(mask, plain_mask)
        torch.testing.assert_close(weight, plain)
    layer = Layer("fc", torch.ones(7, 36, device=device), Inputs(36, gram=True, device=device))
    assert layer.inputs is not None
    layer.inputs.gram, layer.inputs.tokens = torch.eye(36, device=device), 1
    with kernels(True):
        mask = sparsegpt().solve(layer, NM(1, 4), 63)[1]
    assert mask.view(7, 9, 4).int().tolist() == [[[1, 0, 0, 0]] * 9] * 7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_stored_transposed(device: str, dtype: torch.dtype) -> None:
    layer = _layer(12, 24, device, dtype)
    stored = Layer("fc", layer.weight.T.contiguous().T, layer.inputs)
    with kernels(True):
        one, other = (sparsegpt().solve(each, NM(2, 4), 144) for each in (layer, stored))
    assert one[0].dtype == dtype
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert not one[0][~one[1]].any()


def test_what_no_program_is_written_for_takes_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(sweep, "_launch_block_", refuse)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = _layer(6, 24, device)
    with kernels(True):
        assert int(sparsegpt().solve(layer, NM(1, 3), 48)[1].sum()) == 48
        sparsegpt(blocksize=1000).solve(_layer(2, 300, device), NM(2, 4), 300)  # wider than a program holds
        with pytest.raises(AssertionError, match="launched"):
            sparsegpt().solve(layer, NM(2, 4), 72)
    with kernels(False):
        sparsegpt().solve(layer, NM(2, 4), 72)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 100])
def test_the_inverse_of_a_triangular_matrix(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_DIRECT", 3)
    generator = torch.Generator().manual_seed(n)
    L = (torch.randn(n, n, generator=generator, dtype=torch.float64) / n).tril(-1) + torch.eye(n).double() * 2
    inverse = L.clone()
    quadratic.invert_lower_(inverse)
    torch.testing.assert_close(inverse @ L, torch.eye(n, dtype=torch.float64))
    assert not inverse.triu(1).any()


@pytest.mark.parametrize("panel", [1, 3, 100])
def test_panels_of_any_width_give_the_same(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(6, 44, "cpu")
    weight, mask = sparsegpt(blocksize=4).solve(layer, NM(2, 4), 132)
    monkeypatch.setattr(sweep, "_PANEL", panel)
    again, again_mask = sparsegpt(blocksize=4).solve(layer, NM(2, 4), 132)
    assert torch.equal(mask, again_mask)
    torch.testing.assert_close(weight, again, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@on_gpu
def test_a_large_layer_on_the_gpu_ends_where_the_plain_path_ends() -> None:
    layer = _layer(1024, 2048, "cuda")
    for pattern in (NM(2, 4), Unstructured("row")):
        with kernels(True):
            weight, mask = sparsegpt().solve(layer, pattern, 1024 * 1024)
        with kernels(False):
            plain, plain_mask = sparsegpt().solve(layer, pattern, 1024 * 1024)
        assert (mask != plain_mask).float().mean() < 1e-3
        assert abs(_error(layer, weight) / _error(layer, plain) - 1) < 1e-3
