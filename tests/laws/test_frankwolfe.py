"""Laws of SFW: it is the textbook's step, stays feasible, and is an ordinary optimizer."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from prunus.frankwolfe.constrained import KeptGradients, constrained_groups
from prunus.frankwolfe.sets import (
    Groups,
    Initial,
    Radius,
    Spectrum,
    group_k_support,
    k_sparse,
    k_support,
    lp,
    nuclear,
    spectral_k_sparse,
    spectral_k_support,
)
from prunus.frankwolfe.sfw import SFW
from prunus.masks import Masks
from prunus.train.train import classification_loss, train
from tests.conftest import unwaited

BALLS = [lp(1), lp(2), lp(float("inf")), lp(3), k_sparse(0.3), k_support(0.3), group_k_support(0.5)]
SPECTRAL = [nuclear(), spectral_k_sparse(2), spectral_k_support(2)]
RESCALES = ["none", "diameter", "gradient", "fast_gradient"]
SHAPES = [(4, 3, 2, 2), (4, 12), (6,), (6,), (4, 3, 2, 2), (12,)]


def tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients_(parameters, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def textbook(ball, parameters, steps, *, lr, rescale, momentum=0.9, dampening=0.0, joint=False):
    """One tensor (or one list, jointly) after the other, in plain Python numbers."""
    points = [[p.detach().clone()] for p in parameters]
    points = [[each for (each,) in points]] if joint else points
    moments = None
    for step in range(steps):
        gradients_(parameters, step)
        given = [[p.grad.clone()] for p in parameters]
        given = [[each for (each,) in given]] if joint else given
        if moments is None:
            moments = given
        else:
            moments = [
                [momentum * m + (1 - dampening) * g for m, g in zip(ms, gs, strict=True)]
                for ms, gs in zip(moments, given, strict=True)
            ]
        for xs, ms in zip(points, moments, strict=True):
            vs = ball.lmo(ms)
            length = sum(float(m.square().sum()) for m in ms) ** 0.5
            apart = sum(float((x - v).square().sum()) for x, v in zip(xs, vs, strict=True)) ** 0.5
            diameter = ball.diameter(*[x.shape for x in xs])
            factor = {"none": 1, "diameter": 1 / diameter, "gradient": length / max(apart, 1e-30)}
            share = min(max(factor.get(rescale, length / (diameter / 2)) * lr, 0), 1)
            for x, v in zip(xs, vs, strict=True):
                x.copy_((1 - share) * x + share * v)
    return [x for xs in points for x in xs]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: str(ball.gauge))
def test_the_step_is_the_textbooks(ball, rescale, joint):
    ball = Radius(1.5).fit(ball, [], [])
    parameters = tensors()
    expected = textbook(ball, tensors(), 6, lr=0.05, rescale=rescale, joint=joint)
    optimizer = SFW(parameters, lr=0.05, constraint=ball, rescale=rescale, joint=joint)
    for step in range(6):
        gradients_(parameters, step)
        optimizer.step()
    for found, wanted in zip(parameters, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("ball", SPECTRAL, ids=lambda ball: str(ball.gauge))
def test_spectral_steps_with_many_iterations_are_the_textbooks(ball):
    parameters = [p for p in tensors() if p.ndim > 1]
    expected = textbook(ball, [p for p in tensors() if p.ndim > 1], 5, lr=0.05, rescale="diameter")
    optimizer = SFW(parameters, lr=0.05, constraint=ball, rescale="diameter", iterations=200)
    for step in range(5):
        gradients_(parameters, step)
        optimizer.step()
    for found, wanted in zip(parameters, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-3)


def test_dampening_averages():
    parameters, ball = tensors(), k_support(0.3, radius=1.5)
    expected = textbook(ball, tensors(), 6, lr=0.05, rescale="fast_gradient", momentum=0.8, dampening=0.8)
    optimizer = SFW(parameters, 0.05, constraint=ball, rescale="fast_gradient", momentum=0.8, dampening=0.8)
    for step in range(6):
        gradients_(parameters, step)
        optimizer.step()
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ball", [*BALLS, *SPECTRAL], ids=lambda ball: f"{ball.gauge}{type(ball.seen).__name__}")
def test_hundreds_of_steps_stay_feasible(ball, joint):
    """With large steps, every size and a vanishing gradient now and then."""
    ball = Radius(0.7).fit(ball, [], [])
    parameters = tensors()[:4]
    optimizer = SFW(parameters, lr=0.3, constraint=ball, joint=joint, rescale="gradient")
    optimizer.start_()
    for step in range(300):
        if step % 12 == 0:
            gradients_(parameters, step)
        if step % 120 == 119:
            for parameter in parameters:
                parameter.grad.zero_()
        optimizer.step()
        if step % 30 == 29:
            norms = [ball.norm(parameters)] if joint else [ball.norm(parameter.detach()) for parameter in parameters]
            assert all(float(norm) <= 0.7 * (1 + 3e-5) for norm in norms)
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


def test_the_start_moves_only_what_is_outside():
    parameters = tensors()
    before = [p.detach().clone() for p in parameters]
    ball = k_support(0.3, radius=6.0)
    SFW(parameters, 0.1, constraint=ball).start_()
    moved = [not torch.equal(one, other) for one, other in zip(before, parameters, strict=True)]
    assert moved == [float(ball.norm(x)) > 6 for x in before]
    assert any(moved)
    assert not all(moved)


def test_minimising_a_quadratic_reaches_the_best_feasible_point():
    """min ||x - a||^2 over the set is the projection of a; and the gap is then small."""
    target = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 2
    for ball in (lp(1, 2.0), k_support(4, 2.0), k_sparse(4, 0.8), group_k_support(4, 2.0)):
        x = nn.Parameter(torch.zeros(20))
        optimizer = SFW([x], lr=1.0, constraint=ball, momentum=0.0)
        for step in range(2000):
            x.grad = 2 * (x.detach() - target)
            optimizer.param_groups[0]["lr"] = 2 / (step + 2)
            optimizer.step()
        assert torch.allclose(x, ball.project(target), atol=2e-2)
        x.grad = 2 * (x.detach() - target)
        (gap,) = optimizer.gaps()
        assert 0 <= float(gap) < 0.1


def test_gaps_are_known_when_gradients_are_gone():
    """As after `train`, which sets them to None."""
    optimizer = SFW([x := nn.Parameter(torch.arange(6.0))], lr=0.1, constraint=k_support(2))
    assert optimizer.gaps() == []
    optimizer.start_()
    x.grad = torch.arange(6.0).cos()
    optimizer.step()
    before = optimizer.gaps()
    optimizer.zero_grad()
    assert optimizer.gaps() == before != []


# Groups, gradients, states.


def test_a_group_without_constraint_is_sgd():
    for options in ({}, {"momentum": 0.0}, {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.5}):
        ours, theirs = tensors(), tensors()
        optimizers = [SFW(ours, 0.1, **options), torch.optim.SGD(theirs, 0.1, **({"momentum": 0.9} | options))]
        for step in range(5):
            for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
                gradients_(parameters, step)
                optimizer.step()
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, theirs, strict=True))


def test_decoupled_decay_is_that_of_adamw():
    """x <- (1 - lr decay) x - lr m, whatever the momentum."""
    (x,) = [nn.Parameter(torch.ones(3))]
    optimizer = SFW([x], 0.1, momentum=0.9, decoupled_decay=0.5)
    for _ in range(2):
        x.grad = torch.zeros(3)
        optimizer.step()
    assert torch.allclose(x, torch.full((3,), 0.95**2))


def test_groups_do_as_they_would_alone():
    one, other = tensors()[:2], tensors()[2:]
    alone, together = copy.deepcopy((one, other)), (one, other)
    groups = [{"params": one, "constraint": k_support(3)}, {"params": other, "constraint": None, "momentum": 0.5}]
    runs = [([SFW(groups, 0.1)], together)]
    runs += [([SFW(alone[0], 0.1, constraint=k_support(3)), SFW(alone[1], 0.1, momentum=0.5)], alone)]
    for optimizers, parameters in runs:
        for step in range(3):
            for part in parameters:
                gradients_(part, step)
            for optimizer in optimizers:
                optimizer.step()
    for found, wanted in zip(itertools.chain(*together), itertools.chain(*alone), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("ball", [k_support(3), spectral_k_support(1)])
def test_parameters_without_gradients_stay_and_do_not_shift_the_others(ball):
    balls = [Radius(0.5 + place).fit(ball, [], []) for place in range(3)]
    whole, missing = [[p for p in tensors() if p.ndim > 1] for _ in range(2)]
    options = {"constraint": balls, "iterations": 100}
    runs = [SFW(whole, 0.1, **options), SFW(missing, 0.1, **options)]
    for step in range(4):
        for parameters, optimizer in zip((whole, missing), runs, strict=True):
            gradients_(parameters, step)
            if parameters is missing and step % 2 == 0:
                parameters[0].grad = None
            optimizer.step()
        if step == 0:
            assert torch.equal(missing[0], tensors()[0])
    assert not torch.equal(whole[0], missing[0])
    assert torch.allclose(whole[1], missing[1], atol=1e-5)
    assert torch.allclose(whole[2], missing[2], atol=1e-5)


def test_tensors_of_one_size_may_be_in_different_sets():
    """Each list of balls, of several kinds, does what an optimizer for each parameter does."""
    balls = [k_support(3, 1.5), k_sparse(3, 0.5), lp(2, 1.5), k_support(2, 1.5)]
    ours, theirs = ([nn.Parameter(random) for random in torch.randn(4, 12, generator=seed)] for seed in seeds(2))
    optimizers = [SFW([x], 0.1, constraint=ball) for x, ball in zip(theirs, balls, strict=True)]
    optimizers.append(SFW(ours, 0.1, constraint=balls))
    for step in range(3):
        gradients_(ours, step)
        gradients_(theirs, step)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def seeds(count):
    return [torch.Generator().manual_seed(0) for _ in range(count)]


def test_singular_vectors_are_followed_from_step_to_step():
    """One iteration a step comes to the exact vertex while the gradient stays, which none from the start would."""
    x = nn.Parameter(torch.zeros(40, 90))
    gradient = torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    optimizer, worth = SFW([x], 1.0, constraint=nuclear(), momentum=0.0), []
    for _ in range(60):
        x.grad = gradient
        optimizer.step()  # at rate 1, x is the vertex
        worth.append(-float((gradient * x.detach()).sum()))
    exact = float(torch.linalg.svdvals(gradient)[0])
    assert worth[0] < 0.995 * exact
    assert worth[-1] > 0.999 * exact


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ball", [*BALLS, *SPECTRAL], ids=lambda ball: f"{ball.gauge}{type(ball.seen).__name__}")
def test_the_order_in_memory_does_not_matter(ball, joint):
    """Filters lie channels-last on a GPU; gradients may lie otherwise than their parameters."""
    layouts = [
        (torch.contiguous_format,) * 2,
        (torch.channels_last,) * 2,
        (torch.channels_last, torch.contiguous_format),
    ]
    found = []
    for weights, gradients in layouts:
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 4, 3, 3), (6, 4, 3, 3), (5, 2, 3, 3)]
        start = [torch.randn(shape, generator=generator).to(memory_format=weights) for shape in shapes]
        parameters = [nn.Parameter(each) for each in start]
        optimizer = SFW(parameters, 0.05, constraint=ball, joint=joint, rescale="gradient", iterations=100)
        for _ in range(4):
            for parameter in parameters:
                # Clear of ties, and of singular values that lie close together.
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(memory_format=gradients)
            optimizer.step()
        assert all(each.is_contiguous(memory_format=weights) for each in parameters)
        found.append([parameter.detach() for parameter in parameters])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.allclose(one, two, atol=1e-2 if isinstance(ball.seen, Spectrum) else 1e-5)


def test_nothing_happens_without_gradients():
    parameters = tensors()
    optimizer = SFW(parameters, 0.1, constraint=k_support(2))
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, tensors(), strict=True))


@pytest.mark.parametrize("ball", [k_support(0.3), spectral_k_sparse(2)])
def test_the_rate_may_be_a_tensor(ball):
    ours, theirs = tensors()[:2], tensors()[:2]
    for parameters, lr in ((ours, 0.1), (theirs, torch.tensor(0.1))):
        optimizer = SFW(
            [{"params": parameters[:1], "constraint": ball}, {"params": parameters[1:]}], lr, decoupled_decay=0.0
        )
        for step in range(3):
            gradients_(parameters, step)
            optimizer.step()
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ball", [k_support(0.3), spectral_k_support(2)])
def test_a_state_dict_goes_on_with_the_same_bits(ball, dtype):
    whole, split = [[p for p in tensors(dtype=dtype) if p.ndim > 1] for _ in range(2)]
    optimizer = SFW(whole, 0.1, constraint=ball)
    for step in range(6):
        gradients_(whole, step)
        optimizer.step()
    left = optimizer.left()
    optimizer = SFW(split, 0.1, constraint=ball)
    for step in range(3):
        gradients_(split, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert "constraint" not in state["param_groups"][0]
    optimizer = SFW(split, 0.7, constraint=ball)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["constraint"] is ball
    assert optimizer.param_groups[0]["lr"] == 0.1
    for step in range(3, 6):
        gradients_(split, step)
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(whole, split, strict=True))
    assert optimizer.left() == left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    parameters = tensors(dtype=dtype)
    optimizer = SFW(
        [{"params": parameters[:2], "constraint": spectral_k_support(2)}, {"params": parameters[2:]}],
        0.1,
        constraint=k_support(0.5),
    )
    for step in range(3):
        gradients_(parameters, step)
        optimizer.step()
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in parameters)
    wanted = tensors()
    exact = SFW(
        [{"params": wanted[:2], "constraint": spectral_k_support(2)}, {"params": wanted[2:]}],
        0.1,
        constraint=k_support(0.5),
    )
    for step in range(3):
        gradients_(wanted, step)
        exact.step()
    for found, right in zip(parameters, wanted, strict=True):
        assert torch.allclose(found.float(), right, atol=0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": "speed"}, "rescale is one of none, diameter"),
        ({"lr": -0.1}, "lr is at least 0; got -0.1"),
        ({"weight_decay": torch.nan}, "weight_decay is at least 0; got nan"),
        ({"momentum": 1.0}, r"momentum lies in \[0, 1\)"),
        ({"constraint": k_support(2), "weight_decay": 0.1}, "takes no weight decay"),
        ({"constraint": [k_support(2)], "joint": True}, "joint=True needs one Ball"),
        ({"constraint": [k_support(2)]}, "1 balls for 6 parameters"),
        ({"iterations": 0}, "at least 1"),
        ({"constraint": group_k_support(1, groups=Groups(4))}, "do not divide"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SFW(tensors(), **{"lr": 0.1, **options})


# With the training loop.


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6), nn.Linear(6, 2)
        )


def batches(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 1, 6, 6, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def run(model, optimizer, steps=40, **options):
    return train(model, batches, optimizer, lambda t: 1 - t / 40, steps=steps, loss=classification_loss(), **options)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ball", [k_support(0.3), group_k_support(0.5), spectral_k_support(0.5)])
def test_a_network_learns_inside_its_sets(ball, joint):
    model = make_model()
    optimizer = SFW(constrained_groups(model, ball, Initial(5.0), joint=joint), 0.1, rescale="fast_gradient")
    optimizer.start_()
    losses = run(model, optimizer).losses
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8
    for group in optimizer.param_groups:
        given = group["constraint"]
        pairs = [(given, group["params"])] if joint else zip(given, group["params"], strict=True)
        assert all(
            float(b.norm([q.detach() for q in ([p] if not joint else p)])) <= b.radius * 1.0001 for b, p in pairs
        )


def test_groups_of_the_papers():
    """Entries: everything, each by its own norm: a BatchNorm's weight and bias share a shape and nothing else."""
    model = make_model()
    (group,) = constrained_groups(model, k_support(0.3), Initial(3.0))
    radii = dict(
        zip([name for name, _ in model.named_parameters()], [b.radius for b in group["constraint"]], strict=True)
    )
    assert radii["1.weight"] == pytest.approx(3 * 8**0.5)
    assert radii["1.bias"] == pytest.approx(3)
    assert radii["0.weight"] == pytest.approx(3 * (8 / 3) ** 0.5)
    first, second = constrained_groups(model, nuclear(), Radius(2.0), rest="free")
    assert [p.ndim for p in first["params"]] == [4, 2, 2]
    assert second["constraint"] is None
    assert [p.ndim for p in second["params"]] == [1] * 5
    with pytest.raises(ValueError, match=r"no parameter '4\.wieght', which `only` names"):
        constrained_groups(model, nuclear(), Radius(2.0), only=["0.weight", "4.wieght"])
    measured = constrained_groups(model, k_support(0.3), Initial(3.0), norms="measured")[0]["constraint"][0]
    assert measured.radius == pytest.approx(3 * float(model[0].weight.detach().norm()))


