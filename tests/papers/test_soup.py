"""Soups by hand: barycentres, angles, barriers and planes whose numbers are known; a prediction ensemble of two."""

import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from prunus.measure.ensemble import Ensemble, ensemble_accuracy
from prunus.report.landscape import plot_lines, plot_plane
from prunus.soup import averages
from prunus.soup.average import average
from prunus.soup.geometry import distances, loss_line, loss_plane, weight_names

pytestmark = pytest.mark.pictures


def states(count, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(5, 7, generator=generator) * spread, "b": torch.randn(3, generator=generator) * spread}
        for _ in range(count)
    ]


def flat(state):
    return torch.cat([state["a"].flatten(), state["b"]]).double()


def test_two_members_are_half_their_distance_from_the_barycentre():
    found = distances(states(2))
    np.testing.assert_allclose(found.barycentre, found.l2[0, 1] / 2, rtol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_distances_to_the_barycentre_are_those_of_the_pairs(count):
    """sum_i ||t_i - mean||^2 = (1/m) sum_{i<j} ||t_i - t_j||^2."""
    found = distances(states(count))
    pairs = found.l2[np.triu_indices(count, 1)]
    assert np.square(found.barycentre).sum() == pytest.approx(np.square(pairs).sum() / count, rel=1e-12)


def test_distances_and_angles_are_those_of_the_flat_vectors():
    members = states(4)
    found, vectors = distances(members), [flat(state) for state in members]
    for i, u in enumerate(vectors):
        assert found.norm[i] == pytest.approx(float(u.norm()))
        for j, v in enumerate(vectors):
            assert found.l2[i, j] == pytest.approx(float((u - v).norm()), abs=1e-12)
            cosine = float(u @ v / (u.norm() * v.norm()))
            assert found.angle[i, j] == pytest.approx(math.degrees(math.acos(min(1.0, cosine))), abs=1e-5)
    mean = flat({name: tensor.double() for name, tensor in average(members).items()})
    np.testing.assert_allclose(found.barycentre, [float((u - mean).norm()) for u in vectors], rtol=1e-6)


@pytest.mark.parametrize(("v", "degrees"), [((0.0, 2.0), 90), ((3.0, 3.0), 45), ((-2.0, 0.0), 180), ((5.0, 0.0), 0)])
def test_angles_by_hand(v, degrees):
    found = distances([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor(v)}])
    assert found.angle[0, 1] == pytest.approx(degrees, abs=1e-9)


def test_a_small_angle_keeps_its_digits():
    """acos of the cosine is 0 here: 1 - 5e-19 is 1 in float64."""
    found = distances([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1e-9])}])
    assert found.angle[0, 1] == pytest.approx(math.degrees(1e-9), rel=1e-6)
    assert found.angle[0, 0] == 0


