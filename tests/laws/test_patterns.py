"""Every pattern keeps exactly what was asked, ties go to lower indices, and model-wide selection equals one sort."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus import admm, patterns, prune, sparsegpt
from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Block, Pairs, Rows, Unstructured, check_sparsity, kept_of, parse, selection
from prunus.patterns.selection import keep_largest, keep_largest_of_all, select_global_share

INF = float("inf")
# ties, both zeros, a float32 denormal, the float16 extremes, infinities
VALUES = [0.0, -0.0, 1.0, 1.0, -1.0, 0.5, 1e-40, 6e-8, 65504.0, -65504.0, INF, -INF]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
quick = settings(deadline=None, max_examples=80)


@st.composite
def scores(draw: st.DrawFn, width: int = 1, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(1, 24 // width)) * width
    values = st.sampled_from(VALUES) | st.floats(-3, 3, width=16)
    numbers = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(numbers, dtype=torch.float64).to(draw(st.sampled_from(dtypes))).view(rows, columns)


@pytest.fixture(params=[None, 3], ids=["whole", "chunked"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(selection, "_CHUNK", request.param)


def first_best(numbers: list[float], kept: int) -> set[int]:
    """The oracle: indices of the `kept` largest by one stable sort."""
    return set(sorted(range(len(numbers)), key=lambda i: -numbers[i])[:kept])


def true_indices(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "pattern",
    [Unstructured("row"), Unstructured("layer"), NM(2, 4), Pairs(2, 4), Block(2, 2), Block(1, 4), Rows()],
    ids=repr,
)
def test_by_row_says_whether_other_rows_matter(pattern: patterns.Pattern):
    generator, kept = torch.Generator().manual_seed(0), pattern.counts((4, 8), 0.5)
    same = []
    for score in torch.rand(5, 4, 8, generator=generator):  # of one, other rows may not matter by chance
        masks = [pattern.mask(torch.cat([score[:2], scale * score[2:]]), kept) for scale in (1.0, 100.0)]
        same.append(torch.equal(masks[0][:2], masks[1][:2]))
    assert all(same) == pattern.by_row


@quick
@given(score=scores(), share=st.floats(0, 1))
def test_layer_scope_equals_a_stable_sort(score: Tensor, share: float):
    kept = round(share * score.numel())
    mask = Unstructured("layer").mask(score, kept)
    assert mask.dtype == torch.bool
    assert mask.shape == score.shape
    assert true_indices(mask) == first_best(score.flatten().tolist(), kept)


@quick
@given(score=scores(), share=st.floats(0, 1))
def test_row_scope_equals_a_stable_sort_of_each_row(score: Tensor, share: float):
    kept = round(share * score.numel())
    mask = Unstructured("row").mask(score, kept)
    each, extra = divmod(kept, len(score))
    for i, row in enumerate(score):
        assert true_indices(mask[i]) == first_best(row.tolist(), each + (i < extra))


@quick
@given(data=st.data(), nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 3)]))
def test_nm_equals_a_stable_sort_of_each_group(data: st.DataObject, nm: tuple[int, int]):
    pattern = NM(*nm)
    score = data.draw(scores(width=nm[1]))
    mask = pattern.mask(score, pattern.counts((score.shape[0], score.shape[1])))
    groups, chosen = score.reshape(-1, nm[1]), mask.reshape(-1, nm[1])
    for group, keep in zip(groups, chosen, strict=True):
        assert true_indices(keep) == first_best(group.tolist(), nm[0])


@quick
@given(data=st.data(), tile=st.sampled_from([(1, 2), (2, 1), (2, 3), (1, 1)]), share=st.floats(0, 1))
def test_blocks_equal_a_stable_sort_of_their_tiles(data: st.DataObject, tile: tuple[int, int], share: float):
    rows, columns = (data.draw(st.integers(1, 3)) * size for size in tile)
    numbers = st.lists(st.sampled_from([0.0, 1.0, 2.0, -INF]), min_size=rows * columns, max_size=rows * columns)
    score = torch.tensor(data.draw(numbers)).view(rows, columns)
    places = [(i, j) for i in range(0, rows, tile[0]) for j in range(0, columns, tile[1])]
    kept = round(share * len(places))
    mask = Block(*tile).mask(score, kept * tile[0] * tile[1])
    sums = [score[i : i + tile[0], j : j + tile[1]].sum().item() for i, j in places]
    best = first_best(sums, kept)
    for place, (i, j) in enumerate(places):
        assert mask[i : i + tile[0], j : j + tile[1]].tolist() == [[place in best] * tile[1]] * tile[0]
    assert torch.equal(Block(1, columns).mask(score, columns), Rows().mask(score, columns))


@pytest.mark.parametrize("pattern", [Block(2, 4), Rows()], ids=str)
def test_a_tile_pruned_in_part_ranks_as_pruned(pattern: patterns.Pattern):
    score = torch.full((4, 8), 5.0)
    score[0, 0], score[2:] = -INF, 1.0
    assert pattern.pool(score)[0, :4].tolist() == [-INF] * 4
    assert not pattern.mask(score, pattern.unit((4, 8)))[0, 0]
    score[0, 1] = INF
    assert pattern.pool(score)[0, :4].tolist() == [-INF] * 4


def test_tiles_name_the_layer_that_they_do_not_cover():
    with pytest.raises(ValueError, match=r"block 4x4 needs rows .* by 4; 'conv1' is 16x27. .*exclude=\[\"conv1\"\]"):
        Block(4, 4).counts((16, 27), 0.5, name="conv1")
    with pytest.raises(ValueError, match="block 2x2 keeps multiples of 4 entries of 'fc1', not 3"):
        Block(2, 2).mask(torch.ones(2, 4), 3, name="fc1")
    with pytest.raises(ValueError, match="filters keeps multiples of 4 entries of this layer, not 3"):
        Rows().mask(torch.ones(2, 4), 3)
    with pytest.raises(ValueError, match="at least 1 row and 1 column; got 0x4"):
        Block(0, 4)


def test_tiles_are_split_between_blocks_of_columns_or_refused():
    assert Block(2, 2).split((4, 8), 12, [0, 4, 8]) == [8, 4]
    with pytest.raises(ValueError, match=r"tiles of 2 columns .* in steps of 3: set a blocksize that 2 divides"):
        Block(2, 2).split((4, 8), 12, [0, 3, 8])
    assert Rows().split((4, 8), 16, [0, 8]) == [16]
    with pytest.raises(ValueError, match="set a blocksize that 8 divides"):
        Rows().split((4, 8), 16, [0, 4, 8])


@pytest.mark.parametrize("pattern", [Unstructured("layer"), Unstructured("row"), Block(1, 4), Rows(), NM(2, 4)])
@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_chunks_change_nothing(pattern: patterns.Pattern, levels: int):
    score = torch.randint(levels, (5, 8), generator=torch.Generator().manual_seed(0)).float()
    kept = pattern.counts((5, 8), None if pattern.sparsity else 0.6)
    mask = pattern.mask(score, kept)
    assert int(mask.sum()) == kept
    if pattern == Unstructured("layer"):
        assert true_indices(mask) == first_best(score.flatten().tolist(), kept)
    for group, keep in zip(score.view(-1, 4), mask.view(-1, 4), strict=True):
        assert pattern.width is None or true_indices(keep) == first_best(group.tolist(), 2)
    for i, row in enumerate(score):
        assert pattern != Unstructured("row") or true_indices(mask[i]) == first_best(row.tolist(), 3 + (i < 1))


@pytest.mark.parametrize(
    "pattern", [Unstructured("layer"), Unstructured("row"), Block(2, 4), Rows(), NM(2, 4), Pairs(2, 4)]
)
def test_a_constant_score_prunes_no_more_than_asked(pattern: patterns.Pattern):
    kept = pattern.counts((6, 8), 0.5)
    assert int(pattern.mask(torch.ones(6, 8), kept).sum()) == kept == 24


@pytest.mark.parametrize(
    "pattern", [Unstructured("layer"), Unstructured("row"), Block(2, 4), Rows(), NM(1, 4), Pairs(1, 4)]
)
def test_masks_are_idempotent_and_follow_transposed_storage(pattern: patterns.Pattern):
    score = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) + 0.1
    kept = pattern.counts((8, 8), 0.75)
    mask = pattern.mask(score, kept)
    assert torch.equal(pattern.mask(score * mask, kept), mask)
    assert torch.equal(pattern.mask(score.T.contiguous().T, kept), mask)


@pytest.mark.parametrize(
    "pattern", [Unstructured("layer"), Unstructured("row"), Block(1, 4), Rows(), NM(2, 4), Pairs(2, 4)]
)
def test_masks_follow_a_permutation_of_rows(pattern: patterns.Pattern):
    generator = torch.Generator().manual_seed(2)
    score, order = torch.rand(6, 8, generator=generator), torch.randperm(6, generator=generator)
    kept = pattern.counts((6, 8), 0.5)
    assert torch.equal(pattern.mask(score[order], kept), pattern.mask(score, kept)[order])


@pytest.mark.parametrize("pattern", [Unstructured("layer"), Unstructured("row"), Block(2, 4), Rows(), NM(2, 4)])
@pytest.mark.parametrize("bad", [float("nan"), None])
def test_nan_and_integers_are_refused(pattern: patterns.Pattern, bad: float | None):
    score = torch.ones(2, 4) if bad else torch.ones(2, 4, dtype=torch.int64)
    if bad:
        score[1, 2] = bad
    with pytest.raises(ValueError, match="NaN" if bad else "floating"):
        pattern.mask(score, 4)


@pytest.mark.parametrize("kept", [-1, 9])
def test_a_count_outside_the_matrix_is_refused(kept: int):
    with pytest.raises(ValueError, match=f"cannot keep {kept} of the 8 entries of 'fc1'"):
        Unstructured("layer").mask(torch.ones(2, 4), kept, name="fc1")


@quick
@given(
    rows=st.integers(1, 6),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    share=st.floats(0, 1),
    per=st.sampled_from(["row", "layer"]),
)
@example(rows=2, widths=[1, 2], share=5 / 6, per="row")  # the first block is full: the remainder goes to the next
def test_split_adds_up_and_leaves_room(rows: int, widths: list[int], share: float, per: str):
    edges = [sum(widths[:i]) for i in range(len(widths) + 1)]
    kept = round(share * rows * edges[-1])
    pattern = Unstructured(per)  # type: ignore[arg-type]
    counts = pattern.split((rows, edges[-1]), kept, edges)
    assert sum(counts) == kept
    score = torch.rand(rows, edges[-1], generator=torch.Generator().manual_seed(3))
    blocks = [pattern.mask(score[:, a:b], count) for (a, b), count in zip(pairwise(edges), counts, strict=True)]
    mask = torch.cat(blocks, dim=1)
    assert int(mask.sum()) == kept
    if per == "row":
        each, extra = divmod(kept, rows)
        assert mask.sum(1).tolist() == [each + (i < extra) for i in range(rows)]


def test_split_rounds_to_nearest():
    assert Unstructured("layer").split((1, 10), 5, [0, 3, 10]) == [2, 3]
    assert Unstructured("layer").split((1, 10), 4, [0, 3, 6, 10]) == [1, 1, 2]
    assert Unstructured("row").split((2, 10), 11, [0, 3, 10]) == [5, 6]


def test_nm_split_keeps_its_share_of_every_block():
    assert NM(1, 4).split((3, 12), 9, [0, 8, 12]) == [6, 3]


def test_counts():
    assert kept_of(10, 0.7) == 3
    assert kept_of(3073, 0.5) == 3073 - 1536
    assert Unstructured("row").counts((3, 5), 0.7) == 15 - 10
    assert NM(2, 4).counts((3, 8), None) == NM(2, 4).counts((3, 8), 0.5) == 12


@pytest.mark.parametrize("sparsity", [1.5, 1.0, -0.1, float("nan")])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity: float):
    for pattern in (Unstructured("layer"), NM(2, 4)):
        with pytest.raises(ValueError, match="sparsity"):
            pattern.counts((4, 4), sparsity)
        with pytest.raises(ValueError, match="sparsity"):
            check_sparsity(pattern, sparsity)


def test_nm_refuses_a_sparsity_that_is_not_its_own():
    with pytest.raises(ValueError, match=r"2:4 fixes the sparsity at 0\.5; got 0\.7"):
        check_sparsity(NM(2, 4), 0.7)
    assert check_sparsity(NM(2, 4), None) == check_sparsity(NM(2, 4), 0.5) == 0.5
    assert check_sparsity(NM(1, 3), 0.667) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="needs a sparsity"):
        check_sparsity(Unstructured("row"), None)


def test_the_name_of_a_pattern_is_refused():
    with pytest.raises(ValueError, match=r"'2:4' is no pattern. A pattern is a value, such as NM\(2, 4\)"):
        prune(nn.Linear(8, 8), pattern="2:4")  # type: ignore[arg-type]


def test_nm_names_the_layer_that_it_does_not_fit():
    with pytest.raises(ValueError, match=r"2:4 needs columns divisible by 4; 'fc1' has 30.*exclude=\[\"fc1\"\]"):
        NM(2, 4).counts((8, 30), None, name="fc1")
    with pytest.raises(ValueError, match="keeps exactly 4 of 8 entries of this layer, not 5"):
        NM(2, 4).mask(torch.ones(2, 4), 5)


def test_pairs_stay_or_go_together_and_solvers_keep_them():
    """By brute force: the two of every four pairs with the largest sums; SparseGPT and ADMM leave such masks."""
    score = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    mask = Pairs(2, 4).mask(score, 24)
    for row, kept in zip(score.view(-1, 4, 2).sum(2), mask.view(-1, 4, 2), strict=True):
        assert torch.equal(kept[:, 0], kept[:, 1])
        assert true_indices(kept[:, 0]) == first_best(row.tolist(), 2)
    inputs = Inputs(16, gram=True)
    inputs.add_(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)))
    for criterion in (sparsegpt(), admm()):
        weight, mask = criterion.solve(Layer("fc", score, inputs), Pairs(2, 4), 24)
        pairs = mask.view(-1, 4, 2)
        assert torch.equal(pairs[..., 0], pairs[..., 1])
        assert (pairs[..., 0].sum(1) == 2).all()
        assert not weight[~mask].any()
    assert Pairs(2, 4).sparsity == 0.5
    with pytest.raises(ValueError, match="'fc1' has 12"):
        Pairs(2, 4).counts((2, 12), name="fc1")


def test_parse_reads_back_what_patterns_print():
    assert parse("2:4") == NM(2, 4)
    assert parse(str(NM(6, 8))) == NM(6, 8)
    assert parse(str(Pairs(2, 4))) == Pairs(2, 4)
    assert parse("unstructured", per="layer") == Unstructured("layer")
    assert parse(str(Block(4, 16))) == Block(4, 16)
    assert parse(str(Rows())) == Rows()
    for text in ("2:3:4", "4:2", "0:4", "4:4", "-1:4", "2:", "dense", ""):
        with pytest.raises(ValueError, match=f"Pattern '{text}'"):
            parse(text)
    with pytest.raises(ValueError, match="per 'tensor'"):
        Unstructured("tensor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 4:2"):
        NM(4, 2)


@quick
@given(tensors=st.lists(scores(dtypes=DTYPES[:3]), min_size=1, max_size=5), share=st.floats(0, 1))
def test_model_wide_selection_equals_a_sort_of_the_concatenation(tensors: list[Tensor], share: float):
    named = {f"layer{i}": tensor for i, tensor in enumerate(tensors)}
    joined = torch.cat([tensor.double().flatten() for tensor in tensors])
    kept = round(share * len(joined))
    direct = torch.zeros(len(joined), dtype=torch.bool)
    direct[list(first_best(joined.tolist(), kept))] = True
    masks = [mask.flatten() for mask in keep_largest_of_all(named, kept).values()]
    assert torch.equal(torch.cat(masks), direct)


@pytest.mark.usefixtures("chunk")
def test_model_wide_selection_reads_lazy_scores_three_times():
    tensors = {"a": torch.tensor([1.0, 2.0, 2.0, 5.0]), "b": torch.tensor([2.0, 2.0, 7.0])}
    reads: list[str] = []

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            reads.append(name)
            return tensors[name]

        def __iter__(self) -> Iterator[str]:
            return iter(tensors)

        def __len__(self) -> int:
            return len(tensors)

    assert select_global_share(Lazy(), 0.6) == {"a": 2, "b": 1}
    assert reads == ["a", "b"] * 3
    assert select_global_share(tensors, 0.3) == {"a": 3, "b": 2}
    assert select_global_share(tensors, 0.95) == {"a": 0, "b": 0}


def test_model_wide_selection_does_not_round_thresholds():
    mixed = {"a": torch.tensor([0.1], dtype=torch.float16), "b": torch.tensor([0.1])}  # 0.09998, 0.10000
    assert select_global_share(mixed, 0.5) == {"a": 0, "b": 1}


def test_model_wide_selection_refuses_what_it_cannot_order():
    with pytest.raises(ValueError, match="score of 'b' has 1 NaN of 2"):
        select_global_share({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="'a' is float64"):
        select_global_share({"a": torch.ones(2, dtype=torch.float64)}, 0.5)
    with pytest.raises(ValueError, match="no 3-th largest of 2"):
        keep_largest_of_all({"a": torch.ones(1, 2)}, 3)
    with pytest.raises(ValueError, match="sparsity"):
        select_global_share({"a": torch.ones(2)}, 1.5)


@quick
@given(score=scores(), share=st.floats(0, 1))
def test_bit_search_equals_kthvalue(score: Tensor, share: float):
    flat = score.flatten()
    k = max(1, round(share * len(flat)))
    assert selection._kth_by_bits(flat, k).to(flat.dtype) == flat.kthvalue(len(flat) - k + 1).values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("limit", [1, 1 << 22], ids=["bits", "topk"])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_cuda_chooses_as_the_cpu(limit: int, per: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "_TOPK", limit)
    score = torch.randint(50, (64, 128), generator=torch.Generator().manual_seed(4)).float()
    pattern = Unstructured(per)  # type: ignore[arg-type]
    for kept in (1, 100, 4096, 8191):
        assert torch.equal(pattern.mask(score.cuda(), kept).cpu(), pattern.mask(score, kept))
    assert torch.equal(NM(2, 4).mask(score.cuda(), 4096).cpu(), NM(2, 4).mask(score, 4096))
    on_gpu = {name: score.cuda() for name in "ab"}
    assert select_global_share(on_gpu, 0.45) == select_global_share(dict.fromkeys("ab", score), 0.45)


@pytest.mark.parametrize("kind", ["apart", "tied", "one value", "in order", "half hidden", "striped", "bfloat16"])
def test_the_largest_of_many_are_those_of_a_sort(kind: str) -> None:
    """On a CPU the k-th is looked for between two entries of a sample; wherever it lies, and whatever ties with it."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(150, 200, generator=generator)
    score = {
        "apart": score,
        "tied": (score * 5).floor(),
        "one value": torch.ones_like(score),
        "in order": torch.arange(score.numel()).view_as(score).float(),
        "half hidden": score.masked_fill(score < 0.5, -torch.inf),
        "striped": torch.arange(score.numel()).view_as(score).float() % 7,  # a sample in steps of 7 sees one value
        "bfloat16": score.bfloat16(),
    }[kind]
    order = score.flatten().float().sort(descending=True, stable=True).indices
    for kept in (1, 2, 2999, 12000, 15000, 29998, 29999):
        expected = torch.zeros(score.numel(), dtype=torch.bool).index_fill_(0, order[:kept], True)
        assert torch.equal(keep_largest(score, kept).flatten(), expected), kept