@pytest.mark.parametrize("ball", [k_support(0.3), spectral_k_support(0.5)])
def test_masks_hold_and_nothing_is_spent_on_what_is_pruned(ball):
    model = make_model()
    masks = Masks({"4.weight": torch.rand(6, 128, generator=torch.Generator().manual_seed(1)) > 0.7})
    optimizer = SFW(constrained_groups(model, ball, Initial(5.0)), 0.1, rescale="fast_gradient")
    run(model, optimizer, masks=masks, during=[KeptGradients(masks)])
    masks.check(model)
    buffer = optimizer.state[model[4].weight]["momentum_buffer"]
    assert not buffer[~masks["4.weight"]].any()
    weight = model[4].weight
    weight.grad = torch.where(masks["4.weight"], 1e-3, 1e3)
    kept = KeptGradients(masks)
    kept.attach(model, optimizer, None)
    kept.gradients()
    assert torch.equal(weight.grad, masks["4.weight"] * torch.tensor(1e-3))
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    KeptGradients(Masks({"b.weight": torch.ones(2, 2, dtype=torch.bool)})).attach(tied, optimizer, None)
    with pytest.raises(ValueError, match="no parameter 'x'"):
        run(model, optimizer, during=[KeptGradients(Masks({"x": torch.ones(1, dtype=torch.bool)}))])


