"""Retraining schedules against independent computations of their papers' formulas, at every step."""

import math

import pytest

from prunus.train.lr import Multiplier, Original, allr, clr, cosine, exponential, ft, linear, llr, lrw, multistep, slr

ORIGINALS = {
    "constant": [0.1] * 30,
    "stepped": [0.1] * 91 + [0.01] * 45 + [0.001] * 46,
    "linear": [0.2 * (1 - t / 50) for t in range(50)],
    "warmed": [0.04, 0.08, *(0.08 * (1 - t / 23) for t in range(23))],
}
WARMUPS = {"warmed": 1}  # 0.08 comes twice, as in ours: the second is no longer warm-up


def original(name: str) -> Original:
    return Original.of(ORIGINALS[name], WARMUPS.get(name, 0))


def values(multiplier: Multiplier, steps: int, peak: float) -> list[float]:
    return [peak * multiplier(step) for step in range(steps)]


def risen(rise: int, top: float) -> list[float]:
    """The published warm-up a * (1 - cos(pi * t / Tw)) / 2, its samples moved from 0..Tw-1 to 1..Tw."""
    return [top * (1 - math.cos(math.pi * t / rise)) / 2 for t in range(1, rise + 1)]


each = pytest.mark.parametrize("name", ORIGINALS)
lengths = pytest.mark.parametrize(("steps", "share"), [(1, 0.1), (7, 0.1), (40, 0.1), (40, 0.0), (333, 0.25)])


@each
@lengths
def test_ft_is_the_least_value(name: str, steps: int, share: float):
    lrs = ORIGINALS[name]
    assert values(ft(original(name), steps), steps, max(lrs)) == pytest.approx(
        [min(lrs[WARMUPS.get(name, 0) :])] * steps
    )


@each
@lengths
def test_lrw_repeats_the_last_values(name: str, steps: int, share: float):
    lrs = ORIGINALS[name]
    expected = ([lrs[0]] * steps + lrs)[-steps:]
    assert values(lrw(original(name), steps), steps, max(lrs)) == pytest.approx(expected)


@each
@lengths
def test_slr_compresses_the_whole_schedule(name: str, steps: int, share: float):
    lrs, rise = ORIGINALS[name], int(share * steps)
    whole = [max(lrs) if t < WARMUPS.get(name, 0) else value for t, value in enumerate(lrs)]
    rest = [whole[math.floor(u * len(lrs) / (steps - rise))] for u in range(steps - rise)]
    assert values(slr(original(name), steps, share), steps, max(lrs)) == pytest.approx(risen(rise, max(lrs)) + rest)


@each
@lengths
def test_clr_is_a_half_cosine_to_the_least_value(name: str, steps: int, share: float):
    lrs, rise = ORIGINALS[name], int(share * steps)
    peak, least = max(lrs), min(lrs[WARMUPS.get(name, 0) :])
    fall = [least + (peak - least) * math.cos(math.pi * u / (steps - rise) / 2) ** 2 for u in range(steps - rise)]
    assert values(clr(original(name), steps, share), steps, peak) == pytest.approx(risen(rise, peak) + fall)


@each
@lengths
@pytest.mark.parametrize(
    ("distance", "part", "start"),
    [(0.3, 0.1, 0.3), (0.1, 0.3, 0.3), (1.2, 0.0, 1.0), (0.0, 7.0, 1.0), (0.0, 0.05, 0.05)],
)
def test_allr_starts_at_its_larger_signal(
    name: str, steps: int, share: float, distance: float, part: float, start: float
):
    peak, rise = max(ORIGINALS[name]), int(share * steps)
    top = start * peak
    expected = risen(rise, top) + [top - top * u / (steps - rise) for u in range(steps - rise)]
    ours = allr(original(name), steps, distance=distance, share=part, warmup=share)
    assert values(ours, steps, peak) == pytest.approx(expected)


def test_llr_by_hand():
    """T = 40, W = 4, M = 0.1; the published warm-up is 0, .0146447, .05, .0853553: ours is one sample further on."""
    found = values(llr(Original.of([0.1]), 40), 40, 0.1)
    assert found[:7] == pytest.approx([0.0146447, 0.05, 0.0853553, 0.1, 0.1, 0.0972222, 0.0944444], rel=1e-5)
    assert found[-1] == pytest.approx(0.1 / 36)


def test_fine_tuning_and_rewinding_coincide_up_to_46_epochs():
    """Renda et al. 2020, ResNet-56: 182 epochs, the rate divided by 10 at 91 and 136: so 46 have the least."""
    dense = multistep(182, [91, 136])
    renda = Original.of(0.1 * dense(epoch) for epoch in range(182))
    for epochs, equal in ((10, True), (46, True), (47, False), (90, False)):
        tuned, rewound = (values(rule(renda, epochs), epochs, 0.1) for rule in (ft, lrw))
        assert (tuned == rewound) == equal
    assert values(lrw(renda, 90), 90, 0.1) == pytest.approx([0.01] * 44 + [0.001] * 46)


@pytest.mark.parametrize(("steps", "rise"), [(10, 0), (10, 3)])
def test_training_schedules_follow_their_formulas(steps: int, rise: int):
    up, rest = [(t + 1) / rise for t in range(rise)], steps - rise
    assert values(linear(steps, 0.1, rise), steps, 1) == pytest.approx(
        up + [0.1 * u / rest + (rest - u) / rest for u in range(rest)]
    )
    assert values(cosine(steps, 0.1, rise), steps, 1) == pytest.approx(
        up + [0.1 + 0.9 * math.cos(math.pi * u / rest / 2) ** 2 for u in range(rest)]
    )
    assert values(exponential(steps, 0.5, rise), steps, 1) == pytest.approx(up + [2.0**-u for u in range(rest)])
    stepped = [1.0] * 2 + [0.2] * 4 + [0.04] * 4
    raised = [min(1.0, (t + 1) / rise) if rise else 1.0 for t in range(steps)]
    assert values(multistep(steps, [2, 6], 0.2, rise), steps, 1) == pytest.approx(
        [a * b for a, b in zip(stepped, raised, strict=True)]
    )
