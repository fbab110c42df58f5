"""Laws of proximal SGD and of the penalties."""

import doctest

import pytest
import torch
from torch import nn

from prunus.frankwolfe import proximal
from prunus.frankwolfe.proximal import (
    GroupLasso,
    NuclearNorm,
    NuclearSteps,
    ProximalSGD,
    shrink_groups,
    shrink_singular_values,
)
from prunus.frankwolfe.sets import Ball, Groups, Lp, Spectrum
from prunus.masks import Masks
from prunus.train.train import classification_loss, train


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shrink", "ball"),
    [(shrink_singular_values, Ball(Lp(1), Spectrum())), (shrink_groups, Ball(Lp(1), Groups()))],
)
def test_proximal_steps_are_certified_by_duality(shrink, ball):
    """p = prox_t(x) iff x - p has dual norm at most t and <x - p, p> = t norm(p)."""
    x = random(5, 7)
    for t in (0.3, 1.5, 100.0):
        p = shrink(x, t)
        dual = -float(((x - p) * ball.lmo(x - p)).sum())
        assert dual <= t * (1 + 1e-5)
        assert float(((x - p) * p).sum()) == pytest.approx(t * float(ball.norm(p)), rel=1e-4, abs=1e-4)
    assert not shrink(x, 100.0).any()
    assert torch.allclose(shrink(x, 0.0), x, atol=1e-5)


