"""Inspection reads any folder of safetensors: what it says is counted from the zeros in the files."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from prunus.run import inspect as inspection
from prunus.run.inspect import inspect_model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 3.0


def keep(weight, n, m):
    """The weight with the n largest of every m along the last dimension kept."""
    groups = weight.reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.abs().topk(n, 1).indices, True)
    return torch.where(mask, groups, torch.zeros(())).reshape(weight.shape)


def unstructured(weight, sparsity, seed=1):
    """Zeros strewn over the whole weight."""
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    out = weight.clone().view(-1)
    out[order[: round(sparsity * weight.numel())]] = 0.0
    return out.view(weight.shape)


def per_row(weight, zeros):
    out = weight.clone()
    for i, row in enumerate(out):
        row[torch.randperm(len(row), generator=torch.Generator().manual_seed(i))[:zeros]] = 0.0
    return out


def pattern_of(tmp_path, weight):
    file = tmp_path / "one.safetensors"
    save_file({"w": weight.contiguous()}, file)
    (row,) = inspect_model(file).rows
    assert row.zeros == int((weight.float() == 0).sum())
    return row.pattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 8), (2, 8), (1, 16), (5, 16)])
def test_tightest_pattern_is_named(tmp_path, n, m, dtype):
    weight = keep(random(24, 64), n, m).to(dtype)
    assert pattern_of(tmp_path, weight) == f"{n}:{m}"
    assert pattern_of(tmp_path, weight.t()) == f"{n}:{m} transposed"


def test_pattern_with_further_zeros_is_still_found(tmp_path):
    weight = keep(random(64, 64), 2, 4)
    weight[:, ::8] = 0.0
    assert pattern_of(tmp_path, weight) == "2:4"


def test_what_has_no_pattern(tmp_path):
    assert pattern_of(tmp_path, random(16, 16)) == "dense"
    assert pattern_of(tmp_path, torch.zeros(16, 16)) == "empty"
    assert pattern_of(tmp_path, unstructured(random(32, 64), 0.5)) == "unstructured"
    assert pattern_of(tmp_path, unstructured(random(32, 64), 0.9)) == "unstructured"
    assert pattern_of(tmp_path, per_row(random(32, 63), 31)) == "row-uniform"
    assert pattern_of(tmp_path, per_row(random(32, 63), 31).t()) == "row-uniform transposed"


def test_one_entry_breaks_a_pattern(tmp_path):
    weight = keep(random(32, 64), 2, 4)
    column = int((weight[7] == 0).nonzero()[0])
    weight[7, column] = 1.0
    assert ":" not in pattern_of(tmp_path, weight)


def test_signed_zeros_are_zeros_and_nan_is_not(tmp_path):
    weight = keep(random(16, 16), 2, 4)
    weight[weight == 0] = -0.0
    assert pattern_of(tmp_path, weight) == "2:4"
    assert pattern_of(tmp_path, weight.to(torch.float8_e5m2)) == "2:4"
    assert pattern_of(tmp_path, torch.full((16, 16), math.nan)) == "dense"


def test_every_expert_of_a_stack_counts(tmp_path):
    stack = torch.stack([keep(random(16, 32, seed=i), 2, 4) for i in range(3)])
    assert pattern_of(tmp_path, stack) == "2:4"
    assert pattern_of(tmp_path, stack.transpose(1, 2)) == "2:4 transposed"
    stack[2] = unstructured(random(16, 32, seed=9), 0.3)
    assert pattern_of(tmp_path, stack) == "unstructured"


@pytest.mark.parametrize("orientation", [False, True])
def test_chunks_do_not_matter(tmp_path, monkeypatch, orientation):
    monkeypatch.setattr(inspection, "_CHUNK", 100)  # fewer entries than 16 rows hold
    weight = keep(random(40, 48), 2, 4)
    weight = weight.t() if orientation else weight
    assert pattern_of(tmp_path, weight) == "2:4" + " transposed" * orientation
    assert pattern_of(tmp_path, per_row(random(70, 63), 31)) == "row-uniform"


def folder_of(tmp_path, shards):
    """A sharded checkpoint with its index."""
    weight_map = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_totals_of_a_foreign_sharded_model(tmp_path):
    half = keep(random(16, 16), 2, 4)
    first = {"layers.10.w": half, "layers.2.w": random(8, 16), "layers.2.bias": torch.zeros(8)}
    second = {"norm.weight": torch.ones(16), "ids": torch.zeros(5, 5, dtype=torch.int64)}
    folder = folder_of(tmp_path, [first, second])
    save_file({"layers.10.w": torch.zeros(32, dtype=torch.uint8)}, folder / "masks.safetensors")
    found = inspect_model(folder)
    assert [row.name for row in found.rows] == ["layers.2.w", "layers.10.w"]  # counted as people count
    assert (found.entries, found.zeros) == (256 + 128 + 8 + 16, 128 + 8)
    assert found.sparsity == 136 / 408
    assert [row.name for row in found.pruned] == ["layers.10.w"]
    assert found.pruned_sparsity == 0.5
    assert found.info is None
    (folder / "prunus.json").write_text('{"format": 1, "pattern": "2:4"}')
    assert inspect_model(folder).info == {"format": 1, "pattern": "2:4"}


@pytest.mark.parametrize("shards", [{"a": 3}, {"a": ["x"]}, {"a": None}])
def test_an_index_of_other_things_than_file_names_is_none(tmp_path, shards):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"index\.json is no index of shards: .*download it again"):
        inspect_model(tmp_path)


def test_damage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        inspect_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        inspect_model(tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle of more than tensors"):
        inspect_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        inspect_model(tmp_path)
    save_file({"ids": torch.zeros(3, 3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no floating-point tensor"):
        inspect_model(tmp_path)


def test_missing_shard_is_named(tmp_path):
    folder = folder_of(tmp_path, [{"a": torch.ones(2, 2)}, {"b": torch.ones(2, 2)}])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002"):
        inspect_model(folder)
