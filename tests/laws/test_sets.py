"""Laws of every feasible set: linear minimisation, membership, diameter, starting point and projection agree."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import nn

from prunus.frankwolfe import sets
from prunus.frankwolfe.sets import Ball, Entries, Groups, KSparse, KSupport, Labels, Lp, Spectrum, Tied
from prunus.frankwolfe.sets.protocol import count_of
from prunus.frankwolfe.sets.sparse import largest
from prunus.frankwolfe.sets.subspace import COLD, follow_, make_basis
from prunus.frankwolfe.sfw import SFW

GAUGES = [Lp(1), Lp(1.5), Lp(2), Lp(3), Lp(math.inf), KSparse(2), KSupport(2), KSupport(1), KSparse(0.6), KSupport(1.0)]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 0, 2, 2, 1])
SEEN = [Entries(), Groups(), Groups(2), Groups(3, "columns"), Labels(LABELS), Spectrum()]
SHAPE = (4, 3)
SOME = [Lp(1), KSparse(2), KSupport(2)]
BALLS = [Ball(gauge, seen, 1.7) for seen in SEEN for gauge in (GAUGES if seen in (SEEN[0], SEEN[-1]) else SOME)]


def name_of(ball):
    return f"{ball.gauge}-{type(ball.seen).__name__}{getattr(ball.seen, 'size', '')}"


every = pytest.mark.parametrize("ball", BALLS, ids=name_of)


def directions(shape=SHAPE, dtype=torch.float64):
    """Random, with ties, with zeros, of rank one, huge and tiny, and zero."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, *shape, generator=generator, dtype=dtype)
    ties = torch.randn(4, *shape, generator=generator, dtype=dtype).sign()
    sparse = random[:2] * (torch.rand(2, *shape, generator=generator) < 0.3)
    outer = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator, dtype=dtype).expand(shape).clone()
    return [*random, *ties, *sparse, outer, random[0] * 1e12, random[0] * 1e-12, torch.zeros(shape, dtype=dtype)]


def dot(one, other):
    return float((one.double() * other.double()).sum())


@every
def test_the_minimiser_is_feasible_and_beats_every_other_point(ball):
    generator = torch.Generator().manual_seed(1)
    others = [ball.start(x * 100) for x in torch.randn(200, *SHAPE, generator=generator, dtype=torch.float64)]
    vertices = [ball.lmo(x) for x in directions()]
    for gradient in directions():
        vertex = ball.lmo(gradient)
        assert ball.norm(vertex) <= ball.radius * (1 + 1e-6)
        best = dot(gradient, vertex)
        scale = 1e-6 * float(gradient.norm())
        assert all(best <= dot(gradient, other) + scale for other in [*others, *vertices])


@every
def test_norm_and_minimiser_are_dual(ball):
    """Every x of norm n has n = max <x, y> over y with dual norm at most 1, and y = normal vectors attain it."""
    for x in directions()[:12]:
        norm = float(ball.norm(x))
        duals = [-dot(y, ball.lmo(y)) / ball.radius for y in directions()[:-1]]
        for y, dual in zip(directions()[:-1], duals, strict=True):
            assert dot(x, y) <= norm * dual * (1 + 1e-6) + 1e-12
        # The vertex for x has norm r and attains <x, v> = -r dual(x): scaling x to the border changes nothing.
        if norm > 0:
            assert float(ball.norm(ball.start(x * 1e6))) == pytest.approx(ball.radius, rel=1e-6)


@every
def test_norms_are_norms(ball):
    x, y, *_ = directions()
    assert float(ball.norm(-3 * x)) == pytest.approx(3 * float(ball.norm(x)), rel=1e-9)
    assert float(ball.norm(x + y)) <= float(ball.norm(x)) + float(ball.norm(y)) + 1e-9
    assert float(ball.norm(torch.zeros(SHAPE))) == 0


@every
def test_the_diameter_is_reached_and_never_passed(ball):
    corners = [torch.ones(SHAPE, dtype=torch.float64), torch.eye(*SHAPE, dtype=torch.float64)]
    corners += [torch.zeros(SHAPE, dtype=torch.float64)]
    corners[-1][0, 0] = 1
    if not isinstance(ball.seen, Spectrum):  # one entry in each group, so that groups are equal
        _, rebuild = ball.seen.split(corners[0].reshape(1, *ball.seen.key(SHAPE)))
        count = ball.seen.count(*ball.seen.key(SHAPE))
        corners.append(rebuild(torch.ones(1, count, dtype=torch.float64)).view(SHAPE))
    points = [ball.lmo(x) for x in [*directions(), *corners]]
    found = max(float((one + other).norm()) for one, other in itertools.product(points, points))  # the set is symmetric
    assert found == pytest.approx(ball.diameter(SHAPE), rel=1e-6)


