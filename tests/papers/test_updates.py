"""The update rules of methods that prune while training, on two weights and by hand.

The model is y = w . x without bias and the loss is y, so that the gradient of the weight that the forward pass sees is
x. The arithmetic stands beside each number.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from prunus.during import CS, DNW, DPF, DST, ELSA, GMP, GSM, LC, SET, STR, RigL
from prunus.during import rigl as rigl_file
from prunus.during import set_ as set_file
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.patterns import parse
from prunus.train import During
from prunus.train.hooks import Plan
from prunus.train.train import train


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def learn(
    method: During, w: list[float], x: list[float], *, steps: int, lr: float, momentum: float = 0.0, decay: float = 0.0
) -> tuple[list[float], Masks, Any]:
    """The weights before `finish`, the masks that it returns, and model and trace."""
    model = nn.Linear(len(w), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([w]))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    inputs = torch.tensor([x])
    options = {"steps": steps, "loss": lambda m, batch: m(batch).sum(), "during": [method], "epoch_steps": 1}
    trace = train(model, lambda step: inputs, optimizer, lambda step: 1.0, **options)
    stored = model.weight.detach()[0].tolist()
    masks = method.finish()
    assert masks is not None
    return stored, masks, (model.weight.detach()[0].tolist(), trace.losses)


def near(*numbers: float) -> Any:
    return pytest.approx(numbers, abs=1e-6)


def test_gmp_prunes_for_good():
    # step 1: (3, 1) - 0.5 (1, -1) = (2.5, 1.5), of which the smaller goes; step 2: 2.5 - 0.5 = 2, and 0 stays 0
    method = GMP(0.5, every=0.5, stop=0.5)
    stored, masks, (final, losses) = learn(method, [3.0, 1.0], [1.0, -1.0], steps=2, lr=0.5)
    assert (stored, final) == ([2.0, 0.0], [2.0, 0.0])
    assert masks["weight"].tolist() == [[True, False]]
    assert losses == near(3 - 1, 2.5)


def test_gmp_lets_weights_recover():
    # prunings after steps 1, 2, 3, to 0.5 - 0.5 (2/3)^3 = 0.35, 0.48 and 0.5 of two weights: one each time
    # step 1: (2.9, 1) - 0.5 (1, -1) = (2.4, 1.5), the second is masked, keeps its value and gets no gradient
    # step 2: (1.9, 1.5), the same; step 3: (1.4, 1.5), now the first is the smaller; step 4: (1.4, 1.5 + 0.5)
    method = GMP(0.5, every=0.25, stop=0.75, variant="recover")
    stored, masks, (final, losses) = learn(method, [2.9, 1.0], [1.0, -1.0], steps=4, lr=0.5)
    assert stored == near(1.4, 2.0)
    assert final == near(0.0, 2.0)
    assert masks["weight"].tolist() == [[False, True]]
    assert losses == near(2.9 - 1, 2.4, 1.9, -1.5)


def test_what_gmp_stores_decays():
    # step 1: 2.9 - 0.5 (1 + 0.29) = 2.255, 1 - 0.5 (-1 + 0.1) = 1.45
    # step 2: 2.255 - 0.5 (1 + 0.2255) = 1.64225, masked: 1.45 - 0.5 (0 + 0.145) = 1.3775
    method = GMP(0.5, every=0.5, stop=0.5, variant="recover")
    stored, _, (final, _) = learn(method, [2.9, 1.0], [1.0, -1.0], steps=2, lr=0.5, decay=0.1)
    assert stored == near(1.64225, 1.3775)
    assert final == near(1.64225, 0.0)


def test_gmp_forgets_the_momentum_of_what_it_masks():
    # step 1: (2.4, 1.5) with momenta (1, -1), of which the second is zeroed with the mask
    # step 2: 2.4 - 0.5 (0.5 * 1 + 1) = 1.65, 1.5 - 0.5 * 0
    method = GMP(0.5, every=0.5, stop=0.5, variant="recover")
    stored, _, _ = learn(method, [2.9, 1.0], [1.0, -1.0], steps=2, lr=0.5, momentum=0.5)
    assert stored == near(1.65, 1.5)


def test_dpf_feeds_back_what_the_mask_hides():
    # step 1, dense: (2, 1) - 0.5 (1, -0.5) = (1.5, 1.25); the mask keeps the first
    # step 2: y = 1.5 alone, but both move: (1.0, 1.5); the mask, chosen after each step, keeps the second
    # step 3: y = -0.5 * 1.5, both move: (0.5, 1.75)
    method = DPF(0.5, refresh=1, every=1 / 3, stop=1 / 3)
    stored, masks, (final, losses) = learn(method, [2.0, 1.0], [1.0, -0.5], steps=3, lr=0.5)
    assert stored == near(0.5, 1.75)
    assert final == near(0.0, 1.75)
    assert masks["weight"].tolist() == [[False, True]]
    assert losses == near(2 - 0.5, 1.5, -0.75)


def test_dpf_keeps_its_mask_between_refreshes():
    # as above, but the mask chosen after step 1 serves steps 2 and 3: y = 1.5, then 1.0; then it is chosen anew
    method = DPF(0.5, refresh=3, every=1 / 3, stop=1 / 3)
    _, masks, (final, losses) = learn(method, [2.0, 1.0], [1.0, -0.5], steps=3, lr=0.5)
    assert losses == near(1.5, 1.5, 1.0)
    assert final == near(0.0, 1.75)
    assert masks["weight"].tolist() == [[False, True]]


def test_dnw_uses_the_largest_and_moves_all():
    # step 1: y = 2, (2, 1) -> (1.5, 1.25); step 2: y = 1.5 -> (1.0, 1.5); step 3: y = -0.5 * 1.5 -> (0.5, 1.75)
    stored, masks, (final, losses) = learn(DNW(0.5), [2.0, 1.0], [1.0, -0.5], steps=3, lr=0.5)
    assert losses == near(2.0, 1.5, -0.75)
    assert stored == near(0.5, 1.75)
    assert final == near(0.0, 1.75)
    assert masks["weight"].tolist() == [[False, True]]


def test_gsm_gives_a_gradient_to_the_most_important():
    # step 1: |w g| = (3 * 1, 1 * 4), the second is active: z = (0.1 * 3, 0.1 * 1 + 4) = (0.3, 4.1)
    #         w = (3 - 0.03, 1 - 0.41) = (2.97, 0.59)
    # step 2: |w g| = (2.97, 2.36), the first: z = (0.5 * 0.3 + 0.297 + 1, 0.5 * 4.1 + 0.059) = (1.447, 2.109)
    #         w = (2.97 - 0.1447, 0.59 - 0.2109) = (2.8253, 0.3791)
    stored, masks, (final, _) = learn(GSM(0.5), [3.0, 1.0], [1.0, 4.0], steps=2, lr=0.1, momentum=0.5, decay=0.1)
    assert stored == near(2.8253, 0.3791)
    assert final == near(2.8253, 0.0)
    assert masks["weight"].tolist() == [[True, False]]


def test_gsm_looks_at_magnitudes():
    # w g = (3, -4): the second is active; z = (0.1 * 3, 0.1 - 4), w = (3 - 0.03, 1 + 0.39)
    stored, _, _ = learn(GSM(0.5), [3.0, 1.0], [1.0, -4.0], steps=1, lr=0.1, decay=0.1)
    assert stored == near(2.97, 1.39)


def test_lc_lets_only_the_small_decay():
    # step 1, mu = 0.1:  3 - 0.1 * 1 = 2.9,  1 - 0.1 (1 + 0.1 * 1) = 0.89
    # step 2, mu = 0.2:  2.9 - 0.1 = 2.8,    0.89 - 0.1 (1 + 0.2 * 0.89) = 0.7722
    stored, _, (final, _) = learn(LC(0.5, growth=2.0, stages=2), [3.0, 1.0], [1.0, 1.0], steps=2, lr=0.1, decay=0.1)
    assert stored == near(2.8, 0.7722)
    assert final == near(2.8, 0.0)


def test_lc_with_a_mu_of_its_own():
    # mu = 0.5 and no decay: 3 - 0.1 = 2.9, 1 - 0.1 (1 + 0.5) = 0.85; decay of 0.1 is taken back, so nothing changes
    for decay in (0.0, 0.1):
        stored, _, _ = learn(LC(0.5, mu=0.5), [3.0, 1.0], [1.0, 1.0], steps=1, lr=0.1, decay=decay)
        assert stored == near(2.9, 0.85)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.Adam, (1 - 0.1 * 3, 1 + 0.1 * 1 - 0.1 * 1)),  # Adam will add 0.1 w to both
        (torch.optim.AdamW, (1, 1 + 0.1 * 1)),  # AdamW decays beside the gradient, which cannot be taken back
    ],
)
def test_lc_under_both_kinds_of_decay(optimizer, expected):
    model, method = nn.Linear(2, 1, bias=False), LC(0.5)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.0]]))
    made = optimizer(model.parameters(), weight_decay=0.1)
    method.attach(model, made, Plan(1, 1, tuple(find_layers(model))))
    model(torch.ones(1, 2)).sum().backward()
    method.gradients()
    assert model.weight.grad[0].tolist() == near(*expected)


def test_str_shrinks_and_learns_its_threshold():
    # s = 0: threshold 0.5, weights in use (1.5, 0), y = 1.5; gradients: w (1, 0), threshold -1, s -1 * 0.5 * 0.5
    # w = (2 - 0.1 (1 + 0.1 * 2), 0.3 - 0.1 * 0.1 * 0.3) = (1.88, 0.297), s = 0 + 0.1 * 0.25 = 0.025
    # the end: 1.88 - sigmoid(0.025) = 1.88 - 0.50624967 = 1.37375033
    method = STR(0.5, init=0.0)
    stored, masks, (final, losses) = learn(method, [2.0, 0.3], [1.0, 2.0], steps=1, lr=0.1, decay=0.1)
    assert losses == near(1.5)
    assert stored == near(1.88, 0.297)
    assert method.s.tolist() == near(0.025)
    assert final == near(1.37375033, 0.0)
    assert (masks.sparsity, float(method.reached)) == (0.5, 0.5)


def test_the_threshold_of_str_decays_to_zero():
    # both weights are far below sigmoid(4) = 0.98, so that decay alone moves s: 4 - 0.1 * 0.5 * 4 = 3.8
    for lr, end in ((None, 3.8), (0.2, 3.6)):
        method = STR(0.5, init=4.0, weight_decay=0.5, lr=lr)
        stored, masks, (final, _) = learn(method, [0.1, -0.2], [1.0, 1.0], steps=1, lr=0.1)
        assert method.s.tolist() == near(end)
        assert stored == near(0.1, -0.2)
    assert final == [0.0, 0.0]  # too many zeros; the mask keeps the one nearest to its threshold
    assert masks["weight"].tolist() == [[False, True]]
    assert float(method.reached) == 1.0


def test_cs_multiplies_by_gates():
    # q = 0: gates 0.5, c = 2, weights in use (2, 3), y = 2 - 6; gradients: w 2 * 0.5 * x = (1, -2)
    # q: x w c beta g (1 - g) + 0.1 beta g (1 - g) = 0.5 x w + 0.025 = (1.025, -2.975)
    # w = (2 - 0.1, 3 + 0.2) = (1.9, 3.2), q = (-0.1025, 0.2975)
    method = CS(0.5, penalty=0.1, beta=4.0)
    stored, masks, (final, losses) = learn(method, [2.0, 3.0], [1.0, -2.0], steps=1, lr=0.1)
    assert losses == near(-4.0)
    assert stored == near(1.9, 3.2)
    assert method.gates[0][0].tolist() == near(-0.1025, 0.2975)
    assert final == near(0.0, 2 * 3.2 * sigmoid(0.2975))
    assert masks["weight"].tolist() == [[False, True]]
    assert float(method.reached) == 0.5


def test_the_gates_of_cs_grow_steeper_and_do_not_decay():
    # beta = 4^(t / 1): step 2 uses gates sigmoid(4 q) with q = (-0.1025, 0.2975) as above, and w with decay 0.1:
    # w = (2 - 0.1 (1 + 0.2), 3 - 0.1 (-2 + 0.3)) = (1.88, 3.17)
    # y = 2 * 1.88 * sigmoid(-0.41) - 2 * 2 * 3.17 * sigmoid(1.19)
    method = CS(0.5, penalty=0.1, beta=4.0)
    _, _, (_, losses) = learn(method, [2.0, 3.0], [1.0, -2.0], steps=2, lr=0.1, decay=0.1)
    assert losses[1] == pytest.approx(2 * 1.88 * sigmoid(-0.41) - 4 * 3.17 * sigmoid(1.19), abs=1e-5)


def test_the_gates_of_cs_feel_no_decay():
    # without inputs nothing but decay moves: w = 2 - 0.1 * 0.5 * 2 = 1.9, q stays
    method = CS(0.5, penalty=0.0, init=-1.0)
    stored, _, _ = learn(method, [2.0, 2.0], [0.0, 0.0], steps=1, lr=0.1, decay=0.5)
    assert stored == near(1.9, 1.9)
    assert method.gates[0][0].tolist() == near(-1.0, -1.0)


def test_cs_that_prunes_too_much_is_filled_up_by_the_gates():
    # w (4, 1), x (1, 1): q = -0.1 * 0.5 * (4, 1) = (-0.2, -0.05): all gates fall, the second the least
    method = CS(0.5, penalty=0.0)
    _, masks, _ = learn(method, [4.0, 1.0], [1.0, 1.0], steps=1, lr=0.1)
    assert method.gates[0][0].tolist() == near(-0.2, -0.05)
    assert float(method.reached) == 1.0
    assert masks["weight"].tolist() == [[False, True]]


def test_dst_learns_thresholds_through_the_step():
    # t = 0: slopes of the step 0.4 at 0.5 and 2 - 4 * 0.2 = 1.2 at 0.2; gradients of w: through w, and through the mask
    #   1 + 1 * 0.5 * 0.4 = 1.2,   2 + 2 * 0.2 * 1.2 = 2.48
    # of t: -(1 * 0.5 * 0.4 + 2 * 0.2 * 1.2) = -0.68, and of the penalty -0.1 exp(-0) = -0.1
    # w = (0.5 - 0.12, 0.2 - 0.248) = (0.38, -0.048), t = 0.078: the second is below
    method = DST(0.5, penalty=0.1)
    stored, masks, (final, losses) = learn(method, [0.5, 0.2], [1.0, 2.0], steps=1, lr=0.1)
    assert losses == near(0.5 + 0.4)
    assert stored == near(0.38, -0.048)
    assert method.t.tolist() == near(0.078)
    assert final == near(0.38, 0.0)
    assert masks["weight"].tolist() == [[True, False]]
    assert float(method.reached) == 0.5


def with_threshold(method: DST, threshold: float) -> DST:
    attach = method.attach

    def attached(*args: Any) -> None:
        attach(*args)
        with torch.no_grad():
            method.t.fill_(threshold)

    method.attach = attached
    return method


def test_dst_that_prunes_too_much_is_filled_up_by_the_nearest():
    # without inputs nothing moves; t = 0.9 leaves the last of four, and two are to stay: 0.2 is nearest to 0.9
    method = with_threshold(DST(0.5, penalty=0.0), 0.9)
    _, masks, (final, _) = learn(method, [0.1, -0.2, 0.05, 2.0], [0.0] * 4, steps=1, lr=0.1)
    assert masks["weight"].tolist() == [[False, True, False, True]]
    assert final == [0.0, 0.0, 0.0, 2.0]
    assert float(method.reached) == 0.75


def test_dst_masks_what_is_below_and_far_from_its_threshold():
    # t = 0.9: in use (2, 0); |w| - t is 1.1, beyond the estimator, and -0.7: slope 0.4
    #   w: 1 + 0 = 1,  0 + 3 * (-0.2) * 0.4 * (-1) = 0.24;   t: -(0 + 3 * (-0.2) * 0.4) = 0.24
    method = with_threshold(DST(0.5, penalty=0.0), 0.9)
    stored, _, (_, losses) = learn(method, [2.0, -0.2], [1.0, 3.0], steps=1, lr=0.1)
    assert losses == near(2.0)
    assert stored == near(1.9, -0.2 - 0.024)
    assert method.t.tolist() == near(0.9 - 0.024)


def test_elsa_pulls_weights_to_a_sparse_copy_and_lets_them_return():
    # z = (3, 0), u = 0; step 1: (1, -1) + 0.5 (0, 1): (3, 1) - 0.5 (1, -0.5) = (2.5, 1.25): z = (2.5, 0), u = (0, 1.25)
    # step 2: (1, -1) + 0.5 (0, 2.5): (2.5, 1.25) - 0.5 (1, 0.25) = (2, 1.125); w + u = (2, 2.375): z is the second's
    # step 3: u = (2, 0): (1, -1) + 0.5 (4, -1.25): (2, 1.125) - 0.5 (3, -1.625) = (0.5, 1.9375): the larger stays
    method = ELSA(0.5, lam=0.5, interval=1)
    stored, masks, (final, losses) = learn(method, [3.0, 1.0], [1.0, -1.0], steps=3, lr=0.5)
    assert losses == near(2.0, 1.25, 0.875)
    assert stored == near(0.5, 1.9375)
    assert final == near(0.0, 1.9375)
    assert masks["weight"].tolist() == [[False, True]]


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """In bfloat16, or in 255 steps from the least to the largest of each row of eight."""
    if bits == 8:
        step = values.abs().max(1, keepdim=True).values / 127
        return (values / step).round() * step
    return values.bfloat16().float() if bits == 16 else values


@pytest.mark.parametrize(
    ("pattern", "bits"), [("unstructured", 32), ("2:4", 32), ("block 1x2", 32), ("2:4", 16), ("unstructured", 8)]
)
def test_elsa_is_the_textbook_alternation_with_adams_second_moment(pattern: str, bits: Any):
    generator = torch.Generator().manual_seed(0)
    start, x, y = (torch.randn(size, generator=generator) for size in ((3, 8), (40, 8), (40, 3)))
    x, chosen, kept = x * torch.linspace(0.2, 2, 8), parse(pattern, "layer"), 12

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(x) - y).square().mean()

    model = nn.Linear(8, 3, bias=False)
    model.weight.data.copy_(start)
    method = ELSA(0.5, pattern=pattern, lam=0.3, interval=5, bits=bits)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    options = {"steps": 33, "loss": loss, "clip": 0.1, "during": [method]}
    train(model, lambda step: x, optimizer, lambda step: 1.0, **options)
    masks = method.finish()

    w = nn.Parameter(start.clone())
    textbook = torch.optim.Adam([w], lr=0.05)
    z, u = rounded(torch.where(chosen.choose(w.abs(), kept), w, 0.0).detach(), bits), torch.zeros_like(w)
    for step in range(33):
        (w.grad,) = torch.autograd.grad((x @ w.T - y).square().mean(), w)
        torch.nn.utils.clip_grad_norm_([w], 0.1)
        w.grad += 0.3 * (w.detach() - z + u)
        textbook.step()
        second = textbook.state[w]["exp_avg_sq"]
        if (step + 1) % 5 == 0:
            both = w.detach() + u
            keep, near = chosen.choose(second * both**2, kept), rounded(both, bits)
            z, u = torch.where(keep, near, 0.0), torch.where(keep, 0.0, near)
    mask = chosen.choose(second * w.detach() ** 2, kept)
    assert torch.equal(masks["weight"], mask)
    torch.testing.assert_close(model.weight.detach(), torch.where(mask, w.detach(), 0.0), rtol=1e-4, atol=1e-5)
    assert sum(each.nbytes for each in method.goals.buffers()) == 24 * bits // 8 + (bits == 8) * 3 * 4
    if pattern == "unstructured":  # the second moment has a say
        assert not torch.equal(mask, chosen.choose(w.detach().abs(), kept))


def half_of_four(*_: Any) -> Masks:
    return Masks({"weight": torch.tensor([[True, True, False, False]])})


def test_rigl_grows_where_the_gradient_is_largest(monkeypatch):
    # (3, 1, 5, 7) under the mask (1, 1, 0, 0); step 1: (3, 1) - 0.5 (1, 1) = (2.5, 0.5, 0, 0)
    # f = 1/2 (1 + cos(pi * 1 / 3)) = 0.75, of 2 weights 1: 0.5 goes; of |x| = 1, 2, 3 the last comes, at 0
    # step 2 (momentum 0.9): buffers (1.9, -3): (2.5 - 0.95, 0 + 1.5) = (1.55, 1.5); f = 0.25, of 2 weights none
    # step 3: buffers (2.71, -5.7): (0.195, 4.35); step 4: buffers (3.439, -8.13): (-1.5245, 8.415)
    monkeypatch.setattr(rigl_file, "random_topology", half_of_four)
    method = RigL(0.5, alpha=1.0, delta=1, stop=0.75)
    options = {"steps": 4, "lr": 0.5, "momentum": 0.9}
    stored, masks, (final, losses) = learn(method, [3.0, 1.0, 5.0, 7.0], [1.0, 1.0, 2.0, -3.0], **options)
    assert losses == near(3 + 1, 2.5, 1.55 - 4.5, 0.195 - 3 * 4.35)
    assert stored == final == near(-1.5245, 0.0, 0.0, 8.415)
    assert masks["weight"].tolist() == [[True, False, False, True]]


def test_set_grows_at_random(monkeypatch):
    # as above, half of the weights exchanged after steps 1 and 2 of 3, chance favouring the third, then the last
    # step 1: (2.5, 0.5, 0, 0), the second goes, the third comes; step 2: (2.0, 0, -1, 0), the third goes, the last
    # comes; step 3: (1.5, 0, 0, 1.5)
    chances = iter([[9.0, 1.0, 3.0, 2.0], [9.0, 1.0, 2.0, 3.0]])
    monkeypatch.setattr(set_file, "random_topology", half_of_four)
    monkeypatch.setattr(set_file, "random_scores", lambda views, seed: {views[0].name: torch.tensor([next(chances)])})
    method = SET(0.5, zeta=0.5)
    stored, masks, (_, losses) = learn(method, [3.0, 1.0, 5.0, 7.0], [1.0, 1.0, 2.0, -3.0], steps=3, lr=0.5)
    assert losses == near(4.0, 2.5, 2.0)
    assert stored == near(1.5, 0.0, 0.0, 1.5)
    assert masks["weight"].tolist() == [[True, False, False, True]]
