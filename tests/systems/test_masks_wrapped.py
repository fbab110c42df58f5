"""Masks beside a model that is compiled, replicated or sharded: the zeros and weights of the textbook's masked run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from prunus import masks as masks_module
from prunus.during import GMP
from prunus.kernels.switch import kernels
from prunus.masks import Masks
from prunus.prune import prune
from prunus.soup import imp
from prunus.train import Trace, train
from tests.processes import run_ranks

NESTEROV = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
HEAVY = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3))


def masks_of(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(1)
    weights = {name: each for name, each in model.named_parameters() if each.ndim > 1}
    return Masks({name: torch.rand(each.shape, generator=generator) < 0.4 for name, each in weights.items()})


def batch(step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 2, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    return x[rows], y[rows]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> None:
    for step in steps:
        x, y = batch(step, rows)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def textbook(model: nn.Module, masks: Masks, options: dict[str, float | bool], steps: int) -> None:
    """SGD written out (Sutskever et al. 2013), with weights, gradients and momentum multiplied by the mask."""
    velocity: dict[str, Tensor] = {}
    keep = {name: masks[name].float() if name in masks else 1.0 for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.mul_(keep[name])
    for step in range(steps):
        x, y = batch(step)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for name, each in model.named_parameters():
                assert each.grad is not None
                slope = (each.grad + options["weight_decay"] * each) * keep[name]
                velocity[name] = options["momentum"] * velocity[name] + slope if name in velocity else slope
                change = slope + options["momentum"] * velocity[name] if options.get("nesterov") else velocity[name]
                each.sub_(options["lr"] * change).mul_(keep[name])


def is_positive_zero(tensor: Tensor) -> bool:
    return not bool(tensor.count_nonzero()) and not bool(tensor.signbit().any())


def check_zeros(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        for value in (parameter.detach(), *optimizer.state[parameter].values()):
            if isinstance(value, Tensor) and value.shape == mask.shape:
                assert is_positive_zero(value[~mask])


@pytest.mark.parametrize("large", [1 << 22, 30], ids=["together", "one by one"])
@pytest.mark.parametrize("options", [HEAVY, NESTEROV], ids=["momentum", "nesterov"])
def test_a_held_run_is_the_run_that_masks_everything(
    options: dict[str, float | bool], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "_LARGE", large)
    model, expected = network(), network()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    masks.hold(model, optimizer)
    run(model, optimizer, range(100))
    textbook(expected, masks, options, 100)
    assert not torch.equal(model.get_parameter("5.weight"), network().get_parameter("5.weight") * masks["5.weight"])
    for name, each in model.named_parameters():
        torch.testing.assert_close(each, expected.get_parameter(name), rtol=1e-4, atol=1e-6)
    check_zeros(model, masks, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("large", [1 << 22, 1], ids=["together", "one by one"])
def test_nothing_survives_under_the_mask_and_nothing_beside_it_changes(
    dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "_LARGE", large)
    model = nn.Conv2d(4, 6, 3).to(dtype).to(memory_format=torch.channels_last)
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    masks.hold(model, optimizer)
    before = model.weight.detach().clone()
    pruned = (~masks["weight"]).nonzero()
    for place, value in enumerate([float("nan"), float("inf"), -float("inf"), -0.0, 1.0]):
        model.weight.grad = torch.ones_like(model.weight)
        model.weight.grad[tuple(pruned[place])] = value
        with torch.no_grad():
            model.weight[tuple(pruned[place + 5])] = value
        optimizer.step()
        check_zeros(model, masks, optimizer)
    assert torch.equal(model.weight, before)
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    assert torch.equal(momentum != 0, masks["weight"])


def test_a_parameter_with_two_names_obeys_both_masks() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4, bias=False), "two": nn.Linear(4, 4, bias=False)})
    model["two"].weight = model["one"].weight
    one, two = torch.eye(4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool).tril()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Masks({"one.weight": one | two.T, "two.weight": two}).hold(model, optimizer)
    model["one"].weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(model["one"].weight != 0, (one | two.T) & two)


def test_state_of_another_width_is_zeroed_too() -> None:
    model = nn.Linear(3, 3).bfloat16()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["moment"] = torch.ones(3, 3, dtype=torch.float32)
    masks.hold(model, optimizer)
    assert torch.equal(optimizer.state[model.weight]["moment"], masks["weight"].float())


def test_a_run_goes_on_from_state_dicts() -> None:
    """The masks come from a file, the rest from the ordinary state dicts of an ordinary model."""
    whole, first, second = network(), network(), network()
    masks = masks_of(whole)
    optimizers = [torch.optim.SGD(each.parameters(), **NESTEROV) for each in (whole, first, second)]
    plain = set(whole.state_dict())
    masks.hold(whole, optimizers[0])
    run(whole, optimizers[0], range(20))
    masks.hold(first, optimizers[1])
    run(first, optimizers[1], range(10))
    assert set(first.state_dict()) == plain
    masks.hold(second, optimizers[2])  # before the state is replaced
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    run(second, optimizers[2], range(10, 20))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    check_zeros(second, masks, optimizers[2])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo asks every input for its .grad
@pytest.mark.parametrize("part", [None, "3"], ids=["whole", "submodule"])
def test_a_compiled_model_is_masked_by_its_ordinary_names(part: str | None) -> None:
    model, plain = network(), network()
    masks = masks_of(plain)
    held = torch.optim.SGD(plain.parameters(), **HEAVY)
    masks.hold(plain, held)
    run(plain, held, range(5))
    if part is None:
        compiled: nn.Module = torch.compile(model, backend="eager")
    else:
        model[int(part)] = torch.compile(model[int(part)], backend="eager")
        compiled = model
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    optimizer = torch.optim.SGD(compiled.parameters(), **HEAVY)
    masks.hold(compiled, optimizer)
    run(compiled, optimizer, range(5))
    masks.check(compiled)
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        next(compiled.parameters()).fill_(1.0)
    with pytest.raises(ValueError, match=r"'0\.weight' has \d+ nonzero"):
        masks.check(compiled)
    masks.apply_(compiled)
    masks.check(compiled)
    named = Masks(
        {name: masks[name.replace("_orig_mod.", "")] for name, p in compiled.named_parameters() if p.ndim > 1}
    )
    named.check(compiled)
    named.check(plain)  # masks made of a compiled model fit the ordinary one


def test_masks_of_phases_are_those_of_the_ordinary_model() -> None:
    def select(model: nn.Module, sparsity: float, within: Masks | None) -> Masks:
        return prune(model, sparsity=sparsity, within=within)

    found = [
        imp(model, sparsity=0.8, phases=2, select=select, retrain=lambda _: Trace())
        for model in (network(), torch.compile(network(), backend="eager"), nn.DataParallel(network()))
    ]
    assert found[0] == found[1] == found[2]


def test_a_sharded_model_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="'0' is sharded: prune and save the model before it is"):
            prune(model, sparsity=0.5)
        optimizer = torch.optim.SGD(model.parameters())
        for world, during in (("1", [GMP(0.5)]), ("2", [])):
            monkeypatch.setenv("WORLD_SIZE", world)
            with pytest.raises(ValueError, match=r"'0\.weight' is sharded: .* before fully_shard; train shards it"):
                train(model, lambda step: pytest.fail("no batch"), optimizer, lambda _: 1.0, steps=1, during=during)
    finally:
        dist.destroy_process_group()


# Two ranks


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["replicated", "sharded", "replicated and compiled"])
def test_two_ranks_train_the_masked_model_of_one(tmp_path: Path, wrapper: str) -> None:
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), **NESTEROV)
    masks.hold(model, optimizer)
    run(model, optimizer, range(20))
    run_ranks(rank, wrapper, tmp_path, folder=tmp_path)
    found = torch.load(tmp_path / "model.pt")
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert all(is_positive_zero(found[name][~mask]) for name, mask in masks.items())


def rank(wrapper: str, folder: Path) -> None:
    """Train half of each batch, check the zeros of this rank's part, save the whole."""
    inner = network()
    masks = masks_of(inner)
    model: nn.Module = inner
    if wrapper == "sharded":
        mesh = init_device_mesh("cpu", (2,))
        for layer in (inner[3], inner):
            fully_shard(layer, mesh=mesh)
    else:
        compiled = "compiled" in wrapper
        model = DistributedDataParallel(torch.compile(inner, backend="eager") if compiled else inner)
        model = torch.compile(model, backend="eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), **NESTEROV)
    masks.hold(model, optimizer)
    share = 4 * dist.get_rank()
    run(model, optimizer, range(20), slice(share, share + 4))
    masks.check(model)
    values = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
    assert len(values) == len(list(inner.parameters()))
    assert all(isinstance(each, DTensor) for each in values) == (wrapper == "sharded")
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in inner.state_dict().items()
    }
    for name, mask in masks.items():
        momentum = optimizer.state[inner.get_parameter(name)]["momentum_buffer"]
        momentum = momentum.full_tensor() if isinstance(momentum, DTensor) else momentum
        assert is_positive_zero(momentum[~mask])
    refuse_what_is_not_zero(model, masks)
    if dist.get_rank() == 0:
        torch.save(whole, folder / "model.pt")
    dist.barrier()