@every
def test_the_projection_is_certified_by_the_minimiser(ball):
    """p is the projection of x on a convex set iff <x - p, y - p> <= 0 for all y in it, the worst of which is known."""
    inside = ball.start(directions()[0]) * 0.9
    assert torch.allclose(ball.project(inside), inside, atol=1e-9)
    chosen = directions()
    for x in [chosen[1] * 3, chosen[2] * 1e3, chosen[6] * 3, chosen[11] * 5, chosen[12] * 2]:
        p = ball.project(x)
        assert ball.norm(p) <= ball.radius * (1 + 1e-6)
        worst = ball.lmo(p - x)
        assert dot(x - p, worst - p) <= 1e-6 * float(x.norm()) * ball.radius


@every
def test_the_start_is_feasible_and_on_the_same_ray(ball):
    for x in directions()[:4]:
        started = ball.start(x * 50)
        assert float(ball.norm(started)) == pytest.approx(ball.radius, rel=1e-6)
        assert torch.allclose(started / started.norm(), x / x.norm(), atol=1e-9)
        assert torch.equal(ball.start(started * 0.5), started * 0.5)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_agree_with_float64(ball, dtype):
    for gradient in directions()[:6]:
        low = gradient.to(dtype)
        vertex = ball.lmo(low)
        assert vertex.dtype == dtype
        assert ball.norm(vertex) <= ball.radius * (1 + (1e-5 if dtype == torch.float32 else 1e-2))
        exact = dot(low, ball.lmo(low.double()))
        assert dot(low, vertex) == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 1e-2)


@every
def test_problems_side_by_side_are_problems_alone(ball):
    gradients = directions()
    stack = torch.stack([gradient.reshape(ball.seen.key(SHAPE)) for gradient in gradients])
    together = ball.extreme([stack])[0]
    for gradient, found in zip(gradients, together, strict=True):
        assert torch.allclose(-ball.radius * found.view(SHAPE), ball.lmo(gradient), atol=1e-9)


@pytest.mark.parametrize("ball", [ball for ball in BALLS if not isinstance(ball.seen, Labels)], ids=name_of)
def test_joint_points_are_one_vector_or_one_block_diagonal_matrix(ball):
    one, other = directions()[:2]
    other = other.repeat(2, 1) if not isinstance(ball.seen, Groups) or ball.seen.along == "rows" else other
    if isinstance(ball.seen, Spectrum):
        whole = torch.block_diag(one, other)
    elif isinstance(ball.seen, Groups):
        whole = torch.cat([one, other], 0 if ball.seen.along == "rows" else 1)
    else:
        whole = torch.cat([one.flatten(), other.flatten()])
    assert float(ball.norm([one, other])) == pytest.approx(float(ball.norm(whole)), rel=1e-9)
    vertices = ball.lmo([one, other])
    assert [v.shape for v in vertices] == [one.shape, other.shape]
    joint = dot(one, vertices[0]) + dot(other, vertices[1])
    assert joint == pytest.approx(dot(whole, ball.lmo(whole)), rel=1e-9)
    assert ball.norm(ball.project([one * 9, other * 9])) <= ball.radius * (1 + 1e-6)


# Independent oracles in a few dimensions.