def test_a_zero_vector_has_no_angle():
    found = distances([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    assert np.isnan(found.angle[0]).all()
    assert found.angle[1, 1] == 0
    found = distances([{"w": torch.zeros(999)}, *({"w": torch.linspace(-1, 1, 999) * i} for i in range(1, 9))])
    assert np.isnan(found.angle[0]).all()
    assert not np.isnan(found.angle[1:, 1:]).any()


def test_statistics_of_batchnorm_do_not_count_unless_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    one, other = ({name: tensor.clone() for name, tensor in model.state_dict().items()} for _ in range(2))
    other["1.running_var"] += 3
    assert weight_names(one) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert distances([one, other]).l2[0, 1] == 0
    assert distances([one, other], ["1.running_var"]).l2[0, 1] == pytest.approx(3 * math.sqrt(2))
    with pytest.raises(ValueError, match="no tensor 'x'"):
        distances([one, other], ["x"])


def test_the_summary_is_of_pairs_and_members():
    members = [{"w": torch.tensor([value, 1.0])} for value in (0.0, 1.0, 5.0)]
    found = distances(members).summary()
    assert (found["l2_min"], found["l2_mean"], found["l2_max"]) == pytest.approx((1, 10 / 3, 5))
    assert (found["barycentre_min"], found["barycentre_max"]) == pytest.approx((1, 3))
    assert found["angle_min"] == pytest.approx(math.degrees(math.atan2(5, 1)) - 45)


def double_well(state):
    """(x^2 - 1)^2 + y^2: two basins at x = -1 and 1, a barrier of 1 at 0."""
    x, y = state["w"].tolist()
    return (x * x - 1) ** 2 + y * y


def test_the_line_of_a_double_well_has_its_barrier():
    a, b = {"w": torch.tensor([-1.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}
    line = loss_line(a, b, double_well, np.linspace(0, 1, 5))
    np.testing.assert_allclose(line.values, [0, 9 / 16, 1, 9 / 16, 0])
    assert line.barrier() == 1
    first = loss_line(a, b, lambda state: float(state["w"][0]), [0, 0.25, 2])
    assert first.values.tolist() == [-1, -0.5, 3]
    same = loss_line(a, {"w": torch.tensor([-0.5, 0.0])}, double_well, [-1, 0, 0.5, 1])
    assert same.barrier() == 0
    with pytest.raises(ValueError, match="shares 0 and 1"):
        loss_line(a, b, double_well, [0.25, 0.5]).barrier()


def test_the_plane_is_one_in_the_weights():
    """The score reads its coordinates off the weights: they must be the grid's, by Gram-Schmidt done again."""
    members = states(3)
    a, b, c = (flat(state) for state in members)
    u = (b - a) / (b - a).norm()
    v = (c - a) - ((c - a) @ u) * u
    v /= v.norm()
    seen = []

    def score(state):
        away = flat(state) - a
        seen.append((float(away @ u), float(away @ v)))
        assert float((away - (away @ u) * u - (away @ v) * v).norm()) < 1e-5
        return seen[-1][0] + 10 * seen[-1][1]

    plane = loss_plane(*members, score, points=(4, 3), margin=0.5)
    assert plane.values.shape == (3, 4)
    np.testing.assert_allclose(seen, [(x, y) for y in plane.y for x in plane.x], atol=1e-5)
    np.testing.assert_allclose(plane.values, plane.x[None] + 10 * plane.y[:, None], atol=1e-4)
    expected = [[0, 0], [float((b - a).norm()), 0], [float((c - a) @ u), float((c - a) @ v)]]
    np.testing.assert_allclose(plane.members, expected, atol=1e-9)
    width = plane.members[:, 0].max() - plane.members[:, 0].min()
    assert (plane.x[0], plane.y[0]) == pytest.approx(
        (plane.members[:, 0].min() - 0.5 * width, -0.5 * plane.members[2, 1])
    )


def test_members_on_one_line_span_no_plane():
    a, b = states(2)
    c = {name: 0.3 * a[name] + 0.7 * b[name] for name in a}
    for three in ((a, b, c), (a, a, b), (a, b, b)):
        with pytest.raises(ValueError, match="lie on one line"):
            loss_plane(*three, lambda _: 0.0)


class Fixed(nn.Module):
    """Gives the probabilities it holds, as logits (up to a constant, which softmax does not see)."""

    def __init__(self, probabilities, shift=0.0):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log() + shift)

    def forward(self, x):
        return self.logits[x]


def test_an_ensemble_is_the_mean_of_probabilities_scored_against_the_truth():
    """Neither the members' agreement nor the mean of logits: both would give other numbers here."""
    one = Fixed([[0.98, 0.01, 0.01], [0.20, 0.35, 0.45]])
    other = Fixed([[0.30, 0.60, 0.10], [0.15, 0.60, 0.25]], shift=5.0)
    x = torch.tensor([0, 1])
    mean = torch.tensor([[0.64, 0.305, 0.055], [0.175, 0.475, 0.35]])
    torch.testing.assert_close(Ensemble([one, other])(x).exp(), mean)
    assert ((one(x).softmax(1) * other(x).softmax(1)).argmax(1)).tolist() == [0, 1]
    found = ensemble_accuracy([one, other], [(x, torch.tensor([0, 2]))])
    assert (found.top1, found.images) == (0.5, 2)
    assert found.loss == pytest.approx(-(math.log(0.64) + math.log(0.35)) / 2, rel=1e-5)
    # Confidences .64 (right) and .475 (wrong) lie in bins of their own.
    assert found.calibration_error == pytest.approx((0.36 + 0.475) / 2, rel=1e-5)


def test_an_ensemble_of_one_or_of_copies_is_the_network():
    model = Fixed([[0.7, 0.2, 0.1]])
    x = torch.tensor([0])
    for members in ([model], [model, Fixed([[0.7, 0.2, 0.1]])]):
        torch.testing.assert_close(Ensemble(members)(x), model(x).log_softmax(1))
    copies = Ensemble.of(model, [model.state_dict(), {"logits": torch.zeros(1, 3)}])
    torch.testing.assert_close(copies(x).exp(), torch.tensor([[0.7 + 1 / 3, 0.2 + 1 / 3, 0.1 + 1 / 3]]) / 2)
    assert model.logits.data_ptr() not in {p.data_ptr() for p in copies.parameters()}
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble([])


def test_an_ensemble_is_measured_in_evaluation_mode_and_modes_stay():
    members = [nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9)).train(way) for way in (True, False)]
    batches = [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))]
    assert ensemble_accuracy(members, batches) == ensemble_accuracy(members, batches)
    assert [member.training for member in members] == [True, False]


