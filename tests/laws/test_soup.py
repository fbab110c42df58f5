"""Laws of averages: exact against float64 in every dtype, zeros and shared entries kept, wrong members refused."""

import itertools

import pytest
import torch
from torch import nn

from prunus.masks import Masks
from prunus.recipe import Soup
from prunus.recipe.names import averages
from prunus.soup.average import average, average_and_reprune, check_weights, greedy, greedy_members, learn_weights, mix
from prunus.train.train import classification_loss

SHAPES = {"0.weight": (8, 6), "0.bias": (8,), "1.running_mean": (8,), "3.weight": (3, 8)}


def members(count, *, dtype=torch.float32, seed=0, masks=None):
    """State dicts of the shapes above, each with a counter of its own."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for place in range(count):
        state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        for name, mask in (masks or {}).items():
            state[name].masked_fill_(~mask, 0.0)
        states.append({**state, "1.num_batches_tracked": torch.tensor(10 + place)})
    return states


def some_masks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(48, generator=generator).argsort()
    mask = torch.zeros(48, dtype=torch.bool)
    mask[order[:20]] = True
    return Masks({"0.weight": mask.view(8, 6)})


@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.3), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_that_of_float64(dtype, weights):
    states = members(3, dtype=dtype)
    mean = average(states, weights)
    assert list(mean) == list(states[0])
    for name in SHAPES:
        exact = sum(w * s[name].double() for w, s in zip(weights or (1 / 3,) * 3, states, strict=True))
        assert mean[name].dtype == dtype
        assert mean[name].shape == SHAPES[name]
        slack = 2 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 4 * torch.finfo(dtype).eps
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() if dtype.itemsize < 4 else 0.0
        assert ((mean[name].double() - exact).abs() <= slack * 4 + rounding).all()


def test_sixteen_bit_members_are_summed_in_float32():
    """Added up in float16, 2048 ones would stop growing at the fourth digit."""
    states = [{"w": torch.full((4,), 1.0 + place % 2 * 2**-10, dtype=torch.float16)} for place in range(64)]
    assert average(states)["w"].double().sub(1 + 2**-11).abs().max() <= 2**-11
    many = [{"w": torch.full((4,), 60000.0, dtype=torch.float16)} for _ in range(8)]
    assert (average(many)["w"] == 60000).all()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_mean_of_equal_members_is_the_member_bit_for_bit(count):
    state = members(1)[0]
    state["3.weight"][0, :2] = torch.tensor([-torch.inf, torch.inf])
    mean = average([{name: tensor.clone() for name, tensor in state.items()} for _ in range(count)])
    assert all(torch.equal(mean[name], state[name]) for name in state)
    assert all(mean[name].data_ptr() != state[name].data_ptr() for name in state)


def test_not_a_number_is_not_hidden():
    states = members(2)
    states[1]["0.bias"][3] = torch.nan
    assert average(states)["0.bias"].isnan().tolist() == [False] * 3 + [True] + [False] * 4


def test_order_does_not_matter_beyond_rounding():
    states = members(4)
    ways = [average([states[place] for place in order]) for order in itertools.permutations(range(4))]
    for way in ways:
        torch.testing.assert_close(way["0.weight"], ways[0]["0.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_are_positive(dtype):
    masks = some_masks()
    states = members(3, dtype=dtype, masks=masks)
    for state in states:
        state["0.weight"] = torch.where(masks["0.weight"], state["0.weight"], -0.0)
    mean = average(states, masks=[masks] * 3)["0.weight"]
    assert ((mean == 0) == ~masks["0.weight"]).all()
    assert not mean.masked_select(~masks["0.weight"]).signbit().any()
    assert not average(states[:1])["0.weight"].masked_select(~masks["0.weight"]).signbit().any()


def test_counters_are_the_first_members_and_other_integers_must_agree():
    states = members(3)
    assert average(states)["1.num_batches_tracked"] == 10
    for state in states:
        state["codes"] = torch.arange(4)
    assert average(states)["codes"].tolist() == [0, 1, 2, 3]
    states[2]["codes"] = torch.arange(4).flip(0)
    with pytest.raises(ValueError, match=r"'codes' is stored as torch.int64 and differs between members 0 and 2"):
        average(states)


def test_members_that_do_not_fit_are_refused():
    states = members(3)
    del states[2]["0.bias"]
    with pytest.raises(ValueError, match=r"member 2 has 4 tensors .* lacks 1 .* first '0.bias'"):
        average(states)
    states = members(2)
    states[1]["0.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"'0.bias' is \(8,\) torch.float32 in member 0 and \(9,\)"):
        average(states)
    states[1]["0.bias"] = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'0.bias'.*bfloat16 in member 1"):
        average(states)
    with pytest.raises(ValueError, match="at least one member"):
        average([])


@pytest.mark.parametrize("weights", [(0.5, 0.4), (1.5, -0.5), (float("nan"), 1.0), (1.0,), (0.2, 0.3, 0.5)])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        check_weights(weights, 2)


def test_masks_that_differ_are_refused_with_the_first_name_and_the_counts():
    one, other = some_masks(0), some_masks(1)
    states = [members(1, masks=one)[0], members(1, masks=other)[0]]
    differ = int((one["0.weight"] != other["0.weight"]).sum())
    with pytest.raises(
        ValueError, match=rf"'0.weight' differ: member 0 keeps 20 of 48 .* member 1 keeps 20, .* on {differ}; "
    ):
        average(states, masks=[one, other])
    extra = Masks({**one, "3.weight": torch.ones(3, 8, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'3.weight' has a mask in member 1 only"):
        average(members(2, masks=one), masks=[one, extra])
    with pytest.raises(ValueError, match="1 masks for 2 members"):
        average(states, masks=[one])


def test_a_member_that_left_its_mask_is_refused():
    masks = some_masks()
    states = members(2, masks=masks)
    states[1]["0.weight"][~masks["0.weight"]] = 1e-8
    with pytest.raises(ValueError, match=r"'0.weight' of member 1 has 28 nonzero weights under its mask"):
        average(states, masks=[masks, masks])


def test_pruning_again_restores_the_count_and_keeps_the_largest():
    one, other = some_masks(0), some_masks(1)
    states = [members(1, masks=one)[0], members(1, masks=other, seed=1)[0]]
    mean = average(states)["0.weight"]
    assert int((mean != 0).sum()) > 20
    state, masks = average_and_reprune(states, [one, other])
    assert masks.table() == {"0.weight": (20, 48)}
    assert torch.equal(state["0.weight"], mean * masks["0.weight"])
    assert mean.abs()[masks["0.weight"]].min() >= mean.abs()[~masks["0.weight"]].max()
    assert torch.equal(state["3.weight"], average(states)["3.weight"])


def test_equal_masks_are_found_again():
    masks = some_masks()
    assert average_and_reprune(members(3, masks=masks), [masks] * 3)[1] == masks


def test_pruning_again_needs_one_sparsity():
    masks, fewer = some_masks(), Masks({"0.weight": torch.zeros(8, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match="member 1 keeps 0 entries of 1 parameters, member 0 20"):
        average_and_reprune([members(1, masks=masks)[0], members(1, masks=fewer)[0]], [masks, fewer])


def test_greedy_against_every_subset():
    """On a toy whose best soup takes all good members, greedy finds it; it is never worse than the best single."""
    target = torch.tensor([1.0, -2.0, 0.5])
    generator = torch.Generator().manual_seed(3)
    for trial in range(20):
        states = [{"w": target + torch.randn(3, generator=generator)} for _ in range(5)]

        def score(state):
            return -float((state["w"] - target).square().sum())

        subsets = [c for size in range(1, 6) for c in itertools.combinations(range(5), size)]
        table = {c: score(average([states[i] for i in c])) for c in subsets}
        chosen, state = greedy(states, score)
        assert chosen.score == pytest.approx(table[tuple(sorted(chosen.members))], abs=1e-5), trial
        assert max(table[(i,)] for i in range(5)) - 1e-6 <= chosen.score <= max(table.values()) + 1e-6
        torch.testing.assert_close(state["w"], average([states[i] for i in chosen.members])["w"])
        assert chosen.score == score(state)
        assert walk(table) == set(chosen.members)


def walk(table):
    """The greedy recipe over a table of all subsets, written the long way."""
    order = sorted((c[0] for c in table if len(c) == 1), key=lambda i: (-table[(i,)], i))
    chosen = {order[0]}
    for place in order[1:]:
        if table[tuple(sorted(chosen | {place}))] >= table[tuple(sorted(chosen))]:
            chosen.add(place)
    return chosen


def test_greedy_takes_what_does_not_harm_and_calls_little():
    calls = []

    def score(chosen):
        calls.append(chosen)
        return {1: 0.5, 2: 0.5}.get(len(chosen), 0.4)

    found = greedy_members(3, score)
    assert found.members == (0, 1)  # equal is accepted, worse is not; ties by place
    assert calls == [(0,), (1,), (2,), (0, 1), (0, 1, 2)]


def test_the_state_is_that_of_the_members_taken_on_ties_too():
    states = members(3)
    chosen, state = greedy(states, lambda _: 0.5)
    assert chosen.members == (0, 1, 2)
    assert torch.equal(state["0.weight"], average(states)["0.weight"])


def test_a_score_that_is_nan_is_the_worst():
    found = greedy_members(3, lambda chosen: float("nan") if 0 in chosen else 0.1 * chosen[0])
    assert (found.members, found.score) == ((2, 1), 0.2)
    with pytest.raises(ValueError, match="at least one"):
        greedy_members(0, lambda _: 0.0)


def test_what_the_score_recalibrated_stays_in_the_soup():
    states = members(2)

    def score(state):
        state["1.running_mean"].fill_(7.0)
        return 0.0

    assert (greedy(states, score)[1]["1.running_mean"] == 7).all()
    assert not (states[0]["1.running_mean"] == 7).any()


def make_model(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


@pytest.mark.parametrize("training", [True, False])
def test_learned_weights_follow_the_gradient(training):
    """One step of plain Adam moves each logit by lr against the sign of the finite difference of the loss."""
    model = make_model(9).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [make_model(seed).state_dict() for seed in range(3)]
    loss = classification_loss()

    def value(logits):
        mixed = make_model(0).train(training)
        mixed.load_state_dict(average(states, logits.softmax(0).tolist()))
        with torch.no_grad():
            return float(loss(mixed, batches(0)))

    slopes = torch.tensor([value(e * 1e-2) - value(e * -1e-2) for e in torch.eye(3, dtype=torch.float64)])
    learned = torch.tensor(learn_weights(states, model, batches, loss, steps=1, lr=0.1), dtype=torch.float64)
    expected = (-0.1 * slopes.sign().double()).softmax(0)
    torch.testing.assert_close(learned, expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_learned_weights_find_the_good_member():
    good, bad = make_model(0), make_model(1)
    teacher = make_model(0).eval()

    def taught(step):
        x = batches(step)[0]
        with torch.no_grad():
            return x, teacher(x).argmax(1)

    weights = learn_weights([bad.state_dict(), good.state_dict()], bad.eval(), taught, classification_loss(), steps=40)
    assert weights[1] > 0.8
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="at least 1 step"):
        learn_weights([good.state_dict()], good, taught, classification_loss(), steps=0)


def test_learned_weights_draw_from_a_seed_of_their_own():
    states = [make_model(seed).state_dict() for seed in range(3)]
    model = make_model(0)
    model[2] = nn.Dropout()
    before = torch.get_rng_state()

    def learned(seed):
        return learn_weights(states, model, batches, classification_loss(), steps=2, seed=seed)

    first = learned(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # what was drawn before changes nothing
    assert learned(0) == first != learned(1)


def test_mixing_extrapolates():
    a, b = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([3.0, 0.0, 4.0])
    assert mix([a, b], [2.0, -1.0]).tolist() == [-1.0, 0.0, 4.0]


def test_a_large_member_of_small_weight_drowns_nobody():
    """Sums are taken about the heaviest member: about the first, 1e8 - 1e8 would leave a multiple of 8."""
    found = mix([torch.tensor([1e8]), torch.tensor([1.0])], [1e-8, 1 - 1e-8])
    assert float(found) == pytest.approx(2, rel=1e-6)


FREE = [name for name in averages.members() if not averages.knows(name, "held")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FREE)
def test_every_average_keeps_zeros_dtypes_and_what_members_agree_on(name, dtype):
    masks = some_masks()
    base, *states = members(3 if name == "slerp" else 4, dtype=dtype, masks=masks)
    before = [{key: value.clone() for key, value in state.items()} for state in states]
    state, shares = averages.make(name, states, base=base)
    pruned = state["0.weight"][~masks["0.weight"]]
    assert not pruned.any()
    assert not pruned.signbit().any()
    assert [(key, value.dtype, value.shape) for key, value in state.items()] == [
        (key, value.dtype, value.shape) for key, value in base.items()
    ]
    assert sum(shares) == pytest.approx(1)
    torch.testing.assert_close(state["1.running_mean"], average(states)["1.running_mean"])  # a statistic is no task
    assert all(
        torch.equal(value, old[key]) for new, old in zip(states, before, strict=True) for key, value in new.items()
    )
    alone, _ = averages.make(name, [base, base], base=base)
    assert all(torch.equal(value, base[key]) for key, value in alone.items())


@pytest.mark.parametrize(
    ("choice", "count", "message"),
    [
        ({"ties": {"density": 0.0}}, 2, r"density is the share.*got 0\.0"),
        ({"dare": {"density": 1.5}}, 2, r"density is the share.*got 1\.5"),
        ("slerp", 3, "slerp is of 2 members.*got 3"),
        ({"slerp": {"t": 2}}, 2, r"slerp is of 2 members, with t in \[0, 1\]"),
    ],
)
def test_averages_that_cannot_be_are_refused_with_the_recipe(choice, count, message):
    with pytest.raises(ValueError, match=message):
        Soup(members=count, average=choice)
    with pytest.raises(ValueError, match=message):
        Soup(members=count, also=[choice])