def test_a_killed_run_goes_on(tmp_path):
    states = []
    for kill in (None, 12):
        model = make_model()
        path = tmp_path / f"{kill}.pt"
        for _ in range(1 if kill is None else 2):

            def stop(done, _loss, kill=kill, path=path):
                if done == kill and not path.with_suffix(".seen").exists():
                    path.with_suffix(".seen").touch()
                    raise KeyboardInterrupt

            optimizer = SFW(constrained_groups(model, spectral_k_support(0.5), Initial(5.0)), 0.1)
            try:
                run(model, optimizer, steps=20, checkpoint=path, save_seconds=0, report_every=4, on_step=stop)
            except KeyboardInterrupt:
                model = make_model()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ball", [k_support(0.3), k_support(0.05), k_sparse(0.1), group_k_support(0.2)], ids=str)
def test_large_layers_with_ties_move_on_a_gpu_as_on_a_cpu(ball, layout):
    """Large enough for the ways in which a GPU selects and sums along rows; alike, so that they are stacked.

    The CPU computes in float64: its norm of a million float32 numbers is off by 3e-5, a GPU's by far less.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (512, 256, 3, 3)
    weights = [0.02 * torch.randn(shape, generator=generator) for _ in range(3)]
    gradients = [torch.randint(-8, 9, shape, generator=generator) / 64 for _ in range(3)]
    ends = []
    for place in ({"device": "cpu", "dtype": torch.float64}, {"device": "cuda"}):
        parameters = [nn.Parameter(each.to(**place, copy=True, memory_format=layout)) for each in weights]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(**place, memory_format=layout)
        optimizer = SFW(parameters, 0.1, constraint=replace(ball, radius=40.0), rescale="fast_gradient")
        for _ in range(2):
            optimizer.step()
        ends.append([parameter.detach().cpu().float() for parameter in parameters])
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ball", [*BALLS, *SPECTRAL], ids=lambda ball: f"{ball.gauge}{type(ball.seen).__name__}")
def test_a_step_never_waits_for_the_gpu_and_can_be_captured(ball, joint):
    ends = []
    for capture in (False, True):
        model = make_model().cuda()
        groups = constrained_groups(model, ball, Initial(5.0), joint=joint)
        optimizer = SFW(groups, 0.1, rescale="fast_gradient", capturable=True)
        optimizer.start_()
        trace = train(
            model,
            lambda step: tuple(part.cuda() for part in batches(step)),
            optimizer,
            lambda t: 1 - t / 40,
            steps=20,
            loss=classification_loss(),
            capture=capture,
        )
        ends.append(trace.losses[-1])
        if not capture:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with unwaited():
                optimizer.step()
    assert ends[0] == pytest.approx(ends[1], abs=1e-3)
