"""Laws of the training loop and of learning-rate schedules."""

import copy
import itertools
import os
import sys
import time
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from prunus.during import DST, ELSA, GMP, SET, Part, RigL
from prunus.frankwolfe import SFW, k_support, lp
from prunus.layers import find_layers
from prunus.machine import ranks
from prunus.masks import Masks
from prunus.score import uniform, uniform_plus
from prunus.train.averaged import Ema
from prunus.train.capture import set_rates_
from prunus.train.checkpoint import Checkpoint, Clock, options_of
from prunus.train.drawn import drawn_from, seeded
from prunus.train.hooks import During, Plan
from prunus.train.lr import linear_warmup_decay
from prunus.train.prepared import prepared
from prunus.train.train import classification_loss, regression_loss, train
from prunus.train.watch import Watch, Watched


class Net(nn.Module):
    """Two layers with dropout and batch statistics: everything that a resumed run could get wrong."""

    def __init__(self, dropout: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)
        self.norm, self.dropout = nn.BatchNorm1d(8) if dropout else nn.Identity(), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.dropout(self.norm(self.first(x)).relu()))


def batches(step: int, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=generator), torch.randint(2, (rows,), generator=generator)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(model: nn.Module, served=batches, *, steps: int = 12, **options):
    optimizer = torch.optim.AdamW(
        [{"params": [*model.first.parameters()], "lr": 0.02}, {"params": [*model.second.parameters()]}], lr=0.01
    )
    return train(model, served, optimizer, linear_warmup_decay(steps), steps=steps, loss=loss, **options), optimizer


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_schedule_in_closed_form():
    values = [linear_warmup_decay(40, 0.1)(t) for t in range(41)]
    assert values[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 35 / 36])
    assert values[39:] == pytest.approx([1 / 36, 0])
    assert [linear_warmup_decay(4, 0)(t) for t in range(4)] == [1, 0.75, 0.5, 0.25]
    for steps, share in ((0, 0.1), (5, 1.0), (5, -0.1)):
        with pytest.raises(ValueError, match="step"):
            linear_warmup_decay(steps, share)


@pytest.mark.parametrize("killed_at", [5, 8, 11])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path, killed_at):
    torch.manual_seed(1)
    whole = Net()
    expected, _ = run(whole, checkpoint=tmp_path / "whole.pt", save_seconds=0)

    def broken(step: int):
        if step == killed_at:
            raise KeyboardInterrupt
        return batches(step)

    torch.manual_seed(1)
    killed = Net()
    with pytest.raises(KeyboardInterrupt):
        run(killed, broken, checkpoint=tmp_path / "part.pt", save_seconds=0)
    resumed, torn = Net(seed=5), []
    trace, _ = run(resumed, lambda step: torn.append(step) or batches(step), checkpoint=tmp_path / "part.pt")
    assert torn[0] == killed_at
    assert equal(whole, resumed)
    assert (trace.losses, trace.lrs, trace.tokens) == (expected.losses, expected.lrs, expected.tokens)


def held_out(model: nn.Module):
    """How wrong a model is on a batch of its own, in evaluation mode, and a count of the calls."""
    calls: list[bool] = []

    def measure() -> float:
        calls.append(model.training)
        with torch.no_grad():
            return float(loss(model, batches(999)))

    return measure, calls


def test_a_watch_measures_every_few_steps_and_at_the_end():
    model = Net()
    measure, calls = held_out(model)
    trace, _ = run(model, watch=Watch(measure, every=5))
    assert [step for step, _ in trace.watched] == [5, 10, 12]
    assert calls == [False] * 3
    model.eval()
    assert trace.watched[-1][1] == measure()


