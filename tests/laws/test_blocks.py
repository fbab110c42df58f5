"""Laws of capturing, running and observing blocks, on models made for the trap that each test names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prunus.blocks.chain import Arguments, capture, embed, find_blocks, finish, run_block
from prunus.layers import Inputs, find_layers
from prunus.score import observable, observe
from prunus.stream.sources import Memory

D = 6


WAYS: dict[int, Callable[[Any], Any]] = {  # how callers take the hidden state from what a block returns
    0: lambda out: out,
    1: lambda out: out[0],
    2: lambda out: next(hidden for hidden, _ in [out]),
    3: lambda out: next(hidden for hidden, _, _ in [out]),
    4: lambda out: next(hidden for hidden, _, _, _ in [out]),
}


class Block(nn.Module):
    def __init__(self, wrap: int = 0) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.wrap = wrap

    def forward(self, hidden: Tensor, shift: Tensor, pair: tuple[Tensor, Tensor] | None = None) -> Any:
        out = hidden + self.c(torch.tanh(self.a(hidden) * self.b(hidden))) + shift + (pair[0] * pair[1] if pair else 0)
        return (out, None, None, None)[: self.wrap] if self.wrap else out


class Model(nn.Module):
    """Hands on the hidden state the way `keyword` and `wrap` say; every block gets another shift."""

    def __init__(self, wrap: int = 0, keyword: bool = False, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.layers = nn.ModuleList(Block(wrap) for _ in range(blocks))
        self.norm = nn.LayerNorm(D)
        self.wrap, self.keyword = wrap, keyword

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for number, block in enumerate(self.layers):
            hidden = self.between(hidden, number)
            shift = torch.full((D,), float(number))
            pair = (shift + 1, shift)
            out = block(hidden=hidden, shift=shift, pair=pair) if self.keyword else block(hidden, shift, pair=pair)
            hidden = WAYS[self.wrap](out)
        return self.norm(hidden)

    def between(self, hidden: Tensor, number: int) -> Tensor:
        return hidden


class Changing(Model):
    def between(self, hidden: Tensor, number: int) -> Tensor:
        return hidden * 2 if number == 1 else hidden


class Backwards(Model):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in reversed(self.layers):
            hidden = block(hidden, hidden)
        return hidden


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 11, (4, 5))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("wrap", [0, 1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_chain_of_blocks_equals_the_model(ids: Tensor, wrap: int, keyword: bool, blocks: int) -> None:
    model = Model(wrap, keyword, blocks)
    names = find_blocks(model)
    assert names == [f"layers.{number}" for number in range(blocks)]
    hidden, arguments = capture(model, names, ids)
    assert torch.equal(hidden, model.embed(ids))
    assert not hidden.requires_grad
    for name in names:
        hidden = run_block(model.get_submodule(name), hidden, arguments[name])
    assert torch.equal(model.norm(hidden), model(ids))
    assert hidden.requires_grad


class Keeper(nn.Module):
    """A block that leaves keys for later blocks, or reads them, and returns how it chose, which the next one takes."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.fc, self.first = nn.Linear(D, D), first

    def forward(self, hidden: Tensor, chosen: Tensor | None, shared: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.first:
            shared["keys"], chosen = self.fc(hidden), hidden.argmax(-1)
        return hidden + shared["keys"] * chosen.unsqueeze(-1) + self.fc(hidden), chosen


class Keeping(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Keeper(number == 0) for number in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden, chosen, shared = self.embed(ids), None, {}
        for block in self.layers:
            hidden, chosen = block(hidden[:, -0:], chosen, shared)  # a view of the whole
        return self.norm(hidden)


def test_what_blocks_pass_on_beside_the_hidden_state_is_each_batch_s_own(ids: Tensor) -> None:
    model = Keeping()
    names = find_blocks(model)
    hidden, arguments = embed(model, names, ids, source=Memory(model), device=torch.device("cpu"), batch_size=1)
    for name in names:
        block = model.get_submodule(name)
        for _ in range(2):  # once to be observed, once to go on
            leaving = [run_block(block, x, call) for x, call in zip(hidden, arguments[name], strict=True)]
        hidden = leaving
    torch.testing.assert_close(model.norm(torch.cat(hidden)), model(ids))


@pytest.mark.parametrize("again", [0, 2])
def test_one_block_in_two_places_is_refused(again: int) -> None:
    model = Model()
    model.layers[again] = model.layers[1]
    with pytest.raises(ValueError, match="'layers' has one block in several places"):
        find_blocks(model)


def test_capture_leaves_no_trace(ids: Tensor) -> None:
    model = Model()
    own = model.layers[1].forward
    model.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate's hooks do
    patched, expected = model.layers[1].forward, model(ids)
    capture(model, find_blocks(model), ids)
    assert model.layers[1].forward is patched
    assert "forward" not in vars(model.layers[0])
    assert torch.equal(model(ids), expected)


def test_nothing_after_the_last_block_runs(ids: Tensor) -> None:
    model = Model()
    model.norm.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    capture(model, find_blocks(model), ids)


def test_a_first_block_that_takes_tokens_is_refused(ids: Tensor) -> None:
    model = Model()
    model.forward = lambda ids: model.layers[0](ids, None)
    with pytest.raises(
        ValueError, match=r"block 'layers.0' does not receive .* tensor of shape \(4, 5\) and torch.int64"
    ):
        capture(model, find_blocks(model), ids)


def test_blocks_that_return_more_are_refused_with_what_was_looked_for(ids: Tensor) -> None:
    model, ids = Model(wrap=4), ids[:3]  # four rows would be four values
    with pytest.raises(ValueError, match=r"Model does not run as a chain .*layers.0 .. layers.2 .* up to three values"):
        capture(model, find_blocks(model), ids)


def test_a_hidden_state_changed_between_blocks_is_refused(ids: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"block 'layers.1' does not receive the output .* tensor of shape \(4, 5, 6\)"
    ):
        capture(Changing(), find_blocks(Changing()), ids)


def test_blocks_out_of_order_or_never_called_are_refused(ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"called block 'layers.2' where 'layers.0' was expected"):
        capture(Backwards(), find_blocks(Backwards()), ids)
    model = Model()
    model.spare = Block()
    with pytest.raises(ValueError, match=r"Model never called block 'spare'"):
        capture(model, [*find_blocks(model), "spare"], ids)


@pytest.mark.parametrize("order", [(0, 1, 2, 0, 1, 2), (0, 1, 2, 2)])
def test_blocks_that_run_again_after_the_last_one_are_refused(ids: Tensor, order: tuple[int, ...]) -> None:
    """Depth by the same weights several times: what was observed and fitted would be the first pass alone."""
    model = Model()

    def forward(ids: Tensor) -> Tensor:
        hidden = model.embed(ids)
        for number in order:
            hidden = model.layers[number](hidden, torch.zeros(D))
        return model.norm(hidden)

    model.forward = forward
    how: dict[str, Any] = {"source": Memory(model), "device": torch.device("cpu"), "batch_size": 1}
    again = rf"Model runs block 'layers.{order[3]}' again after the last one, 'layers.2'.* `prunus.prune`"
    with pytest.raises(ValueError, match=again):
        embed(model, find_blocks(model), ids, **how)
    with pytest.raises(ValueError, match=again):
        finish(model, find_blocks(model), ids, model.embed(ids))


def test_what_follows_the_blocks_may_fail_where_it_is_not_needed(ids: Tensor) -> None:
    model = Model()
    model.norm = nn.LayerNorm(D + 1)
    how: dict[str, Any] = {"source": Memory(model), "device": torch.device("cpu"), "batch_size": 1}
    assert len(embed(model, find_blocks(model), ids, **how)[0]) == len(ids)


def test_an_error_before_the_first_block_passes_through() -> None:
    model = Model()
    with pytest.raises(IndexError):
        capture(model, find_blocks(model), torch.full((1, 2), 99))


@pytest.mark.parametrize("output", [None, {"hidden": 0}, torch.zeros(2, 2)])
def test_a_block_that_returns_something_else_is_refused(output: Any) -> None:
    class Odd(nn.Module):
        def forward(self, hidden: Tensor) -> Any:
            return output

    with pytest.raises(ValueError, match=r"block Odd returned .*; a hidden state of shape \(1, 3\)"):
        run_block(Odd(), torch.zeros(1, 3), Arguments())


def test_arguments_move_inside_containers() -> None:
    given = Arguments(
        (torch.zeros(1), None), {"pair": (torch.zeros(2), [torch.zeros(3)]), "each": {"x": torch.zeros(4)}}
    )
    moved = given.to("meta")
    assert moved.args[0].is_meta
    assert moved.args[1] is None
    assert moved.kwargs["pair"][0].is_meta
    assert moved.kwargs["pair"][1][0].is_meta
    assert moved.kwargs["each"]["x"].is_meta


def test_blocks_of_several_classes_are_refused() -> None:
    model = Model()
    model.layers[1] = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    with pytest.raises(ValueError, match=r"'layers' mixes Block, Sequential"):
        find_blocks(model)


def test_blocks_of_related_classes_are_found() -> None:
    class Other(Block):
        pass

    model = Model()
    model.layers[1] = Other()
    assert len(find_blocks(model)) == 3


def test_a_list_of_less_than_half_of_the_weights_is_refused() -> None:
    model = Model()
    model.big = nn.Linear(100, 100)
    with pytest.raises(ValueError, match=r"none holds more than half. Found: 'layers' \(3%\)"):
        find_blocks(model)


def test_the_outer_list_is_chosen_not_the_experts_inside() -> None:
    model = Model()
    for block in model.layers:
        block.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(20))
    assert find_blocks(model) == ["layers.0", "layers.1", "layers.2"]


def watched(block: nn.Module, *xs: Tensor, gram: bool = True, **arguments: Any) -> dict[str, Inputs]:
    with observe(block, find_layers(block, **arguments), gram=gram) as inputs:
        for x in xs:
            block(x, torch.zeros(D))
    return inputs


def test_sharing_follows_the_tensor_not_its_values() -> None:
    block = Block()
    inputs = watched(block, torch.ones(2, D), torch.ones(3, D))
    assert inputs["a"] is inputs["b"]
    assert inputs["a"].tokens == 5
    assert inputs["c"] is not inputs["a"]
    block.forward = lambda x, _: block.b(block.a(x) * 0 + x)  # equal values, another tensor
    inputs = watched(block, torch.ones(2, D))
    assert inputs["a"] is not inputs["b"]
    assert torch.equal(inputs["a"].squares, inputs["b"].squares)
    assert inputs["c"].tokens == 0
    assert inputs["c"].gram is not None
    assert inputs["c"].gram.shape == (D, D)


def test_a_tensor_changed_in_place_is_not_shared() -> None:
    block = Block()
    block.forward = lambda x, _: block.a(x) + block.b(x.mul_(2))
    with torch.no_grad():
        inputs = watched(block, torch.ones(2, D))
    assert inputs["b"].squares.tolist() == [8.0] * D
    assert inputs["a"].squares.tolist() == [2.0] * D


def test_layers_that_stop_sharing_are_reported() -> None:
    block = Block()
    block.forward = lambda x, _: block.a(x) + block.b(x if len(x) == 2 else x + 1)
    with pytest.raises(ValueError, match=r"'b' shared its input with 'a' in the first forward and no longer does"):
        watched(block, torch.ones(2, D), torch.ones(3, D))
    block.forward = lambda x, _: (block.a(x), block.b(x) if len(x) == 2 else None)
    with pytest.raises(ValueError, match=r"'b' was called 1 times and 'a', whose input it shared, 2 times"):
        watched(block, torch.ones(2, D), torch.ones(3, D))


def test_a_layer_that_joins_later_has_its_own_sums() -> None:
    block, kept, seen = Block(), torch.ones(2, D), []

    def forward(x: Tensor, _: Tensor) -> None:
        if seen:
            block.b(kept)
        block.a(kept)
        seen.append(x)

    block.forward = forward
    inputs = watched(block, kept, kept)
    assert (inputs["a"].tokens, inputs["b"].tokens) == (4, 2)
    block.forward = lambda x, _: (block.a(x + 1), block.a(x), block.b(x))
    inputs = watched(block, kept)
    assert (inputs["a"].tokens, inputs["b"].tokens) == (4, 2)


def test_a_layer_called_twice_adds_twice() -> None:
    block = Block()
    block.forward = lambda x, _: block.a(block.a(x) * 0 + 3 * x)
    inputs = watched(block, torch.ones(2, D))
    assert inputs["a"].tokens == 4
    assert inputs["a"].squares.tolist() == [20.0] * D


def test_hooks_are_gone_afterwards_and_after_an_error() -> None:
    block = Block()
    with pytest.raises(RuntimeError, match="stop"), observe(block, find_layers(block), gram=False):
        raise RuntimeError("stop")
    inputs = watched(block, torch.ones(2, D))
    block(torch.ones(2, D), torch.zeros(D))
    assert inputs["a"].tokens == 2
    assert all(not module._forward_pre_hooks for module in block.modules())


def test_views_of_another_block_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"for block Block, such as '0', are not all layers of it"),
        observe(Block(), find_layers(nn.Sequential(nn.Linear(D, D))), gram=False),
    ):
        pass


