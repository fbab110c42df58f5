"""Wanda (Sun et al. 2024) and RIA (Zhang et al. 2024): hand-worked matrices and exhaustive search for the best mask."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Unstructured
from prunus.score.criteria import ria, wanda


def layer_of(weight: Tensor, x: Tensor) -> Layer:
    inputs = Inputs(x.shape[1])
    inputs.add_(x)
    return Layer("fc", weight, inputs)


def test_wanda_by_hand():
    # norms (8, 3, 5, 1): large weights on quiet inputs lose
    x = torch.diag(torch.tensor([8.0, 3.0, 5.0, 1.0]))
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    layer = layer_of(weight, x)
    assert wanda(layer).tolist() == [[32.0, 0.0, 5.0, 1.0], [24.0, 6.0, 5.0, 3.0], [24.0, 3.0, 0.0, 2.0]]
    pruned = wanda.solve(layer, Unstructured("row"), 6)[0]
    assert pruned.tolist() == [[4.0, 0.0, 1.0, 0.0], [3.0, -2.0, 0.0, 0.0], [-3.0, 1.0, 0.0, 0.0]]


def test_ria_by_hand():
    # row sums 4, 6; column sums 4, 6; norms 4, 9 -> roots 2, 3
    layer = layer_of(torch.tensor([[-1.0, 3.0], [3.0, -3.0]]), torch.diag(torch.tensor([4.0, 9.0])))
    expected = [[(1 / 4 + 1 / 4) * 2, (3 / 6 + 3 / 4) * 3], [(3 / 4 + 3 / 6) * 2, (3 / 6 + 3 / 6) * 3]]
    torch.testing.assert_close(ria(layer), torch.tensor(expected))


def test_ria_of_empty_rows_and_columns_is_zero():
    layer = layer_of(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.ones(1, 2))
    assert ria(layer).tolist() == [[0.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("seed", range(5))
def test_wanda_masks_minimise_the_sum_of_what_is_lost(seed: int):
    """Among all masks of a row, Wanda's removes the least sum of (w_j ||x_j||)^2: found by trying them all."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(3, 8, generator=generator), torch.randn(7, 8, generator=generator)
    layer = layer_of(weight, x)
    loss = (weight.double() * x.double().norm(dim=0)).square()
    mask = wanda.solve(layer, Unstructured("row"), 3 * 3)[1]
    for row, keep in zip(loss, mask, strict=True):
        best = max(combinations(range(8), 3), key=lambda kept: float(row[list(kept)].sum()))
        assert tuple(keep.nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("nm", [(2, 4), (4, 8), (1, 4)])
def test_nm_masks_minimise_the_sum_of_what_is_lost(nm: tuple[int, int]):
    n, m = nm
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 16, generator=generator), torch.randn(7, 16, generator=generator)
    loss = (weight.double() * x.double().norm(dim=0)).square()
    mask = wanda.solve(layer_of(weight, x), NM(n, m), 3 * 16 * n // m)[1]
    for group, keep in zip(loss.view(-1, m), mask.view(-1, m), strict=True):
        best = max(combinations(range(m), n), key=lambda kept: float(group[list(kept)].sum()))
        assert tuple(keep.nonzero().flatten().tolist()) == best


def test_equal_scores_keep_the_lower_column():
    layer = layer_of(torch.ones(2, 8), torch.ones(3, 8))
    assert wanda.solve(layer, Unstructured("row"), 8)[1].tolist() == [[True] * 4 + [False] * 4] * 2
    assert wanda.solve(layer, NM(2, 4), 8)[1].tolist() == [[True, True, False, False] * 2] * 2
