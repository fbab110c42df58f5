"""Files are complete or absent, whatever is written; generators of random numbers go back to where they stood."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from prunus.machine import atomic, random_state, read_json, set_random_state, write_json, write_tensors, write_text


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "notes.txt"
    write_text(path, "old")
    with pytest.raises(TypeError), atomic(path) as partial:
        partial.write_bytes("half")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_json_writes_what_it_does_not_know_as_text(tmp_path):
    write_json(tmp_path / "a.json", {"path": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": str(tmp_path)}


def test_no_bare_nan_is_written_and_numbers_come_back(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"perplexity": {"dense": 2.5, "pruned": math.nan}, "each": (torch.tensor(math.inf), -math.inf)})
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    found = read_json(path)
    assert found["each"] == [math.inf, -math.inf]
    assert found["perplexity"]["dense"] == 2.5
    assert math.isnan(found["perplexity"]["pruned"])


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}"])
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json is not JSON .* get it again"):
        read_json(tmp_path / "result.json")


def test_tied_and_strided_tensors_are_written_each_by_itself(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"a": weight, "tied": weight, "turned": weight.t(), "row": weight[1], "images": torch.ones(1, 2, 3, 3)}
    tensors["images"] = tensors["images"].to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "a.safetensors", tensors, {"kind": "test"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"kind": "test"}


def test_random_state_goes_back():
    before = random_state()
    first = torch.rand(3)
    set_random_state(before)
    assert torch.equal(torch.rand(3), first)
