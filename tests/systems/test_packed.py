"""Packed folders: exact, as small as said, and unpacked into what was packed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from prunus.checkpoint import pack_tensor, read_checkpoint
from prunus.masks import Masks
from prunus.run.cli import app
from prunus.run.inspect import inspect_model
from prunus.save import average_folders, is_whole, load_info, load_model, save_model, save_tensors, unpack
from tests.systems.test_export import BESIDE, assert_same, llama, pruned, saved_source


@pytest.mark.parametrize("packed", [True, "zstd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [4e9, 3000])
def test_what_was_packed_is_unpacked(tmp_path, dtype, packed, shard):
    model = llama().to(dtype)
    source = saved_source(tmp_path, model)
    masks = pruned(model)
    how = {"masks": masks, "info": {"pattern": "1:2"}, "source": source, "max_shard_bytes": shard}
    save_model(model, None, tmp_path / "plain", **how)
    saved = save_model(model, None, tmp_path / "packed", packed=packed, **how)
    assert not list((tmp_path / "packed").glob("model*"))
    assert ("packed.safetensors.index.json" in saved.files) == (shard < 1e6)
    assert is_whole(tmp_path / "packed")
    assert_same(model, load_model(tmp_path / "packed"))
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("plain", "packed")}
    assert "ordinary dense checkpoint" in cards["plain"]
    assert "unpack FOLDER OUT" not in cards["plain"]
    assert "ordinary dense checkpoint" not in cards["packed"]  # however large its headers are
    assert "unpack FOLDER OUT" in cards["packed"]

    unpack(tmp_path / "packed", tmp_path / "again")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert Masks.load(tmp_path / "again" / "masks.safetensors") == masks
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", *BESIDE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    one, other = (load_info(tmp_path / name) for name in ("plain", "again"))
    assert {key: one[key] for key in one.keys() - {"files", "checksums", "size"}}.items() <= other.items()
    assert one["size"]["dense_bytes"] == other["size"]["dense_bytes"] == saved.dense_bytes


def test_sixty_percent_zeros_in_16_bits_take_at_most_47_percent():
    torch.manual_seed(0)
    weight = torch.randn(64, 1000).bfloat16()
    weight[:, torch.randperm(1000)[:600]] = 0.0
    for zstd, most in ((False, 0.4626), (True, 0.40)):
        stored, _ = pack_tensor("w", weight, zstd=zstd)
        assert sum(each.nbytes for each in stored.values()) <= most * weight.nbytes


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int32])
def test_every_piece_of_a_packed_tensor_is_that_of_the_tensor(tmp_path, dtype, zstd):
    """Signed zeros and NaN among them, and pieces that begin and end inside a byte of bits."""
    torch.manual_seed(0)
    weight = (torch.randn(5, 13) * 20 * (torch.rand(5, 13) > 0.7)).to(dtype)
    if dtype.is_floating_point:
        weight.view(-1)[3:5] = torch.tensor([-0.0, float("nan")]).to(dtype)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    tensors = [("w", weight), ("full", torch.ones(3)), ("none", torch.zeros(0, 4)), ("one", torch.tensor(2.0))]
    how = {"masks": None, "info": {}, "source": tmp_path / "source"}
    save_tensors(iter(tensors), None, tmp_path / "out", packed="zstd" if zstd else True, **how)
    found = read_checkpoint(tmp_path / "out").tensors
    assert found["none"].read().shape == (0, 4)
    assert found["one"].read() == 2.0
    assert found["full"].read().all()
    bits = weight.view(-1).view(torch.uint8).view(weight.numel(), -1)
    for start in range(0, 65, 6):
        for stop in (start, start + 1, min(65, start + 23), 65):
            piece = found["w"].piece(start, stop)
            assert piece.dtype == dtype
            assert torch.equal(piece.view(torch.uint8).view(-1, bits.shape[1]), bits[start:stop])


def test_a_mask_that_is_more_than_the_zeros_keeps_its_file(tmp_path):
    model = llama()
    masks = pruned(model)
    name = next(iter(masks))
    with torch.no_grad():
        model.get_parameter(name)[masks[name]] *= torch.rand(int(masks[name].sum())) > 0.5  # kept, and zero
    save_model(model, None, tmp_path / "packed", masks=masks, info={}, packed=True)
    unpack(tmp_path / "packed", tmp_path / "out")
    assert Masks.load(tmp_path / "out" / "masks.safetensors") == masks


def test_packed_folders_are_inspected_and_refused_where_they_cannot_be_read(tmp_path):
    model = llama()
    save_model(model, None, tmp_path / "packed", masks=pruned(model), info={}, packed=True)
    assert {row.pattern for row in inspect_model(tmp_path / "packed").pruned} == {"1:2"}
    with pytest.raises(ValueError, match="prunus unpack"):
        average_folders([tmp_path / "packed"], tmp_path / "mean")
    unpack(tmp_path / "packed", tmp_path / "out")
    with pytest.raises(ValueError, match="is not packed"):
        unpack(tmp_path / "out", tmp_path / "other")
    said = json.loads((tmp_path / "packed" / "packed.json").read_text())
    (tmp_path / "packed" / "packed.json").write_text(json.dumps(said | {"format": 2}))
    with pytest.raises(ValueError, match="use a newer one"):
        load_model(tmp_path / "packed")
    (tmp_path / "packed" / "packed.json").write_text(json.dumps(said))
    file = tmp_path / "packed" / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    with pytest.raises(ValueError, match="checksum"):
        unpack(tmp_path / "packed", tmp_path / "other")


def test_another_model_is_not_replaced(tmp_path):
    model = llama()
    save_model(model, None, tmp_path / "other", masks=None, info={"note": "other"})
    save_model(model, None, tmp_path / "packed", masks=pruned(model), info={}, packed=True)
    before = (tmp_path / "other" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="other holds another model; give the ordinary one a folder of its own"):
        unpack(tmp_path / "packed", tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == before
    assert unpack(tmp_path / "packed", tmp_path / "out") == unpack(tmp_path / "packed", tmp_path / "out")


def test_the_command_unpacks(tmp_path):
    model = llama()
    save_model(model, None, tmp_path / "packed", masks=pruned(model), info={}, packed=True)
    found = CliRunner().invoke(app, ["unpack", str(tmp_path / "packed"), str(tmp_path / "out")])
    assert "MB of weights" in found.output
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_a_packed_folder_is_complete_or_absent(tmp_path, monkeypatch):
    """What was written is compared before the ordinary weights go."""
    monkeypatch.setattr("prunus.save.packed._check_same", lambda *_: (_ for _ in ()).throw(OSError("differs")))
    with pytest.raises(OSError, match="differs"):
        save_model(llama(), None, tmp_path / "packed", masks=None, info={}, packed=True)
    assert not list(tmp_path.iterdir())