@pytest.mark.parametrize("k", [1, 2, 4])
def test_tied_groups_against_all_choices_of_neurons(k):
    """Gate, up and down of five neurons: the minimiser against every choice of k of them, whichever three matrices."""
    ball = Ball(KSupport(k), Tied(), 1.3)
    generator = torch.Generator().manual_seed(k)
    for scale in (1.0, 1e-12, 0.0):
        gate, up, down = point = [
            scale * torch.randn(s, generator=generator).double() for s in ((5, 3), (5, 3), (3, 5))
        ]
        own = torch.cat([gate, up, down.T], 1)  # (neurons, everything of one)
        best = max(float(own[list(chosen)].norm()) for chosen in itertools.combinations(range(5), k))
        vertices = ball.lmo(point)
        assert [v.shape for v in vertices] == [x.shape for x in point]
        assert sum(map(dot, point, vertices)) == pytest.approx(-1.3 * best, rel=1e-9)
        found = torch.cat([vertices[0], vertices[1], vertices[2].T], 1)
        assert int(found.any(1).sum()) == (k if scale else 0)
        assert float(found.norm()) == pytest.approx(1.3 if scale else 0.0, rel=1e-9)
    alone = Ball(KSupport(k), Groups(), 1.3)
    point = [torch.randn(s, generator=generator).double() for s in ((5, 3), (5, 3), (3, 5))]
    own = torch.cat([point[0], point[1], point[2].T], 1)
    assert float(ball.norm(point)) == pytest.approx(float(alone.norm(own)), rel=1e-9)
    assert ball.diameter((5, 3), (5, 3), (3, 5)) == pytest.approx(alone.diameter((5, 9)))
    nearest = ball.project([9 * each for each in point])
    assert torch.allclose(torch.cat([nearest[0], nearest[1], nearest[2].T], 1), alone.project(9 * own), atol=1e-9)


def test_matrices_that_share_no_groups_are_refused():
    with pytest.raises(ValueError, match=r"3 matrices share groups; got 1: .*joint=True"):
        SFW([nn.Parameter(torch.ones(4, 3))], 0.1, constraint=Ball(KSupport(1), Tied()))
    with pytest.raises(ValueError, match="must have as many each"):
        Ball(KSupport(1), Tied()).lmo([torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 3)])


def extreme_points(gauge, n):
    if gauge == Lp(1):
        return [sign * np.eye(n)[i] for i in range(n) for sign in (1, -1)]
    if gauge == Lp(math.inf):
        return [np.array(signs) for signs in itertools.product((1.0, -1.0), repeat=n)]
    k = count_of(gauge.k, n)
    points = []
    for support in itertools.combinations(range(n), k):
        for signs in itertools.product((1.0, -1.0), repeat=k):
            point = np.zeros(n)
            point[list(support)] = signs
            points.append(point)
    return points


POLYTOPES = pytest.mark.parametrize("gauge", [Lp(1), Lp(math.inf), KSparse(2), KSparse(3), KSparse(1), KSparse(4)])


@POLYTOPES
@pytest.mark.parametrize("n", [4])
def test_polytopes_against_their_extreme_points(gauge, n):
    """The minimiser against all extreme points; the norm against the linear programme min sum t, x = sum t_j e_j."""
    ball, points = Ball(gauge, Entries(), 2.0), np.array(extreme_points(gauge, n))
    for x in directions((n,)):
        exhaustive = 2.0 * (points @ x.numpy()).min()
        assert dot(x, ball.lmo(x)) == pytest.approx(exhaustive, rel=1e-9)
    for x in directions((n,))[:8]:
        found = linprog(np.ones(len(points)), A_eq=points.T, b_eq=x.numpy())
        assert float(ball.norm(x)) == pytest.approx(found.fun, rel=1e-7)
    apart = max(np.linalg.norm(a - b) for a in points for b in points)
    assert ball.diameter((n,)) == pytest.approx(2 * apart)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_k_support_against_supports_and_a_convex_solver(k):
    """Minimiser: the best of all supports. Norm: min over 0 <= w <= 1, sum w <= K of sum x^2 / w, by a solver."""
    ball, n = Ball(KSupport(k), Entries()), 5
    for x in directions((n,)):
        exhaustive = max(float(x[list(s)].norm()) for s in itertools.combinations(range(n), k))
        assert -dot(x, ball.lmo(x)) == pytest.approx(exhaustive, rel=1e-9)
    for x in directions((n,))[:5]:
        squares = x.square().numpy()
        found = minimize(
            lambda w: (squares / w).sum(),  # noqa: B023
            np.full(n, k / n),
            jac=lambda w: -squares / w**2,  # noqa: B023
            bounds=[(1e-6, 1)] * n,
            constraints={"type": "ineq", "fun": lambda w: k - w.sum(), "jac": lambda w: -np.ones(n)},
            options={"maxiter": 500, "ftol": 1e-14},
        )
        assert float(ball.norm(x)) == pytest.approx(found.fun**0.5, rel=1e-4)


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=40),
    st.integers(1, 40),
    st.sampled_from([KSparse, KSupport]),
)
@settings(max_examples=100, deadline=None)
def test_any_vector(values, k, gauge):
    """Duality with equality: <x, v> = -dual(x) for the vertex v, and norm(v) is 1 or v is zero."""
    x, k = torch.tensor(values, dtype=torch.float64), min(k, len(values))
    ball = Ball(gauge(k), Entries())
    vertex = ball.lmo(x)
    top = x.abs().sort(descending=True).values[:k]
    dual = float(top.sum() if gauge is KSparse else top.norm())
    assert int((vertex != 0).sum()) <= k
    assert -dot(x, vertex) == pytest.approx(dual, rel=1e-9, abs=1e-30)
    assert float(ball.norm(vertex)) == pytest.approx(1.0 if dual > 0 else 0.0, abs=1e-9)
    norm = float(ball.norm(x))
    assert max(float(x.norm()), float(x.abs().sum()) / k**0.5) <= norm * (1 + 1e-9) or gauge is KSparse
    assert norm <= float(x.abs().sum()) * (1 + 1e-9)