@pytest.mark.parametrize("kind", ["nuclear", "groups"])
def test_a_step_is_that_of_sgd_and_then_the_proximal_one(kind):
    shapes = [(4, 3, 2, 2), (4, 12), (6,), (4, 3, 2, 2)]
    ours, theirs = ([nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)] for _ in range(2))
    prox = ProximalSGD(ours, 0.1, proximal=kind, strength=0.5, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD(theirs, 0.1, momentum=0.9, weight_decay=0.01)
    shrink = shrink_singular_values if kind == "nuclear" else shrink_groups
    for step in range(4):
        for parameters in (ours, theirs):
            for place, parameter in enumerate(parameters):
                parameter.grad = random(*parameter.shape, seed=100 * step + place)
        prox.step()
        sgd.step()
        with torch.no_grad():
            for parameter in theirs:
                if parameter.ndim > 1:
                    parameter.copy_(shrink(parameter.flatten(1), 0.1 * 0.5).view(parameter.shape))
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shrink", [shrink_singular_values, shrink_groups])
def test_float64_is_not_rounded(shrink):
    x = random(5, 7).double()
    p, u = shrink(x, 0.5), torch.linalg.svd(x, full_matrices=False)
    rows = x * (1 - 0.5 / x.norm(dim=1, keepdim=True)).clamp_min(0)
    expected = rows if shrink is shrink_groups else u[0] * (u[1] - 0.5).clamp_min(0) @ u[2]
    assert torch.allclose(p, expected, rtol=0, atol=1e-13)


def test_the_rate_may_be_a_tensor_and_gradients_may_be_missing():
    ours, theirs = ([nn.Parameter(random(4, 3)), nn.Parameter(random(3))] for _ in range(2))
    for parameters, lr in ((ours, 0.1), (theirs, torch.tensor(0.1))):
        parameters[0].grad = random(4, 3, seed=1)
        ProximalSGD(parameters, lr, proximal="groups", strength=0.5, capturable=True).step()
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], random(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_follow_the_rate():
    """In float32, while the rate and with it the threshold fall: nothing of the first step stays in the graph."""
    ends = []
    for capture in (False, True):
        model = make_model().cuda()
        optimizer = ProximalSGD(model.parameters(), 0.1, proximal="groups", strength=0.1, capturable=True)
        trace = train(
            model,
            lambda step: tuple(part.cuda() for part in batches(step)),
            optimizer,
            lambda t: 1 - t / 20,
            steps=20,
            loss=classification_loss(),
            capture=capture,
        )
        ends.append((trace.losses[-1], [parameter.detach().clone() for parameter in model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-3)
    assert all(torch.allclose(one, other, atol=1e-3) for one, other in zip(ends[0][1], ends[1][1], strict=True))


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2)
        )


def batches(step):
    x = random(32, 1, 6, 6, seed=step)
    return x, (x.mean((1, 2, 3)) > 0).long()


def run(model, optimizer=None, steps=80, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    return train(model, batches, optimizer, lambda _: 1.0, steps=steps, loss=classification_loss(), **options)


def test_structure_appears():
    """Exact zeros by proximal steps, small norms by penalties."""
    model = make_model()
    run(model, ProximalSGD(model.parameters(), 0.1, proximal="groups", strength=0.1))
    assert (model[3].weight == 0).all(1).any()
    assert not (model[3].weight == 0).all()
    model = make_model()
    run(model, ProximalSGD(model.parameters(), 0.1, proximal="nuclear", strength=0.1))
    assert int(torch.linalg.matrix_rank(model[3].weight)) < 8
    plain = make_model()
    run(plain)
    for penalty, ball in ((GroupLasso(0.02), Ball(Lp(1), Groups())), (NuclearNorm(0.02), Ball(Lp(1), Spectrum()))):
        model = make_model()
        run(model, during=[penalty])
        assert ball.norm(model[3].weight.detach()) < 0.8 * ball.norm(plain[3].weight.detach())


def test_the_group_penalty_is_the_norm_of_the_prunable_weights():
    model = make_model()
    weights = [model[0].weight, model[3].weight, model[5].weight]
    method, ball = GroupLasso(0.5), Ball(Lp(1), Groups())
    run(model, during=[method], steps=1)
    seen = [weight for _, weight in method.weighed]
    assert [id(weight) for weight in seen] == [id(weight) for weight in weights[: len(seen)]]
    value = method.penalty()
    assert float(value.detach()) == pytest.approx(0.5 * sum(float(ball.norm(w.detach())) for w in seen), rel=1e-5)
    model.zero_grad()
    value.backward()
    flat = weights[0].detach().flatten(1)
    assert torch.allclose(weights[0].grad.flatten(1), 0.5 * flat / flat.norm(dim=1, keepdim=True), atol=1e-4)
    with torch.no_grad():
        weights[0][0] = 0
    model.zero_grad()
    method.penalty().backward()
    assert torch.isfinite(weights[0].grad).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_nuclear_penalty_adds_the_gradient_of_the_norm_that_autograd_finds(layout):
    ours, theirs = make_model().to(memory_format=layout), make_model()

    class Autograd(NuclearNorm):
        def before_step(self, step):
            pass

        def gradients(self):
            pass

        def penalty(self):
            norms = [torch.linalg.svdvals(view.matrix(weight)).sum() for view, weight in self.weighed]
            return self.strength * torch.stack(norms).sum()

    for model, method in ((ours, NuclearNorm(0.1)), (theirs, Autograd(0.1))):
        run(model, during=[method], steps=5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_nuclear_subgradient_is_renewed_in_time_and_ends_at_the_rank():
    model, method = make_model(), NuclearNorm(0.1, every=3)
    seen = []
    with torch.no_grad():
        model[3].weight.copy_(random(8, 2) @ random(2, 192, seed=1))
    u, _, vt = torch.linalg.svd(model[3].weight.detach(), full_matrices=False)
    renew = method.before_step

    def spying(step):
        renew(step)
        seen.append(method.kept.direction1.clone())

    method.before_step = spying
    run(model, during=[method], steps=5)
    assert torch.allclose(seen[0], u[:, :2] @ vt[:2], atol=1e-4)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nuclear_steps_beside_sgd_are_proximal_sgd(layout, every):
    """Every step; or SGD, and every fourth time the proximal step of four times the length."""
    ours, theirs = make_model().to(memory_format=layout), make_model()
    run(ours, during=[NuclearSteps(0.05, every=every)], steps=8)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    if every == 1:
        run(theirs, ProximalSGD(theirs.parameters(), 0.1, proximal="nuclear", strength=0.05, momentum=0.0), steps=8)
    else:
        for part in range(2):
            for step in range(4):
                loss = classification_loss()(theirs, batches(4 * part + step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                for weight in (theirs[0].weight, theirs[3].weight, theirs[5].weight):
                    weight.copy_(shrink_singular_values(weight.flatten(1), 4 * 0.05 * 0.1).view(weight.shape))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_nuclear_steps_take_the_rate_of_each_group_and_leave_what_is_not_trained():
    ours, theirs = make_model(), make_model()
    for model in (ours, theirs):
        model[0].requires_grad_(False)
    groups = [
        [{"params": each[3].parameters()}, {"params": each[5].parameters(), "lr": 0.3}] for each in (ours, theirs)
    ]
    run(ours, torch.optim.SGD(groups[0], lr=0.1), during=[NuclearSteps(0.05)], steps=4)
    run(theirs, ProximalSGD(groups[1], 0.1, proximal="nuclear", strength=0.05, momentum=0.0), steps=4)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_nuclear_steps_leave_zeros_where_masks_hold_them():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), random(8, 6)
    masks = Masks({name: random(*model.get_parameter(name).shape) > 0 for name in ("0.weight", "1.weight")})
    train(
        model,
        lambda step: (x, torch.arange(8) % 3),
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda step: 1.0,
        steps=3,
        loss=classification_loss(),
        masks=masks,
        during=[NuclearSteps(0.1)],
    )
    masks.check(model)


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="nuclear or groups"):
        ProximalSGD([nn.Parameter(torch.ones(1))], 0.1, proximal="l1", strength=1.0)
    with pytest.raises(ValueError, match="strength is at least 0"):
        ProximalSGD([nn.Parameter(torch.ones(1))], 0.1, proximal="groups", strength=-1.0)
    for name in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} is at least 0; got nan"):
            ProximalSGD(
                [nn.Parameter(torch.ones(1))], **{"lr": 1.0, "proximal": "groups", "strength": 1.0, name: torch.nan}
            )
    with pytest.raises(ValueError, match="cannot be captured"):
        ProximalSGD([nn.Parameter(torch.ones(1))], 0.1, proximal="nuclear", strength=1.0, capturable=True)
    with pytest.raises(ValueError, match="strength is at least 0; got -1"):
        GroupLasso(-1)
    with pytest.raises(ValueError, match="at least 1; got every=0"):
        NuclearSteps(1.0, every=0)
    with pytest.raises(ValueError, match="found no prunable layer"):
        run(make_model(), during=[NuclearNorm(1.0)], views=())


@pytest.mark.parametrize("name", ["shrink_groups", "shrink_singular_values"])
def test_examples_are_true(name):
    names = vars(proximal) | {"torch": torch}
    example = doctest.DocTestParser().get_doctest(getattr(proximal, name).__doc__, names, name, None, 0)
    heard = []
    doctest.DocTestRunner(verbose=False).run(example, out=heard.append)
    assert example.examples
    assert not heard, "".join(heard)