def refuse_what_is_not_zero(model: nn.Module, masks: Masks) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(ValueError, match="nonzero weights under its mask"):
        masks.check(model)
    masks.apply_(model)
    masks.check(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_keeps_the_zeros() -> None:
    model = network().cuda().to(memory_format=torch.channels_last)
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), **NESTEROV)
    masks.hold(model, optimizer)
    x, y = (each.cuda() for each in batch(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = model.get_parameter("3.weight").detach().clone()
    for _ in range(5):
        graph.replay()
    assert not torch.equal(before, model.get_parameter("3.weight"))
    check_zeros(model, Masks({name: mask.cuda() for name, mask in masks.items()}), optimizer)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled where there is a GPU")
        ),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_fused_adamw_steps_and_zeroes_at_once(device: str, decay: float) -> None:
    """Against AdamW of float64 weights that are multiplied by their masks; a gradient under a mask may be anything."""
    pytest.importorskip("triton")
    model = network().to(device)
    masks, exact = masks_of(model), copy.deepcopy(model).double().cpu()
    masks = Masks({name: mask.mT.contiguous().mT if mask.ndim > 1 else mask for name, mask in masks.items()})
    plain = torch.optim.AdamW(exact.parameters(), lr=0.01, weight_decay=decay)
    fused = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01, device=device), weight_decay=decay, fused=True)
    masks.apply_(exact)
    with kernels(True):
        held = masks.hold(model, fused)
        for step in range(5):
            for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
                g = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
                other.grad = (g * masks[name] if name in masks else g).double()
                one.grad = (torch.where(masks[name], g, torch.nan) if name in masks else g).to(device)
            fused.step()
            plain.step()
            assert all((each.grad is None) == (name in masks) for name, each in model.named_parameters())
    check_zeros(model, Masks({name: mask.to(device) for name, mask in masks.items()}), fused)
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-5, atol=1e-6)
        for key, value in plain.state[other].items():
            torch.testing.assert_close(fused.state[one][key].double().cpu(), value.double(), rtol=1e-5, atol=1e-7)
    held.remove()
    model.get_parameter("3.weight").grad = torch.ones_like(model.get_parameter("3.weight"))
    fused.step()
    assert model.get_parameter("3.weight").all()


def test_an_adamw_without_momentum_takes_its_own_steps() -> None:
    pytest.importorskip("triton")
    from prunus.kernels import takes_steps

    parameters = [torch.nn.Parameter(torch.ones(2))]
    taken = [
        takes_steps(torch.optim.AdamW(parameters, betas=betas, fused=True)) for betas in ((0.9, 0.999), (0.0, 0.999))
    ]
    assert taken == [True, False]