# Ties, zeros, counts.


def test_ties_take_the_first_and_never_more():
    for n in (1024, 1025, 5000):  # within a block and across blocks
        a = torch.randint(4, (3, n), generator=torch.Generator().manual_seed(n)).float()
        for k in (1, n // 3, n - 1):
            order = a.sort(stable=True, dim=1, descending=True).indices[:, :k]
            chosen = [sorted(row.tolist()) for row in order]
            assert [row.nonzero()[:, 0].tolist() for row in largest(a, k)] == chosen
    assert largest(torch.ones(2, 8), 3).sum(1).tolist() == [3, 3]
    assert largest(torch.tensor([[1.0, 2, 1, 1, 0]]), 3).tolist() == [[True, True, True, False, False]]
    equal = torch.ones(8, 5)
    chosen = sets.group_k_support(4).lmo(equal)
    assert (chosen != 0).any(1).tolist() == [True] * 4 + [False] * 4
    zeros = torch.zeros(8, 5)
    zeros[5] = 1
    assert (sets.group_k_support(4).lmo(zeros) != 0).any(1).nonzero().flatten().tolist() == [5]


@every
def test_a_zero_gradient_gives_zero(ball):
    assert not ball.lmo(torch.zeros(SHAPE)).any()
    both = [torch.zeros(SHAPE), directions()[0]] if not isinstance(ball.seen, Labels) else []
    assert not both or not ball.lmo(both)[0].any()  # where the gradient is 0, of several tensors, too


@pytest.mark.parametrize("seen", [Groups(), Groups(2), Groups(3, "columns"), Labels(LABELS)], ids=str)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_norms_of_groups_neither_overflow_nor_vanish(seen, scale):
    x = directions()[0].float()
    ball = Ball(KSupport(2), seen)
    assert float(ball.norm(x * scale)) == pytest.approx(float(ball.norm(x.double() * scale)), rel=1e-3)
    assert torch.allclose(ball.lmo(x * scale), ball.lmo(x), atol=1e-3)


def test_counts_and_shares():
    assert (count_of(1, 10), count_of(1.0, 10), count_of(0.3, 10), count_of(0.01, 10), count_of(50, 10)) == (
        1, 10, 3, 1, 10,
    )  # fmt: skip
    for wrong in (0, -1, 0.0, 1.5, True):
        with pytest.raises(ValueError, match=r"count .* or a share"):
            KSupport(wrong)


def test_labels_may_make_the_groups_that_rows_make():
    x = directions()[0]
    rows = Ball(KSupport(2), Groups(2))
    labels = Ball(KSupport(2), Labels(torch.arange(4).div(2, rounding_mode="floor").repeat_interleave(3)))
    assert torch.allclose(rows.lmo(x), labels.lmo(x))
    assert torch.allclose(rows.norm(x), labels.norm(x))


def test_convolutions_are_matrices_of_filters():
    weight = torch.randn(4, 3, 2, 2)
    ball = sets.group_k_support(1)
    assert (ball.lmo(weight).flatten(1) != 0).any(1).sum() == 1
    assert ball.lmo(weight).shape == weight.shape
    channels = sets.group_k_support(1, groups=Groups(4, "columns")).lmo(weight)
    assert (channels != 0).any(0).any(1).any(1).sum() == 1
    assert float(sets.nuclear().norm(weight)) == pytest.approx(
        float(torch.linalg.matrix_norm(weight.flatten(1), "nuc")), rel=1e-5
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="radius above 0"):
        sets.k_support(2, radius=0.0)
    with pytest.raises(ValueError, match=r"K is a count .*; got nan"):
        sets.k_support(float("nan"))
    with pytest.raises(ValueError, match=r"p in \[1, inf\]"):
        Lp(0.5)
    with pytest.raises(ValueError, match="which groups of 3 do not divide"):
        Ball(KSupport(1), Groups(3)).norm(torch.ones(4, 3))
    with pytest.raises(ValueError, match="12 labels do not fit"):
        Ball(KSupport(1), Labels(LABELS)).norm(torch.ones(4, 4))
    with pytest.raises(ValueError, match="one int64 of at least 0"):
        Labels(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="at least one tensor"):
        sets.lp(2).norm([])


@pytest.mark.parametrize("name", sets.__all__)
def test_examples_are_true(name):
    names = {each: getattr(sets, each) for each in sets.__all__} | {"torch": torch, "nn": nn}
    example = doctest.DocTestParser().get_doctest(getattr(sets, name).__doc__, names, name, None, 0)
    assert example.examples
    heard = []
    doctest.DocTestRunner(verbose=False).run(example, out=heard.append)
    assert not heard, "".join(heard)


# Leading singular vectors without a decomposition.


def worth(ball, x, basis, iterations):
    """The share of the exact minimiser's value, and the norm, of the one made of followed vectors."""
    followed = follow_([basis], [x[None]], iterations)[0]
    found, exact = ball.extreme([x[None]], [followed])[0][0], ball.extreme([x[None]])[0][0]
    return float((x * found).sum() / (x * exact).sum()), float(ball.norm(found))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("k", "cold", "warm"), [(1, 0.95, 0.99), (12, 0.98, 0.975), (38, 0.99, 0.965)])
