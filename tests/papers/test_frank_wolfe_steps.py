"""Stochastic Frank-Wolfe: a step by hand, and the identities behind its learning-rate rescaling."""

import math

import pytest
import torch
from torch import nn

from prunus.frankwolfe import Initial, constrained_groups
from prunus.frankwolfe.sets import (
    group_k_support,
    k_sparse,
    k_support,
    lp,
    nuclear,
    spectral_k_sparse,
    spectral_k_support,
)
from prunus.frankwolfe.sfw import SFW


def step(x, gradient, ball, lr, **options):
    parameter = nn.Parameter(torch.tensor(x))
    parameter.grad = torch.tensor(gradient)
    SFW([parameter], lr, constraint=ball, **options).step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("rescale", "share"),
    [("none", 0.1), ("diameter", 0.1 / 4), ("gradient", 0.1 * 5 / 5**0.5), ("fast_gradient", 0.25)],
)
def test_a_step_by_hand(rescale, share):
    """L1 ball of radius 2, m = (3, -4), so v = (0, 2), D = 4, ||m|| = 5; x = (1, 0), ||x - v|| = sqrt 5."""
    found = step([1.0, 0.0], [3.0, -4.0], lp(1, 2.0), 0.1, rescale=rescale)
    assert found.tolist() == pytest.approx([1 - share, 2 * share])


def test_the_share_ends_at_one():
    assert step([1.0, 0.0], [30.0, -40.0], lp(1, 2.0), 1.0, rescale="fast_gradient").tolist() == [0.0, 2.0]


def test_a_zero_gradient_moves_nothing_when_rescaled_by_it():
    """0 / 0 in published code: NaN in the spectral K-support ball."""
    for ball in (lp(2), k_support(1), group_k_support(1), spectral_k_support(1)):
        for rescale in ("gradient", "fast_gradient"):
            found = step([[0.3, 0.0], [0.0, 0.1]], [[0.0, 0.0], [0.0, 0.0]], ball, 0.1, rescale=rescale)
            assert torch.equal(found, torch.tensor([[0.3, 0.0], [0.0, 0.1]]))


def test_momentum_adds_up_or_averages():
    """g = 1 always: m is 1, then 1.9 or (with dampening) 1."""
    for dampening, second in ((0.0, 1.9), (0.9, 1.0)):
        x = nn.Parameter(torch.tensor([0.0, 0.0]))
        optimizer = SFW([x], 0.1, constraint=lp(2, 10.0), rescale="fast_gradient", dampening=dampening)
        for _ in range(2):
            x.grad = torch.tensor([1.0, 0.0])
            optimizer.step()
        # x <- (1 - 2 lr |m| / D) x - lr m with D = 20
        assert x[0].item() == pytest.approx(-0.1 * (1 - 0.01 * second) - 0.1 * second, rel=1e-5)


def test_fast_gradient_in_the_l2_ball_is_sgd_with_adaptive_weight_decay():
    """x <- (1 - 2 lr ||m|| / D) x - lr m, against torch's SGD with that weight decay (its momentum is the same m)."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.full((7,), 0.5)) for _ in range(2))
    sfw = SFW([ours], 0.05, constraint=lp(2, 8.0), rescale="fast_gradient")
    sgd = torch.optim.SGD([theirs], 0.05, momentum=0.9)
    for _ in range(10):
        gradient = torch.randn(7, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        sfw.step()
        before = theirs.detach().clone()
        sgd.step()
        length = sgd.state[theirs]["momentum_buffer"].norm()
        with torch.no_grad():
            theirs.sub_(0.05 * 2 * length / 16 * before)
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_vertices_have_half_the_diameter():
    """For every set of the paper but general p: so fast_gradient is a step of length lr ||m||."""
    m = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    sets = [lp(1), lp(2), lp(math.inf), k_sparse(5), k_support(5), group_k_support(2)]
    for ball in [*sets, nuclear(), spectral_k_sparse(3), spectral_k_support(3)]:
        assert float(ball.lmo(m).norm()) == pytest.approx(ball.diameter((6, 8)) / 2, rel=1e-5)
    assert float(lp(3).lmo(m).norm()) < 0.99 * lp(3).diameter((6, 8)) / 2


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ball", [lp(2), k_support(2), spectral_k_support(1)])
def test_what_is_left_of_the_start_is_its_weight_in_the_mean(ball, joint):
    """x_T = p x_0 + vertices' part: with another start and the same gradients, the difference shrank by p exactly."""
    torch.manual_seed(0)
    gradients = torch.randn(4, 3, 3)
    ends, lefts = [], []
    starts = [torch.zeros(3, 3), 0.1 * torch.randn(3, 3)]
    for start in starts:
        x = nn.Parameter(start.clone())
        optimizer = SFW([x], 0.1, constraint=ball, joint=joint, rescale="fast_gradient")
        assert optimizer.left() is None
        for gradient in gradients:
            x.grad = gradient
            optimizer.step()
        ends.append(x.detach())
        lefts.append(optimizer.left())
    assert 0 < lefts[0] < 1
    assert lefts[0] == pytest.approx(lefts[1], rel=1e-6)
    torch.testing.assert_close(ends[1] - ends[0], lefts[0] * starts[1], rtol=1e-4, atol=1e-6)


def test_what_is_left_goes_on_after_loading():
    torch.manual_seed(0)
    x = nn.Parameter(torch.zeros(4))
    first = SFW([x], 0.1, constraint=lp(2))
    for optimizer in (first, SFW([x], 0.1, constraint=lp(2))):
        if optimizer is not first:
            optimizer.load_state_dict(first.state_dict())
        x.grad = torch.ones(4)
        optimizer.step()
    assert optimizer.left() == pytest.approx(0.9**2)


def test_heads_of_convolutional_networks_are_left_out_of_structured_sets():
    wide = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)]
    for model, names in (
        (nn.Sequential(*wide, nn.Linear(4, 10)), {"0.weight", "1.weight"}),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(8, 4)), {"0.weight", "1.weight", "2.weight"}),
    ):
        chosen = constrained_groups(model, group_k_support(0.5), Initial(3.0))[0]["params"]
        assert {name for name, each in model.named_parameters() if any(each is one for one in chosen)} == names
