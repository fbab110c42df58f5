"""Accuracy and its companions: hand-worked cases, and what a loop over images and bins gives."""

import math

import pytest
import torch
from torch import nn

from prunus.measure.accuracy import Accuracy, accuracy


def batches(logits, y, size=4):
    return zip(logits.split(size), y.split(size), strict=True)


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def test_four_images_by_hand():
    logits = logits_of([0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8])
    found = accuracy(nn.Identity(), batches(logits, torch.tensor([0, 1, 1, 0])), bins=2)
    assert found.top1 == 0.5
    assert found.top5 is None
    assert found.worst_class == 0.5
    assert found.images == 4
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.3) + math.log(0.6) + math.log(0.2)) / 4)
    # All confidences, .9 .7 .6 .8, lie in (.5, 1]: |.5 - .75|.
    assert found.calibration_error == pytest.approx(0.25)
    assert found.maximum_calibration_error == pytest.approx(0.25)


def test_two_bins_by_hand():
    """Confidences .4 and .35 (one of two right) and .8 (wrong) in bins of width .5."""
    logits = logits_of([0.4, 0.3, 0.3], [0.35, 0.33, 0.32], [0.1, 0.1, 0.8])
    found = accuracy(nn.Identity(), batches(logits, torch.tensor([0, 2, 1])), bins=2)
    assert found.calibration_error == pytest.approx((2 * 0.125 + 0.8) / 3)
    assert found.maximum_calibration_error == pytest.approx(0.8)
    assert found.worst_class == 0


def test_many_images_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits, y = 2 * torch.randn(500, 12, generator=generator), torch.randint(11, (500,), generator=generator)
    found = accuracy(nn.Identity(), batches(logits, y, 64), bins=15)
    rows, among, in_bin, in_class = logits.double().softmax(1).tolist(), 0, {}, {}
    for row, label in zip(rows, y.tolist(), strict=True):
        order = sorted(range(12), key=lambda place: -row[place])
        among += label in order[:5]
        in_bin.setdefault(math.ceil(15 * row[order[0]]), []).append((order[0] == label, row[order[0]]))
        in_class.setdefault(label, []).append(order[0] == label)
    gaps = {place: abs(sum(right - sure for right, sure in each)) / len(each) for place, each in in_bin.items()}
    assert found.top5 == among / 500
    assert found.top1 == sum(map(sum, in_class.values())) / 500
    assert found.worst_class == pytest.approx(min(sum(each) / len(each) for each in in_class.values()))  # 11 is absent
    assert found.calibration_error == pytest.approx(sum(len(in_bin[b]) * gaps[b] for b in gaps) / 500, rel=1e-5)
    assert found.maximum_calibration_error == pytest.approx(max(gaps.values()), rel=1e-5)
    assert found.loss == pytest.approx(-sum(math.log(row[t]) for row, t in zip(rows, y, strict=True)) / 500, rel=1e-5)


@pytest.mark.parametrize(("classes", "top5"), [(2, None), (5, None), (6, 5 / 6)])
def test_top5_needs_six_classes(classes, top5):
    logits = torch.arange(float(classes)).expand(classes, classes)
    assert accuracy(nn.Identity(), [(logits, torch.arange(classes))]).top5 == pytest.approx(top5)


def test_batches_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(30, 7, generator=generator), torch.arange(30) % 7
    whole, parts = (accuracy(nn.Identity(), batches(logits, y, size)) for size in (30, 4))
    assert whole == parts


def test_certain_and_right_is_perfect():
    y = torch.arange(6)
    assert accuracy(nn.Identity(), [(200 * torch.eye(6), y)]) == Accuracy(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 6)


def test_the_model_is_evaluated_as_it_is_and_left_as_it_was():
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity(), nn.Linear(2, 2)).train()
    model[1].eval()
    x, y = torch.randn(8, 2), torch.zeros(8, dtype=torch.int64)
    found = [accuracy(model, [(x, y)]).loss for _ in range(2)]
    assert found[0] == found[1]  # no dropout
    assert [module.training for module in model.modules()] == [True, True, False, True]
    half = accuracy(model, [(x, y)], precision="bf16").loss
    assert half != found[0]
    assert half == pytest.approx(found[0], rel=0.05)


def test_modes_come_back_after_a_failure():
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        accuracy(model, [(torch.zeros(1, 3), torch.zeros(1).long())])
    assert model.training


def test_what_cannot_be_measured_is_refused():
    x, y = torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), torch.tensor([0, 1])
    with pytest.raises(FloatingPointError, match="not finite for 1 of 2 images"):
        accuracy(nn.Identity(), [(x, y)])
    with pytest.raises(ValueError, match="at least one batch"):
        accuracy(nn.Identity(), [])
    with pytest.raises(ValueError, match="at least 1 bin"):
        accuracy(nn.Identity(), [(x, y)], bins=0)
