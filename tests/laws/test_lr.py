"""Schedules: what every one promises, found through its names."""

import math

import pytest
import torch

from prunus.recipe import names
from prunus.train import lr
from prunus.train.lr import Multiplier, Original, allr, linear, risen, scheduler

ORIGINAL = Original.of([0.05, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001], warmup=1)
NEEDED = {"multistep": {"milestones": [3, 5]}, "exponential": {"gamma": 0.9}}
TRAINING, RETRAINING = list(names.schedules.members()), list(names.retrainings.members())


def make(name: str, steps: int, warmup: int = 0) -> Multiplier:
    return names.schedules.make({name: NEEDED.get(name, {})}, steps, warmup=warmup)


def retrain(name: str, steps: int, warmup: float = 0.1) -> Multiplier:
    return names.retrainings.make(name, ORIGINAL, steps, distance=0.5, share=0.2, warmup=warmup)


def test_every_public_schedule_is_here():
    assert set(lr.__all__) == {*TRAINING, *RETRAINING, "Multiplier", "Original", "risen", "scheduler", "warmup_steps"}


@pytest.mark.parametrize("steps", [1, 2, 7, 41])
@pytest.mark.parametrize("name", [*TRAINING, *RETRAINING])
def test_no_step_is_wasted_and_none_exceeds_the_peak(name: str, steps: int):
    multiplier = make(name, steps) if name in TRAINING else retrain(name, steps)
    values = [multiplier(step) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert values == [multiplier(step) for step in range(steps)]  # no state
    assert 0 <= multiplier(steps) <= values[-1]  # a step too many neither fails nor rises


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in ("one_cycle", "linear_warmup_decay")])
def test_linear_warm_up_reaches_its_top_in_its_last_step(name: str):
    values = [make(name, 20, warmup=4)(step) for step in range(6)]
    passed = 0.1 if name == "multistep" else 1.0  # its milestones count from 0: 3 lies in the warm-up
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, passed])


@pytest.mark.parametrize("name", ["slr", "clr", "llr", "allr"])
@pytest.mark.parametrize(("steps", "share", "rise"), [(40, 0.1, 4), (39, 0.1, 3), (9, 0.1, 0), (100, 0.29, 29)])
def test_retraining_warms_up_along_a_cosine(name: str, steps: int, share: float, rise: int):
    multiplier, top = retrain(name, steps, share), 0.5 if name == "allr" else 1.0
    values = [multiplier(step) for step in range(steps)]
    assert values[:rise] == pytest.approx([top * math.sin(math.pi * (t + 1) / (2 * rise)) ** 2 for t in range(rise)])
    assert values[rise] == max(values) == top


@pytest.mark.parametrize("name", [*TRAINING, *RETRAINING])
def test_no_steps_are_refused(name: str):
    with pytest.raises(ValueError, match="at least 1 step; got 0"):
        make(name, 0) if name in TRAINING else retrain(name, 0)


@pytest.mark.parametrize("name", ["slr", "clr", "llr", "allr"])
@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_warm_up_share_outside_zero_to_one_is_refused(name: str, share: float):
    with pytest.raises(ValueError, match=r"in \[0, 1\); got"):
        retrain(name, 10, share)


def test_a_warm_up_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="got 5 of 5 steps"):
        linear(5, warmup=5)


def test_an_original_knows_its_peak_and_its_least_value_after_the_warm_up():
    original = Original.of([0.001, 0.1, 0.1, 0.02], warmup=1)
    assert (original.steps, original.peak, original.least) == (4, 0.1, 0.02)
    assert Original.of([0.001, 0.1]).least == 0.001


def test_runs_are_exact_and_short():
    original = Original.of([0.1] * 91 + [0.1 * 0.1] * 45 + [0.1 * 0.1 * 0.1] * 46)
    assert [length for _, length in original.runs()] == [91, 45, 46]
    assert Original.from_runs(original.runs()) == original
    assert Original.from_runs([[0.5, 1], [1.0, 2]], warmup=1) == Original((0.5, 1.0, 1.0), 1)  # as JSON gives them


@pytest.mark.parametrize(
    ("lrs", "warmup", "message"),
    [
        ([], 0, "got 0 steps"),
        ([0.1, 0.1], 2, "got 2 steps, warmup=2"),
        ([0.1, float("nan")], 0, "step 1 is nan"),
        ([0.1, float("inf")], 0, "step 1 is inf"),
        ([-0.1], 0, "step 0 is -0.1"),
        ([0.0, 0.0], 0, "is 0 in every step"),
    ],
)
def test_an_impossible_original_is_refused(lrs: list[float], warmup: int, message: str):
    with pytest.raises(ValueError, match=message):
        Original.of(lrs, warmup)


def test_signals_are_checked():
    for distance, share in ((-0.1, 0.1), (0.1, float("nan"))):
        with pytest.raises(ValueError, match="signals are at least 0"):
            allr(ORIGINAL, 10, distance=distance, share=share)
    with pytest.raises(TypeError, match="share"):
        names.retrainings.make("allr", ORIGINAL, 10, distance=0.5)
    with pytest.raises(ValueError, match=r"no retraining schedule 'lr'; .*there are"):
        names.retrainings.make("lr", ORIGINAL, 10)


@pytest.mark.parametrize(("share", "rise"), [(0.0, 0), (0.1, 0), (0.2, 2), (0.5, 5), (0.9, 9)])
def test_how_long_a_schedule_rises_is_seen(share: float, rise: int):
    assert risen(lr.one_cycle(10, share), 10) == rise  # a rise of one step is none: it begins at the top
    assert risen(lr.constant(10, warmup=rise), 10) == rise
    assert risen(lr.cosine(10), 10) == risen(lr.multistep(10, [3]), 10) == 0


def test_milestones_and_factors_may_be_in_epochs():
    for epochs, steps in (
        (lr.multistep(40, [1.5, 3], epoch=10), lr.multistep(40, [15, 30])),
        (lr.exponential(40, 0.5, warmup=3, epoch=10), lr.exponential(40, 0.5**0.1, warmup=3)),
    ):
        assert [epochs(step) for step in range(40)] == [steps(step) for step in range(40)]
    with pytest.raises(ValueError, match="above 0; got \\[0, 3\\]"):
        lr.multistep(10, [0, 3])
    with pytest.raises(ValueError, match="a factor above 0; got -1"):
        lr.exponential(10, -1)


def test_scheduler_is_pytorch_s_and_resumes():
    weights = [torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)]

    def start():
        optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 2.0}], lr=1.0)
        return optimizer, scheduler(optimizer, linear(4))

    optimizer, schedule = start()
    seen = []
    for step in range(4):
        if step == 2:
            state = schedule.state_dict()
            optimizer, schedule = start()
            schedule.load_state_dict(state)
            for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen == [[1.0, 2.0], [0.75, 1.5], [0.5, 1.0], [0.25, 0.5]]


def test_a_second_scheduler_begins_at_the_rate_as_it_is():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler(optimizer, linear(4))
    optimizer.param_groups[0]["lr"] = 0.25
    assert scheduler(optimizer, linear(4)).get_last_lr() == [0.25]