def test_followed_vectors_are_as_good_as_stated(k, cold, warm, transposed):
    generator = torch.Generator().manual_seed(0)
    ball = sets.spectral_k_support(k)
    turn = (lambda x: x.T.contiguous()) if transposed else (lambda x: x)
    x = torch.randn(128, 576, generator=generator)
    quality, norm = worth(ball, turn(x), make_basis(1, 128, 576, k, device=x.device), COLD)
    assert quality > cold
    assert norm < 1 + 2e-5
    u = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(576, 128, generator=generator))[0]
    signal, x = (u * (20 / torch.arange(1, 129.0))) @ v.T, torch.zeros(128, 576)
    basis = make_basis(1, 128, 576, k, device=x.device)
    for step in range(12):
        x = 0.9 * x + signal + 0.3 * torch.randn(128, 576, generator=generator)
        u_found, _, v_found = follow_([basis], [turn(x)[None]], 1 if step else COLD)[0]
    s = (u_found[0].T @ turn(x) @ v_found[0]).diagonal()
    assert float(s.norm() / torch.linalg.svdvals(x)[:k].norm()) > warm


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8])
def test_followed_vectors_are_never_too_long(condition):
    """Whatever the spectrum, and for ranks below k; so what is made of them is feasible."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(60, 24, generator=generator))[0]
    spectrum = condition ** -torch.linspace(0, 1, 24)
    for rank in (24, 3, 1, 0):
        x = ((u * (spectrum * (torch.arange(24) < rank))) @ v.T)[None]
        basis = make_basis(1, 24, 60, 8, device=x.device)
        for _ in range(4):
            u_found, s, v_found = follow_([basis], [x], 3)[0]
            assert torch.isfinite(basis).all()
            assert float(torch.linalg.matrix_norm(u_found[0], 2)) < 1 + 2e-5
            assert float(torch.linalg.matrix_norm(v_found[0], 2)) < 1 + 2e-5
        exact = torch.linalg.svdvals(x[0])[:8]
        assert torch.allclose(s[0].sort(descending=True).values, exact, atol=0.03 * float(exact[0]) + 1e-12)


def test_a_basis_recovers_from_a_zero_gradient():
    ball, x = sets.nuclear(), torch.randn(1, 10, 20, generator=torch.Generator().manual_seed(0))
    basis = make_basis(1, 10, 20, 1, device=x.device)
    follow_([basis], [torch.zeros_like(x)], 1)
    quality, _ = worth(ball, x[0], basis, 30)
    assert quality > 0.99
