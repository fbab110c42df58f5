"""Averages of checkpoints on disk: equal to those in memory whatever the shards, loadable, in bounded memory."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prunus.checkpoint import read_header
from prunus.jobs.average import average_checkpoints, average_greedily
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.recipe.names import averages
from prunus.save import ShardWriter, average, load_info, save_model
from prunus.save.average import average_folders
from prunus.soup.average import average as average_states
from tests.conftest import byte_tokenizer, tiny_llama


def some_masks(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    names = [view.parameter for view in find_layers(model)]
    return Masks({name: torch.rand(parameters[name].shape, generator=generator) < 0.5 for name in names})


@pytest.fixture
def folders(tmp_path):
    """Three members of one mask, sharded differently, in bfloat16."""
    masks = some_masks(tiny_llama())
    for place, size in enumerate((1e9, 20_000, 9_000)):
        model = tiny_llama(place).bfloat16()
        masks.apply_(model)
        info = {"pattern": "unstructured", "metrics": {"perplexity": 10.0 + place}}
        save_model(model, byte_tokenizer(), tmp_path / f"m{place}", masks=masks, info=info, max_shard_bytes=size)
    return [tmp_path / f"m{place}" for place in range(3)]


def tensors_of(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("size", [1e9, 15_000])
def test_the_average_on_disk_is_that_in_memory_and_loads(folders, tmp_path, monkeypatch, size):
    assert len(list(folders[2].glob("model-*.safetensors"))) > 3
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps({**config, "transformers_version": "another"}))
    monkeypatch.setattr(average, "_PIECE", 1 << 7)  # many pieces a tensor, the last ones ragged
    saved = average_folders(folders, tmp_path / "mean", max_shard_bytes=size)
    expected = average_states([tensors_of(folder) for folder in folders])
    found = tensors_of(tmp_path / "mean")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    masks = Masks.load(tmp_path / "mean" / "masks.safetensors")
    assert masks == Masks.load(folders[0] / "masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mean")
    masks.check(model)
    assert torch.equal(model.model.norm.weight, expected["model.norm.weight"])
    assert (tmp_path / "mean" / "tokenizer.json").read_bytes() == (folders[0] / "tokenizer.json").read_bytes()
    assert (tmp_path / "mean" / "config.json").read_bytes() == (folders[0] / "config.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == list(saved.files)


def test_prunus_json_says_where_the_average_comes_from(folders, tmp_path):
    average_folders(folders, tmp_path / "mean", [0.5, 0.25, 0.25])
    info, first = load_info(tmp_path / "mean"), load_info(folders[0])
    assert info["pattern"] == "unstructured"
    assert "metrics" not in info  # no member's numbers are the mean's
    assert info["sparsity"]["layers"] == pytest.approx(first["sparsity"]["layers"])
    assert info["sparsity"]["pruned"] == pytest.approx(first["sparsity"]["pruned"])
    members = info["average"]["members"]
    assert [member["weight"] for member in members] == [0.5, 0.25, 0.25]
    assert [member["metrics"]["perplexity"] for member in members] == [10, 11, 12]
    zeros = sum(int((t == 0).sum()) for t in tensors_of(folders[0]).values() if t.ndim > 1)
    assert [member["zeros"] for member in members] == [zeros] * 3
    found = sum(int((t == 0).sum()) for t in tensors_of(tmp_path / "mean").values() if t.ndim > 1)
    assert info["average"]["zeros"] == found >= zeros
    assert "Sparsity by layer" in (tmp_path / "mean" / "README.md").read_text()


def test_single_files_of_any_network_are_averaged(tmp_path):
    for place in range(2):
        tensors = {"w": torch.full((3, 2), float(place)), "n.num_batches_tracked": torch.tensor(place + 4)}
        save_file(
            {**tensors, "half": torch.full((5,), place + 1.0, dtype=torch.float16)}, tmp_path / f"{place}.safetensors"
        )
    rows = average_checkpoints([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out", [0.25, 0.75])
    found = tensors_of(tmp_path / "out")
    assert found["w"].eq(0.75).all()
    assert found["half"].eq(1.75).all()
    assert found["n.num_batches_tracked"] == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "prunus.json"]
    assert [(row["zeros"], row["weight"]) for row in rows] == [(6, 0.25), (0, 0.75), (0, None)]


def test_masks_that_differ_are_refused_before_anything_is_written(folders, tmp_path):
    model = tiny_llama(5).bfloat16()
    masks = some_masks(model, seed=1)
    masks.apply_(model)
    save_model(model, byte_tokenizer(), tmp_path / "other", masks=masks, info={})
    name = sorted(masks)[0]
    kept = [Masks.load(folder / "masks.safetensors").table()[name][0] for folder in (folders[0], tmp_path / "other")]
    with pytest.raises(ValueError, match=rf"masks of '{name}' differ: .*m0 keeps {kept[0]} of .*other {kept[1]}\."):
        average_folders([folders[0], tmp_path / "other"], tmp_path / "mean")
    (tmp_path / "other" / "masks.safetensors").unlink()
    with pytest.raises(ValueError, match=r"m0 has masks.safetensors and .*other has none"):
        average_folders([folders[0], tmp_path / "other"], tmp_path / "mean")
    assert not list(tmp_path.glob("mean*"))


def test_a_member_that_left_its_mask_is_refused_and_nothing_stays(folders, tmp_path):
    masks = Masks.load(folders[0] / "masks.safetensors")
    name = sorted(masks)[0]
    tensors = tensors_of(folders[0])
    tensors[name][~masks[name]] = 1.0
    save_file(tensors, folders[0] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{name}' in .*m0 has {int((~masks[name]).sum())} nonzero weights under"):
        average_folders(folders, tmp_path / "mean")
    assert not list(tmp_path.glob("mean*"))


def test_other_networks_are_refused(folders, tmp_path):
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match=r"config.json says rms_norm_eps: 1e-06 in .*m0 and 0.5 in .*m1"):
        average_folders(folders, tmp_path / "mean")
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"'w' is \(2,\) torch.float32 in .*a.safetensors and \(3,\)"):
        average_folders([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "mean")
    save_file({"v": torch.zeros(2)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"'w' is .* in .*a.safetensors and missing in .*c.safetensors"):
        average_folders([tmp_path / "a.safetensors", tmp_path / "c.safetensors"], tmp_path / "mean")


@pytest.mark.parametrize("out", ["m1", "m1/mean", ""])
def test_a_member_is_never_replaced(folders, tmp_path, out):
    with pytest.raises(ValueError, match="which is read, lie in each other"):
        average_folders(folders, tmp_path / out)
    assert (folders[1] / "config.json").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_of_the_user_and_other_models_stay(folders, tmp_path):
    """Only the same average is replaced, and what lies beside it under names of old is the user's."""
    for name in ("mean.old", "mean.partial", ".mean.notes.lock"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("years of it")
    before = contents(tmp_path)
    average_folders(folders, tmp_path / "mean")
    average_folders(folders, tmp_path / "mean")
    mean = contents(tmp_path / "mean")
    for members, shares in ((folders[:2], None), (folders, [0.5, 0.25, 0.25])):
        with pytest.raises(ValueError, match="mean holds another model; give"):
            average_folders(members, tmp_path / "mean", shares)
    assert contents(tmp_path) == before | mean
    (tmp_path / "mean" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"files that Prunus did not list.*\('notes.txt'"):
        average_folders(folders, tmp_path / "mean")
    save_model(tiny_llama(), None, tmp_path / "run", masks=None, info={})
    with pytest.raises(ValueError, match="run holds another model"):
        average_folders(folders, tmp_path / "run")


def test_checkpoints_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        average_folders([tmp_path], tmp_path / "mean")
    save_file({"w": torch.zeros(1000)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for content in (b"", whole[:50], b"PK" * 40, b"\x10\0\0\0\0\0\0\0" + b"{}" + b" " * 14):
        (tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.safetensors is not a complete"):
            average_folders([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "mean")
    (tmp_path / "b.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"b\.safetensors is not a complete .* of 4,0\d\d"):
        average_folders([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "mean")
    (tmp_path / "b.safetensors").write_bytes(whole)
    stored = read_header(tmp_path / "b.safetensors")[0]["w"]
    (tmp_path / "b.safetensors").write_bytes(whole[:-8])  # cut short after it was looked at
    with pytest.raises(ValueError, match=r"b\.safetensors ends too early"):
        stored.piece(990, 1000)


def test_zeros_that_are_lost_are_told(tmp_path, caplog):
    for place in range(2):
        save_file({"w": torch.eye(4).roll(place, 0)}, tmp_path / f"{place}.safetensors")
    with caplog.at_level(logging.WARNING):
        average_folders([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "mean")
    assert "The mean has 8 zeros in its matrices and each of the 2 checkpoints at least 12" in caplog.text


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path):
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool):
        tensors = {"a": torch.arange(6).view(2, 3).to(dtype), "b": torch.ones((), dtype=dtype), "c": torch.ones(0, 2)}
        with ShardWriter(tmp_path) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        found, metadata = read_header(tmp_path / "model.safetensors")
        assert metadata == {"format": "pt"}
        assert {name: stored.shape for name, stored in found.items()} == {"a": (2, 3), "b": (), "c": (0, 2)}
        assert torch.equal(found["a"].piece(1, 5).float(), tensors["a"].flatten()[1:5].float())
        average_folders([tmp_path / "model.safetensors"] * 2, tmp_path / "mean" / str(dtype))
        again = load_file(tmp_path / "mean" / str(dtype) / "model.safetensors")
        assert all(torch.equal(again[name].float(), tensors[name].float()) for name in tensors)


def test_greedy_takes_the_members_that_help(tmp_path):
    """Members at 1, -1 and 9 of a target at 0: the first two cancel, the third harms."""
    values, target, seen = (9.0, 1.0, -1.0), 0.0, []
    for place, value in enumerate(values):
        save_file({"w": torch.full((2, 2), value)}, tmp_path / f"{place}.safetensors")

    def score(path):
        file = path if path.is_file() else path / "model.safetensors"
        seen.append(path.name)
        return -abs(float(load_file(file)["w"].mean()) - target)

    rows = average_greedily([tmp_path / f"{place}.safetensors" for place in range(3)], tmp_path / "soup", score)
    assert seen == ["0.safetensors", "1.safetensors", "2.safetensors", "trial", "trial"]
    assert (tensors_of(tmp_path / "soup")["w"] == 0).all()
    assert [row["score"] for row in rows] == [-1, -1, -9, 0]
    assert [row["weight"] for row in rows] == [0.5, 0.5, 0.0, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*seen[:3], "soup"]


MEMORY = """
import resource, sys, torch
from pathlib import Path
from prunus.save import average
from prunus.soup.average import mix

folder = Path(sys.argv[1])
files = sorted(folder.glob("*.safetensors"))
torch.set_num_threads(1)
average._PIECE = 1 << 16
mix([torch.ones(1 << 16)] * 3, [0.5, 0.25, 0.25])
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 16 * 2**20,) * 2)
average.average_folders(files, folder / "mean", [0.25, 0.5, 0.25], max_shard_bytes=8e6)
print("averaged")
try:
    whole = [each.piece(0, each.numel) for each in average.read_header(files[0])[0].values()]
except (MemoryError, RuntimeError) as error:
    print("too large")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits the address space")
def test_memory_is_that_of_a_tensor_not_of_a_model(tmp_path):
    """Three checkpoints of 32 MiB under a limit of 16 MiB more than the process has, in which not one of them fits."""
    for place in range(3):
        tensors = {f"layer{i}.w": torch.full((1024, 512), float(place * i)) for i in range(16)}
        save_file(tensors, tmp_path / f"{place}.safetensors")
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "averaged\ntoo large\n", done.stderr[-2000:]
    found = tensors_of(tmp_path / "mean")
    assert all(found[f"layer{i}.w"].eq(i).all() for i in range(16))


@pytest.mark.parametrize("how", ["ties", {"dare": {"density": 0.3}}, "dare_ties", {"slerp": {"t": 0.25}}])
def test_other_averages_on_disk_are_those_in_memory(folders, tmp_path, how):
    members, base = ([*folders[:2]], folders[2]) if "slerp" in how else (folders, folders[0])
    rows = average_checkpoints(members, tmp_path / "out", how=how, base=base)
    states, start = [tensors_of(each) for each in members], tensors_of(base)
    wanted, _ = averages.make(how, states, base=start)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    Masks.load(tmp_path / "out" / "masks.safetensors").check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    said = load_info(tmp_path / "out")["average"]
    assert said["how"] == (how if isinstance(how, str) else json.dumps(how))
    shares = [0.75, 0.25] if "slerp" in how else [1 / len(folders)] * len(folders)
    assert [each["weight"] for each in said["members"]] == [each["weight"] for each in rows[:-1]] == shares
    assert said["zeros"] >= min(each["zeros"] for each in said["members"])
    with pytest.raises(ValueError, match="holds another model"):
        average_checkpoints(members, tmp_path / "out")
    average_checkpoints(members, tmp_path / "out", how=how, base=base)  # the same again
    if "slerp" not in how:
        with pytest.raises(ValueError, match="holds another model"):
            average_checkpoints(members, tmp_path / "out", how=how, base=folders[1])


@pytest.mark.parametrize(
    ("how", "more", "message"),
    [
        ("ties", {}, "--how ties goes by what the members were retrained from.*--base"),
        ("greedy", {}, "--how greedy chooses by held-out data.*--greedy"),
        ("slerp", {"weights": [0.5, 0.5]}, "--weights are those of a mean"),
        ("tise", {}, "no average 'tise'"),
        (None, {"base": "runs/pruned"}, "--base is for averages that go by task vectors"),
    ],
)
def test_other_averages_refuse_what_they_cannot_do(folders, tmp_path, how, more, message):
    with pytest.raises(ValueError, match=message):
        average_checkpoints(folders[:2], tmp_path / "out", more.get("weights"), how=how, base=more.get("base"))
    assert not (tmp_path / "out").exists()