def test_views_may_carry_the_name_of_the_block() -> None:
    block = nn.ModuleDict({"b": nn.ModuleDict({"fc": nn.Linear(D, D)}), "fc": nn.Linear(D, D)})
    block.forward = lambda x: block["fc"](x) + block["b"]["fc"](x + 1)  # type: ignore[index,operator]
    views = find_layers(block, prefix="a.b")  # "a.b.fc" also ends in "b.fc"
    with observe(block, views, gram=False) as inputs:
        block(torch.ones(1, D))
    assert inputs["a.b.fc"].squares[0] == 1
    assert inputs["a.b.b.fc"].squares[0] == 4

    with pytest.raises(ValueError, match="fit its layers in several ways"), observe(block, views[:1], gram=False):
        pass


CONVOLUTIONS = [
    nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False),
    nn.Conv2d(2, 4, (3, 2), padding="same", dilation=(2, 1), bias=False),
    nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=False),
    nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, bias=False),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_gram_of_a_convolution_gives_its_output_energy(convolution: nn.Module) -> None:
    x = torch.randn(3, 2, 8, 7) if isinstance(convolution, nn.Conv2d) else torch.randn(3, 2, 9)
    block = nn.Sequential(convolution)
    (view,) = find_layers(block)
    with observe(block, [view], gram=True) as inputs:
        y = block(x)
    matrix = view.matrix(convolution.weight)  # type: ignore[arg-type]
    gram = inputs["0"].gram
    assert gram is not None
    energy = torch.einsum("oi,ij,oj->o", matrix, gram, matrix)  # sum over positions of (w . x)^2
    torch.testing.assert_close(energy, y.square().movedim(1, 0).flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    assert inputs["0"].tokens == y[:, 0].numel()


def test_a_grouped_convolution_cannot_be_observed() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with (
        pytest.raises(ValueError, match=r"'0' \(Conv2d, 2 groups\) cannot be observed.*exclude=\['0'\]"),
        observe(block, find_layers(block), gram=False),
    ):
        pass


def test_what_cannot_be_observed_stays_dense_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    block = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 8, 1), nn.Conv3d(8, 8, 1))
    views = find_layers(block)
    assert [view.name for view in observable(block, views)] == ["1"]
    assert "0, 2 stay dense" in caplog.text
    assert [view.name for view in observable(block, views, include=["*"])] == ["1"]
    with pytest.raises(ValueError, match=r"'0' .* cannot be observed"):
        observable(block, views, include=["0"])