def test_confident_members_that_disagree_keep_finite_logits():
    one, other = Fixed([[1.0, 1e-30]]), Fixed([[1e-30, 1.0]])
    assert Ensemble([one, other])(torch.tensor([0])).exp().tolist() == [pytest.approx([0.5, 0.5])]


def test_lines_and_planes_are_drawn(tmp_path):
    members = [{"w": torch.tensor(v)} for v in ([-1.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
    line = loss_line(members[0], members[1], double_well, np.linspace(0, 1, 5))
    plot_lines({"1 to 2": line, "again": line}, tmp_path / "lines.png", title="lines")
    plane = loss_plane(*members, lambda state: double_well(state) if state["w"][1] < 1 else float("nan"), points=(5, 5))
    plot_plane(plane, tmp_path / "plane.png", title="plane")
    for name in ("lines", "plane"):
        picture = imread(tmp_path / f"{name}.png")
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10
    with pytest.raises(ValueError, match="no line"):
        plot_lines({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="no finite value"):
        plot_plane(loss_plane(*members, lambda _: float("nan"), points=(2, 2)), tmp_path / "none.png")
    with pytest.raises(ValueError, match="got 2 labels"):
        plot_plane(plane, tmp_path / "none.png", labels=("a", "b"))
    assert not (tmp_path / "none.png").exists()


# Averages by task vectors, worked by hand, and on the sphere.


def of(*values):
    return {"w": torch.tensor(values)}


def test_ties_by_hand():
    """Yadav et al. 2023, figure 2: trim, elect the sign, mean of those that agree. Task vectors from (1, 1, 1, 1, 0):

    tau_1 = ( 4, -2, 1, 3, 0)   the two largest:  4, 3        base 1 + ...
    tau_2 = (-2, -6, 2, 4, 0)                     -6, 4
    tau_3 = ( 5,  7, 1, 1, 0)                     5, 7
    """
    base = of(1.0, 1.0, 1.0, 1.0, 0.0)
    members = [of(5.0, -1.0, 2.0, 4.0, 0.0), of(-1.0, -5.0, 3.0, 5.0, 0.0), of(6.0, 8.0, 2.0, 2.0, 0.0)]
    state, shares = averages.ties(members, base, density=0.5)
    assert state["w"].tolist() == [1 + (4 + 5) / 2, 1 + 7.0, 1.0, 1 + (3 + 4) / 2, 0.0]
    assert shares == (1 / 3,) * 3
    everything, _ = averages.ties(members, base, density=1.0)  # elected: +7, -1, +4, +8
    assert everything["w"].tolist() == pytest.approx([1 + 4.5, 1 - (2 + 6) / 2, 1 + 4 / 3, 1 + 8 / 3, 0.0])


def test_signs_that_cancel_add_nothing():
    state, _ = averages.ties([of(3.0), of(-3.0)], of(0.0), density=1.0)
    assert state["w"].tolist() == [0.0]


def test_dare_scales_what_it_keeps_and_is_right_on_average():
    """Yu et al. 2024: entries are 0 or tau / density, and their expectation is tau."""
    base, member = torch.full((20_000,), 1.0), torch.full((20_000,), 3.0)
    state, _ = averages.dare([{"w": member}], {"w": base}, density=0.25)
    values = set(state["w"].tolist())
    assert values == {1.0, 1.0 + 2.0 / 0.25}
    deviation = 2.0 * (3 / 20_000) ** 0.5  # of a mean of 20,000 draws: tau sqrt((1 - p) / p / n)
    assert abs(float(state["w"].mean()) - 3.0) < 4 * deviation
    again, _ = averages.dare([{"w": member}], {"w": base}, density=0.25)
    other, _ = averages.dare([{"w": member}], {"w": base}, density=0.25, seed=1)
    assert torch.equal(state["w"], again["w"])
    assert not torch.equal(state["w"], other["w"])


def test_ties_keeps_one_entry_of_what_moved_at_least():
    state, _ = averages.ties([{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([4.0, 0.0])}], {"w": torch.zeros(2)})
    assert state["w"].tolist() == [3.0, 0.0]  # density 0.2 of two entries rounds to none
    assert averages.ties([{"w": torch.ones(0)}], {"w": torch.ones(0)})[0]["w"].shape == (0,)


@pytest.mark.parametrize("how", [averages.dare, averages.dare_ties])
def test_tied_weights_stay_tied(how):
    """A state has one tensor under two names; whichever a model reads, by whichever name it is kept, is the same."""
    base, member = torch.zeros(2, 1000, dtype=torch.bfloat16), torch.randn(2, 1000).bfloat16()
    for one, other in (("embed", "head"), ("head", "embed")):
        state, _ = how([{one: member, other: member.clone()}], {one: base, other: base})
        assert torch.equal(state["head"], state["embed"])
        alone, _ = how([{"renamed": member}], {"renamed": base})
        assert torch.equal(state["head"], alone["renamed"])
    apart, _ = how([{"a": member, "b": member + 1}], {"a": base, "b": base})
    assert not torch.equal(apart["a"] != 0, apart["b"] != 0)


def test_dare_ties_elects_among_what_was_drawn():
    members, base = [of(3.0, 1.0), of(-1.0, 2.0)], of(0.0, 0.0)
    assert averages.dare_ties(members, base, density=1.0)[0]["w"].tolist() == [3.0, 1.5]
    assert averages.dare(members, base, density=1.0)[0]["w"].tolist() == [1.0, 1.5]


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_goes_along_the_circle(t):
    """Unit vectors at 0 and 120 degrees: the point at t has the angle 120 t, and norm 1."""
    angle = math.radians(120)
    state, shares = averages.slerp([of(1.0, 0.0), of(math.cos(angle), math.sin(angle))], t)
    assert state["w"].tolist() == pytest.approx([math.cos(t * angle), math.sin(t * angle)], abs=1e-6)
    assert shares == (1 - t, t)


def test_slerp_of_nearly_parallel_and_zero_tensors_is_a_line():
    close = [of(1.0, 0.0), of(1.0, 1e-4)]
    assert averages.slerp(close)[0]["w"].tolist() == pytest.approx([1.0, 5e-5])
    assert averages.slerp([of(0.0, 0.0), of(2.0, 4.0)], 0.25)[0]["w"].tolist() == [0.5, 1.0]