class Halved(During):
    """Runs the model with half of its weights."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> None:
        self.own = dict(model.named_parameters())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: each / 2 for name, each in self.own.items()}


def test_a_watch_measures_the_weights_that_a_method_trains():
    model, seen = Net(), []

    def measure() -> float:
        seen.append([each.detach().clone() for each in model.parameters()])
        return 0.0

    run(model, watch=Watch(measure, every=12), during=[Halved()])
    assert all(torch.equal(one * 2, other) for one, other in zip(seen[-1], model.parameters(), strict=True))
    assert all(isinstance(each, nn.Parameter) for each in model.parameters())


@pytest.mark.parametrize("killed_at", [3, 7, 9])
def test_a_watched_run_goes_on_with_the_bits_of_the_unbroken_one(tmp_path, killed_at):
    """Whatever was measured before the kill: the best weights, when it ends, what was seen."""
    values = [6.0, 5.0, 3.0, 4.0, float("nan"), 3.0, 1.0]  # nothing is better than the third for three measurements

    def watched(left: list[float]) -> Watch:
        return Watch(lambda: left.pop(0), every=2, patience=3, keep_best=True)

    def broken(step: int):
        if step == killed_at:
            raise KeyboardInterrupt
        return batches(step)

    torch.manual_seed(1)
    whole, left = Net(), list(values)
    expected, _ = run(whole, watch=watched(left), checkpoint=tmp_path / "whole.pt", save_seconds=0)
    assert [step for step, _ in expected.watched] == [0, 2, 4, 6, 8, 10]
    assert len(expected.losses) == 10
    torch.manual_seed(1)
    killed, left = Net(), list(values)
    with pytest.raises(KeyboardInterrupt):
        run(killed, broken, watch=watched(left), checkpoint=tmp_path / "part.pt", save_seconds=0)
    resumed = Net(seed=5)
    trace, _ = run(resumed, watch=watched(left), checkpoint=tmp_path / "part.pt", save_seconds=0)
    assert equal(whole, resumed)
    assert str((trace.watched, trace.losses)) == str((expected.watched, expected.losses))
    again = Net(seed=6)  # a finished run is not repeated, and ends with the best weights, too
    run(again, lambda step: pytest.fail("no batch is needed"), watch=watched([]), checkpoint=tmp_path / "part.pt")
    assert equal(whole, again)
    with pytest.raises(ValueError, match=r"part\.pt belongs to another run"):
        run(Net(), watch=Watch(lambda: 0.0, every=3), checkpoint=tmp_path / "part.pt")


def test_the_best_weights_are_those_of_their_step():
    for values in ([4.0, 2.0, 1.0, 3.0], [1.0, 2.0, 4.0, 3.0]):  # the second: training only harms
        model, kept = Net(), []

        def measure(kept=kept, model=model, values=values) -> float:
            kept.append({name: each.clone() for name, each in model.state_dict().items()})
            return values[len(kept) - 1]

        run(model, watch=Watch(measure, every=4, keep_best=True))
        best = kept[values.index(1.0)]
        assert all(torch.equal(each, best[name]) for name, each in model.state_dict().items())
    for wrong in ({"every": 0}, {"every": 1, "patience": 0}):
        with pytest.raises(ValueError, match="every and patience are at least 1"):
            Watch(measure, **wrong)
    with pytest.raises(ValueError, match="leave out the watch's keep_best and patience"):
        run(Net(), watch=Watch(measure, every=4, patience=1), during=[During()])


def test_a_process_that_trains_its_own_model_asks_no_other(tmp_path, monkeypatch):
    """The second of two: its checkpoint is written, and what it measures counts."""

    def ask(*_: object) -> None:
        pytest.fail("the other process trains another model, and does not answer")

    alone = Net()
    torch.manual_seed(1)
    run(alone, watch=Watch(held_out(alone)[0], every=4, keep_best=True))
    for name, value in {"count": lambda: 2, "index": lambda: 1, "join": lambda device: device}.items():
        monkeypatch.setattr(ranks, name, value)
    for name in ("agree", "wait", "sum_", "mean_"):
        monkeypatch.setattr(ranks, name, ask)
    model, again = Net(), Net(seed=3)
    torch.manual_seed(1)
    run(model, watch=Watch(held_out(model)[0], every=4, keep_best=True), shared=False, checkpoint=tmp_path / "c.pt")
    assert equal(model, alone)
    watch = Watch(lambda: pytest.fail("nothing is measured again"), every=4, keep_best=True)
    run(again, lambda step: pytest.fail("no batch is needed"), watch=watch, shared=False, checkpoint=tmp_path / "c.pt")
    assert equal(again, alone)


def test_a_finished_run_is_not_repeated(tmp_path):
    model = Net()
    first, _ = run(model, checkpoint=tmp_path / "c.pt")
    again = Net(seed=3)
    second, _ = run(again, lambda step: pytest.fail("no batch is needed"), checkpoint=tmp_path / "c.pt")
    assert equal(model, again)
    assert second.losses == first.losses


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(Net(), checkpoint=tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt belongs to another run"):
        run(Net(), steps=13, checkpoint=tmp_path / "c.pt")
    for changed in ({"precision": "bf16"}, {"clip": 0.5}):
        with pytest.raises(ValueError, match=f"this run .*'{next(iter(changed))}': {next(iter(changed.values()))!r}"):
            run(Net(), checkpoint=tmp_path / "c.pt", **changed)
    frozen = Net()
    frozen.second.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"9 tensors, this run .* and 8"):
        run(frozen, checkpoint=tmp_path / "c.pt")


def test_a_checkpoint_of_other_masks_or_settings_of_the_optimizer_is_refused(tmp_path):
    def go(kept: int = 0, **options):
        model = nn.Linear(4, 2)
        masks = Masks({"weight": torch.arange(4) % 2 == kept}) if kept < 2 else None
        masks = masks and Masks({"weight": masks["weight"].expand(2, 4)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        served = lambda step: (torch.ones(2, 4), torch.tensor([0, 1]))  # noqa: E731
        how = {"steps": 2, "loss": classification_loss(), "masks": masks, "checkpoint": str(tmp_path / "c")}
        return train(model, served, optimizer, lambda step: 1.0, **how)

    first = go()
    assert go(foreach=False).losses == first.losses  # how fast it steps may change
    for kept in (1, 2):  # other masks, none
        with pytest.raises(ValueError, match=r"c belongs to another run: it has \{'masks': '\w{8}'\} and 2 tensors"):
            go(kept)
    for changed in ({"weight_decay": 0.5}, {"betas": (0.9, 0.95)}):
        with pytest.raises(ValueError, match=r"c belongs to another run: it has \{'optimizer': "):
            go(**changed)


def test_an_optimizer_that_needs_a_closure_is_refused_before_any_batch():
    model = Net(dropout=0.0)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"LBFGS asks for the loss several times a step .*torch\.optim\.AdamW"):
        train(model, lambda step: pytest.fail("no batch is read"), optimizer, lambda step: 1.0, steps=2)


def test_an_optimizer_of_other_parameters_is_refused():
    model, optimizer = nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"none of the parameters that require gradients.* after the model is adapted"):
        train(model, lambda _: torch.ones(1), optimizer, lambda _: 1.0, steps=1)


@pytest.mark.parametrize("other", ["optimizer", "method", "methods"])
def test_a_checkpoint_of_another_optimizer_or_method_is_refused(tmp_path, other):
    def go(make=torch.optim.SGD, during=()):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = make(model.parameters(), lr=0.1)
        train(model, batch, optimizer, lambda step: 1.0, steps=4, loss=loss, during=during, checkpoint=tmp_path / "c")

    def batch(step):
        return torch.ones(2, 4), torch.tensor([0, 1])

    loss = classification_loss()
    go(during=[GMP(0.5, every=0.5)])
    changed = {
        "optimizer": {"make": torch.optim.Adam, "during": [GMP(0.5, every=0.5)]},
        "method": {"during": [RigL(0.5, delta=1)]},
        "methods": {},
    }
    with pytest.raises(ValueError, match=r"c belongs to another run: it was trained by SGD, GMP, this run is by"):
        go(**changed[other])


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (
            lambda: GMP(0.5, every=0.5),
            lambda: GMP(0.5, every=0.25),
            r"\{'GMP.every': \[0.5\]\} .* \{'GMP.every': \[0.25\]\}",
        ),
        (lambda: Part(DST(0.5, penalty=1e-6), 8), lambda: Part(DST(0.5, penalty=1e-5), 8), "DST.strength"),
        (lambda: Part(GMP(0.5), 8), lambda: Part(GMP(0.5), 9), "Part.steps"),
        (lambda: Ema(0.5), lambda: Ema(0.75), "Ema.decay"),
        (lambda: ELSA(0.5), lambda: ELSA(0.5, pattern="2:4"), "Unstructured.*NM"),
        (lambda: RigL(0.5, delta=1), lambda: RigL(0.5, delta=1, topology=uniform), "erk.*uniform"),
    ],
)
def test_a_checkpoint_of_a_method_with_other_options_is_refused(tmp_path, one, other, said):
    def go(method):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        how = {"steps": 4, "loss": classification_loss(), "during": [method], "checkpoint": tmp_path / "c"}
        return train(model, lambda _: (torch.ones(2, 4), torch.tensor([0, 1])), optimizer, lambda _: 1.0, **how)

    first, used = go(one()), one()
    with pytest.raises(ValueError, match=rf"c belongs to another run: it has .*{said}"):
        go(other())
    for _ in range(2):  # what attaching leaves in a method is no option
        assert go(used).losses == first.losses
    (tmp_path / "c").unlink()
    go(used)
    assert go(one()).losses == first.losses


@pytest.mark.parametrize(("told", "said"), [({"epoch_steps": 3}, "'epoch_steps': 2"), ({"views": 1}, "'views': '2, ")])
def test_a_checkpoint_of_a_method_that_was_told_else_is_refused(tmp_path, told, said):
    def go(epoch_steps=2, views=2):
        model = Net()
        found = find_layers(model)[:views]
        run(model, during=[SET(0.5)], views=found, epoch_steps=epoch_steps, checkpoint=tmp_path / "c")

    go()
    go()
    with pytest.raises(ValueError, match=rf"c belongs to another run: it has .*{said}"):
        go(**told)


def test_allocations_made_with_other_options_are_told_apart():
    said = [options_of([RigL(0.5, topology=uniform_plus(most=most))])["RigL.topology"] for most in (0.8, 0.8, 0.7)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("other", [lp(2), k_support(1, radius=2.0)])
@pytest.mark.parametrize("listed", [True, False])
def test_a_checkpoint_under_another_constraint_is_refused(tmp_path, other, listed):
    def go(ball):
        model = nn.Linear(4, 2)
        optimizer = SFW(model.parameters(), lr=0.1, constraint=[ball, ball] if listed else ball)
        batch = torch.ones(2, 4), torch.tensor([0, 1])
        return train(
            model,
            lambda _: batch,
            optimizer,
            lambda _: 1.0,
            steps=2,
            loss=classification_loss(),
            checkpoint=tmp_path / "c",
        )

    first = go(k_support(1))
    assert go(k_support(1)).losses == first.losses
    with pytest.raises(ValueError, match="c belongs to another run"):
        go(other)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"clip": -1.0}, {"clip": float("nan")}, {"report_every": 0}])
def test_a_clip_that_turns_gradients_round_is_refused(wrong):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="clips gradients to a norm > 0"):
        train(model, lambda _: torch.ones(1), optimizer, lambda _: 1.0, steps=1, **wrong)


def test_accumulation_equals_a_large_batch():
    def quarter(micro: int):
        whole = batches(micro // 4)
        part = slice(2 * (micro % 4), 2 * (micro % 4) + 2)
        return whole[0][part], whole[1][part]

    def in_double(batch):
        return batch[0].double(), batch[1]

    large, small = Net(dropout=0).double(), Net(dropout=0).double()
    served = (
        lambda step: (batches(step)[0].double(), batches(step)[1]),
        lambda m: (quarter(m)[0].double(), quarter(m)[1]),
    )
    one, _ = run(large, served[0], clip=0.1)
    four, _ = run(small, served[1], clip=0.1, accumulate=4)
    for x, y in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert one.losses == pytest.approx(four.losses, rel=1e-5)
    assert one.tokens == four.tokens == 12 * 8


def test_the_first_step_by_hand():
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.tensor([[3.0, 4.0]])
    trace = train(model, lambda step: x, optimizer, lambda step: 0.2, steps=1, loss=lambda m, b: m(b).sum(), clip=1.0)
    # gradient (3, 4) has norm 5 and is clipped to (0.6, 0.8); learning rate 0.5 * 0.2
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1 - 0.06, 1 - 0.08]]))
    assert trace.losses == [7.0]
    assert trace.lrs == pytest.approx([0.1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_hold_at_every_step_and_across_a_resume(tmp_path, precision):
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    masks, model, zeros = Masks({"first.weight": mask}), Net(), []

    def checked(inner: nn.Module, batch):
        zeros.append(model.first.weight[~mask].detach().clone())
        return loss(inner, batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    options = {"steps": 6, "loss": checked, "masks": masks, "precision": precision}
    train(model, batches, optimizer, lambda step: 1.0, checkpoint=tmp_path / "c.pt", **options)
    assert len(zeros) == 6
    assert not torch.stack(zeros).any()
    assert not model.first.weight[~mask].any()
    assert model.first.weight[mask].all()
    resumed = Net(seed=4)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.1, weight_decay=0.1)
    train(resumed, batches, optimizer, lambda step: 1.0, checkpoint=tmp_path / "c.pt", **options)
    assert equal(model, resumed)
    assert not optimizer._optimizer_step_post_hooks  # nothing is held once the training is over


def test_rates_of_groups_are_scaled_and_given_back():
    seen: list[list[float]] = []
    model = Net()
    optimizer = torch.optim.SGD(
        [{"params": model.first.parameters(), "lr": 0.3}, {"params": model.second.parameters()}], 0.1
    )
    optimizer.register_step_post_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
    train(model, batches, optimizer, lambda step: 1 / (step + 1), steps=2, loss=loss)
    assert seen == [pytest.approx([0.3, 0.1]), pytest.approx([0.15, 0.05])]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]


def test_a_rate_that_is_a_tensor_is_given_back_by_recorded_steps_too():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), capturable=True)
    with prepared(model, optimizer, None, "fp32", shared=False, recorded=True):
        set_rates_(optimizer, [0.0], True)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_a_checkpoint_of_fewer_processes_is_gone_on_from(tmp_path, monkeypatch):
    """Another process than those that wrote it draws on from where its caller put its generators."""
    model, again = Net(), Net(seed=3)
    run(model, checkpoint=tmp_path / "c.pt")
    optimizer = torch.optim.AdamW([{"params": [*again.first.parameters()]}, {"params": [*again.second.parameters()]}])
    plan = torch.load(tmp_path / "c.pt")["plan"]
    monkeypatch.setattr(ranks, "index", lambda: 1)
    before = torch.get_rng_state()
    step, _ = Checkpoint(
        tmp_path / "c.pt", plan, again, optimizer, None, [], {}, Watched(None, dict, True), True
    ).load()
    assert step == 12
    assert equal(model, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_methods_meet_the_model_on_the_device_where_it_is_trained(monkeypatch):
    """A process's GPU: a model that comes from another one has new tensors there."""
    for name, value in {"count": lambda: 2, "join": lambda device: device}.items():
        monkeypatch.setattr(ranks, name, value)
    model, alone = Net(), Net()

    def move(_device):
        for each in model.parameters():
            each.data = each.data.clone()

    model.to = move
    for each in (model, alone):
        ema = Ema(0.5)
        torch.manual_seed(1)
        run(each, during=[ema], shared=False)
        ema.finish()
    assert equal(model, alone)