class Stack(nn.Module):
    """Experts multiplied as `product(x, weight)` says; tokens are dealt out in turn."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], transposed: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, D, 4) if transposed else torch.randn(3, 4, D))
        self.is_transposed = transposed
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.product(x[i::3], self.up[torch.tensor(i)]).sum() for i in range(2)])


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "linear": (F.linear, False),
    "linear-keywords": (lambda x, w: F.linear(x, weight=w, bias=torch.zeros(4)), False),
    "matmul-of-transpose": (lambda x, w: x @ w.T, False),
    "weight-on-the-left": (lambda x, w: w @ x.T, False),
    "mm": (torch.mm, True),
    "method": (lambda x, w: x.matmul(w), True),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(4), x, w), True),
    "bmm": (lambda x, w: torch.bmm(x[None], w[None]), True),
    "halves": (lambda x, w: torch.cat([F.linear(x, each) for each in w.chunk(2)], -1), False),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_every_kind_of_product_with_an_expert_is_seen_once(kind: str) -> None:
    stack = Stack(*PRODUCTS[kind])
    x = torch.randn(7, D)
    with observe(stack, find_layers(stack), gram=True) as inputs:
        stack(x)
    for expert in range(2):
        rows = x[expert::3]
        torch.testing.assert_close(inputs[f"up[{expert}]"].gram, rows.T @ rows)
        assert inputs[f"up[{expert}]"].tokens == len(rows)
    assert inputs["up[2]"].tokens == 0


def test_one_product_over_all_experts_counts_only_rows_that_are_not_zero() -> None:
    stack = Stack(torch.mm, True)
    x = torch.randn(3, 5, D)
    x[1, 2:] = 0
    x[2] = 0
    stack.forward = lambda x: torch.bmm(x, stack.up)
    with observe(stack, find_layers(stack), gram=True) as inputs:
        stack(x)
    assert [inputs[f"up[{expert}]"].tokens for expert in range(3)] == [5, 2, 0]
    torch.testing.assert_close(inputs["up[1]"].gram, x[1].T @ x[1])


def test_experts_whose_products_are_not_seen_are_refused() -> None:
    stack = Stack(lambda x, w: torch.einsum("ti,oi->to", x, w), False)
    with (
        pytest.raises(ValueError, match=r"experts 'up' ran 1 times, but no product .* exclude=\['up'\]"),
        observe(stack, find_layers(stack), gram=False),
    ):
        stack(torch.randn(7, D))


def test_a_wrong_is_transposed_is_found() -> None:
    stack = Stack(F.linear, False)
    stack.up = nn.Parameter(torch.randn(3, D, D))
    stack.is_transposed = True
    with (
        pytest.raises(ValueError, match=r"experts 'up' are declared with is_transposed=True.*Set is_transposed=False"),
        observe(stack, find_layers(stack), gram=False),
    ):
        stack(torch.randn(7, D))


def test_views_beside_a_stack_of_unknown_orientation_are_found() -> None:
    """The remedy that the refusal names: its other layers are observed."""
    block = nn.ModuleDict({"fc": nn.Linear(6, 4), "experts": Stack(F.linear, False)})
    del block["experts"].is_transposed
    views = find_layers(block, exclude=["experts.*"])
    with observe(block, views, gram=False) as inputs:
        block["fc"](torch.ones(2, 6))
    assert list(inputs) == ["fc"]


def test_experts_implementation_is_eager_meanwhile_and_put_back() -> None:
    stack = Stack(F.linear, False)
    stack.config = PreTrainedConfig(experts_implementation="grouped_mm")
    with observe(stack, find_layers(stack), gram=False):
        assert stack.config._experts_implementation == "eager"
    assert stack.config._experts_implementation == "grouped_mm"
    with pytest.raises(RuntimeError, match="stop"), observe(stack, find_layers(stack), gram=False):
        raise RuntimeError("stop")
    assert stack.config._experts_implementation == "grouped_mm"