def test_precisions_follow_each_other_in_one_process():
    inner: list[torch.dtype] = []
    for precision in ("fp32", "bf16", "fp32"):
        model = Net()
        model.first.register_forward_hook(lambda module, args, out: inner.append(out.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, batches, optimizer, lambda step: 1.0, steps=1, loss=loss, precision=precision)
        assert "forward" not in model.__dict__
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert inner == [torch.float32, torch.bfloat16, torch.float32]


def test_threads_train_at_once_and_find_what_they_find_alone():
    alone = [Net(dropout=0.0, seed=seed) for seed in range(4)]
    at_once = [Net(dropout=0.0, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, at_once))
    for one, other in zip(alone, at_once, strict=True):
        run(one)
        assert equal(one, other)


def test_a_training_during_another_changes_nothing_of_it():
    """Of another precision and accumulation, at any moment of it, as threads of one process may be."""
    asked = {"accumulate": 2, "clip": 0.5, "precision": "bf16"}
    alone, beside = Net(dropout=0.0), Net(dropout=0.0)
    run(alone, **asked)

    def disturbed(step: int):
        run(Net(dropout=0.0, seed=1), steps=2, accumulate=1 + step % 3)
        return batches(step)

    run(beside, disturbed, **asked)
    assert equal(alone, beside)


def test_training_leaves_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """A thread that writes there may not run beside one of torch's, which reads there: that ends the process."""
    model = Net()
    run(model, steps=1)  # what is imported late may say something there
    written = []
    for name in ("putenv", "unsetenv"):
        monkeypatch.setattr(os, name, lambda *what: written.append(what))
    for precision in ("fp32", "bf16"):
        run(model, steps=2, accumulate=2, precision=precision)
    assert not written


def test_a_copy_made_in_training_runs_itself():
    model, copies, seen = Net(dropout=0.0), [], []

    def served(step: int):
        copies.append(copy.deepcopy(model))
        with torch.no_grad():
            copies[-1].second.weight.zero_()
            copies[-1].second.bias.zero_()
            seen.append(copies[-1](batches(step)[0]))
        return batches(step)

    run(model, served, steps=2, precision="bf16")
    assert all(out.dtype == torch.float32 and not out.any() for out in seen)
    assert "forward" not in vars(model)


def test_a_model_trained_again_is_in_its_new_precision():
    model, inner = Net(), []
    model.first.register_forward_hook(lambda module, args, out: inner.append(out.dtype))
    for precision in ("fp32", "bf16", "bf16"):
        run(model, steps=1, precision=precision)
    assert inner == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_modes_are_given_back():
    model = Net().train()
    model.norm.eval()
    inside = []
    model.norm.register_forward_hook(lambda module, *_: inside.append(module.training))
    run(model, steps=1)
    assert (model.training, model.norm.training, inside) == (True, False, [True])


def test_reports_come_every_few_steps_with_their_mean():
    reports: list[tuple[int, float]] = []
    trace, _ = run(Net(), steps=7, report_every=3, on_step=lambda step, value: reports.append((step, value)))
    assert [step for step, _ in reports] == [3, 6, 7]
    assert reports[1][1] == pytest.approx(sum(trace.losses[3:6]) / 3)
    assert reports[2][1] == pytest.approx(trace.losses[6])


def test_reports_come_once_a_second_where_nothing_is_said(monkeypatch):
    clock = itertools.count(0.0, 0.4)  # a look at it is 0.4 seconds; steps that are not reported look once
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    steps: list[int] = []
    run(Net(), steps=12, on_step=lambda step, _: steps.append(step))
    assert steps[-1] == 12
    assert 2 < len(steps) < 8
    assert steps == sorted(set(steps))


def test_what_cannot_be_trained_is_refused():
    model = Net()
    with pytest.raises(ValueError, match="steps=0"):
        train(model, batches, torch.optim.SGD(model.parameters()), lambda step: 1.0, steps=0, loss=loss)
    with pytest.raises(ValueError, match="fp16"):
        run(model, precision="fp16")
    with pytest.raises(ValueError, match="int8"):
        run(model, precision="int8")
    with pytest.raises(FloatingPointError, match="loss of step 2 is nan"):
        run(model, lambda step: (batches(step)[0] * (torch.nan if step == 2 else 1), batches(step)[1]))
    for wrong in ([batches(0)], torch.utils.data.DataLoader([batches(0)])):
        with pytest.raises(ValueError, match=f"functions of the step, .*; got a {type(wrong).__name__}"):
            run(model, wrong)
    with pytest.raises(ValueError, match="got a function and a float"):
        train(model, batches, torch.optim.SGD(model.parameters()), 0.1, steps=1, loss=loss)
    with pytest.raises(ValueError, match=r"first tensor is empty, \(0, 6\)"):
        run(model, lambda step: (batches(0)[0][:0], batches(0)[1][:0]))
    with pytest.raises(ValueError, match="got a dict without a tensor"):
        run(model, lambda step: {"text": ["a"]})
    with pytest.raises(ValueError, match="nothing would be trained"):
        run(model.requires_grad_(False))


def test_batches_hold_tensors_wherever_they_are():
    """A tokenizer's keywords are a mapping that is no dict; names of samples stand beside their tensors."""
    x, labels = batches(0)
    optimizer = torch.optim.SGD((model := Net(dropout=0)).parameters(), lr=0.1)
    traces = [
        train(model, lambda step: (UserDict(x=x), labels), optimizer, float, steps=2, loss=classification_loss()),
        train(model, lambda step: {"n": ["a"], "x": x}, optimizer, float, steps=2, loss=lambda m, b: m(b["x"]).sum()),
    ]
    assert [trace.tokens for trace in traces] == [16, 16]


def test_values_are_compared_one_by_one():
    """torch compares each of (batch,) with each of (batch, 1), and only warns."""
    x, model = batches(0)[0], nn.Linear(6, 1)
    values = x[:, :1] ** 2
    expected = (model(x) - values).square().mean()
    assert torch.equal(regression_loss()(model, (x, values)), expected)
    assert torch.equal(regression_loss()(model, (x, values[:, 0])), expected)
    with pytest.raises(ValueError, match="16 logits for 8 values"):
        regression_loss()(nn.Linear(6, 2), (x, values))


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_damaged_checkpoint_is_named(tmp_path, where):
    path = tmp_path / "c.pt"
    run(Net(), checkpoint=path, steps=2)
    state = path.read_bytes()
    at = state.index(torch.load(path, weights_only=True)["tensors"]["first.weight"].numpy().tobytes()[:8]) + 5
    for place in (at, int(where * len(state))):
        flipped = bytearray(state)
        flipped[place] ^= 4
        path.write_bytes(bytes(flipped))
        if place == at or run_fails(path):
            with pytest.raises(ValueError, match=r"c\.pt is damaged \(.*\); delete it to begin this training anew"):
                run(Net(), checkpoint=path, steps=2)
    path.write_bytes(state[: len(state) // 2])
    with pytest.raises(ValueError, match=r"c\.pt is damaged"):
        run(Net(), checkpoint=path, steps=2)


def run_fails(path) -> bool:
    """Whether a flipped bit lies in what is read; padding is not."""
    try:
        run(Net(), checkpoint=path, steps=2)
    except ValueError:
        return True
    return False


class Time:
    """A clock that goes by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("shared", [False, True])
def test_checkpoints_are_a_few_minutes_apart_whatever_a_step_takes(monkeypatch, shared):
    for pace in (0.01, 1.0, 50.0, 400.0):
        monkeypatch.setattr(sys.modules[Clock.__module__], "time", time := Time())
        clock, saved, asked = Clock(180.0, 0, shared=shared), [], []
        monkeypatch.setattr(ranks, "agree", lambda value, asked=asked: asked.append(value) or value)
        for step in range(1, int(2000 / pace) + 2):
            time.now += pace if step > 1 else 3 * pace  # the first step is slow
            if clock.is_due(step):
                saved.append(time.now)
                time.now += 1.0
                clock.restart(step)
        gaps = [after - before for before, after in zip([100.0, *saved], saved, strict=False)]
        assert len(gaps) > 3
        assert all(180 <= gap <= 180 + 3 * pace + 2 for gap in gaps), gaps
        assert len(asked) <= 20 * len(saved) * shared + 20, "the ranks ask each other seldom"


def test_a_slow_disk_is_written_to_seldom(monkeypatch):
    monkeypatch.setattr(sys.modules[Clock.__module__], "time", time := Time())
    clock = Clock(180.0, 0, shared=False)
    time.now += 180
    assert clock.is_due(1)
    time.now += 60
    clock.restart(1)
    time.now += 1199
    assert not clock.is_due(2)
    time.now += 1
    assert clock.is_due(3)


def test_generators_are_as_before_when_the_last_thread_has_left():
    before, device = torch.get_rng_state(), torch.device("cpu")
    first, second = seeded(0, device), seeded(1, device)
    first.__enter__()
    second.__enter__()
    drawn = torch.get_rng_state()
    first.__exit__(None, None, None)
    assert torch.equal(torch.get_rng_state(), drawn)
    second.__exit__(None, None, None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: nn.Linear(3, 2).weight,
        lambda: nn.init.trunc_normal_(torch.empty(5)),
        lambda: torch.rand(4),
        lambda: torch.randn(4, dtype=torch.float64),
        lambda: torch.randint(9, (4,)),
        lambda: torch.randint(2, 9, (4,)),
        lambda: torch.randperm(9),
        lambda: torch.randn_like(torch.ones(4)),
        lambda: torch.bernoulli(torch.full((9,), 0.5)),
        lambda: nn.functional.dropout(torch.ones(9)),
    ],
)
def test_a_thread_draws_from_a_generator_of_its_own(draw):
    with seeded(7, torch.device("cpu")):
        expected = draw()
    before = torch.get_rng_state()
    with drawn_from(torch.Generator().manual_seed(7)):
        assert torch.equal(draw(), expected)
        own = torch.randn(2, generator=torch.Generator().manual_seed(3))
        assert torch.empty(2, device="meta").normal_().is_meta
    assert torch.equal(own, torch.randn(2, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_is_given_back():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with seeded(-1, torch.device("cpu")):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    with seeded(-1, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
    with seeded(0, torch.device("cpu")):
        assert not torch.equal(torch.rand(4), first)
