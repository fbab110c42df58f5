"""Files are complete or absent, whatever is written; generators of random numbers go back to where they stood."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunus.machine import (
    atomic,
    atomic_folder,
    hidden_folder,
    random_state,
    read_json,
    read_tensors,
    remove_partials,
    set_random_state,
    write_json,
    write_tensors,
    write_text,
)
from tests.processes import start


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "notes.txt"
    write_text(path, "old")
    with pytest.raises(TypeError), atomic(path) as partial:
        partial.write_bytes("half")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_complete_or_as_it_was(tmp_path):
    folder = tmp_path / "deep" / "model"
    for turn in ("one", "two"):
        with atomic_folder(folder) as partial:
            write_text(partial / turn, turn)
    assert [path.name for path in folder.iterdir()] == ["two"]
    with pytest.raises(FileExistsError), atomic_folder(folder) as partial:
        partial.mkdir()
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_another_process_writes_meanwhile_is_replaced_too(tmp_path, monkeypatch):
    folder, move, moved = tmp_path / "model", os.replace, []
    folder.mkdir()

    def replace(source, target):
        move(source, target)
        if source == folder and not moved:  # between the two moves
            moved.append(source)
            with atomic_folder(folder) as other:
                write_text(other / "theirs", "theirs")

    monkeypatch.setattr(os, "replace", replace)
    with atomic_folder(folder) as partial:
        write_text(partial / "ours", "ours")
    assert [path.name for path in folder.iterdir()] == ["ours"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_whose_new_contents_are_gone_is_as_it_was(tmp_path):
    folder = tmp_path / "model"
    write_text(folder / "old", "old")
    with pytest.raises(FileNotFoundError), atomic_folder(folder) as partial:
        partial.rmdir()
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def die_between(folder, moves):
    """Write a folder, and be killed before one of its moves."""
    done, replace = [], os.replace

    def move(*paths):
        if len(done) == moves:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(replace(*paths))

    with atomic_folder(folder) as partial:
        write_text(partial / "new", "new")
        os.replace = move


@pytest.mark.parametrize("moves", [0, 1])
def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path, moves):
    """The folder that was there before is there again, whenever the process was killed."""
    folder, mine = tmp_path / "model", [tmp_path / name for name in (".model.mine.lock", ".model.0123.partial")]
    write_text(folder / "old", "old")
    for path in mine:
        path.write_text("mine")
    process = start(die_between, folder, moves)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 3
    with hidden_folder(folder) as living, hidden_folder(folder) as other:
        assert living.is_dir()
        assert other.is_dir()
        assert [path.name for path in folder.iterdir()] == ["old"]
    assert sorted(tmp_path.iterdir()) == sorted([folder, *mine])


def die_within(path):
    """Begin to write a file, and be killed."""
    with atomic(path) as partial:
        partial.write_text("half a picture")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("again", ["the file is written", "the folder is swept"])
def test_a_half_written_file_goes_the_next_time_and_no_living_writer_s(tmp_path, again):
    path = tmp_path / "deep" / "report.png"
    with atomic(path) as living:
        living.write_text("whole")
        process = start(die_within, path)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(path.parent.glob(".*.partial"))) == 2
        if again == "the file is written":
            write_text(path, "another")
        else:
            remove_partials(tmp_path)
        assert list(path.parent.glob(".*.partial")) == [living]
    assert path.read_text() == "whole"
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
        assert file.metadata().items() > {"kind": "test"}.items()


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_tensors_are_read_by_whoever_reads_the_files_beside_them(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "model") as partial:
            save_file({"w": torch.ones(1)}, partial / "model.safetensors")  # as transformers does
            write_text(partial / "config.json", "{}")
        write_tensors(tmp_path / "masks.safetensors", {"w": torch.ones(1)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o640 for path in files}


def test_a_flipped_bit_is_found(tmp_path):
    """In values, names, shapes and what the file says of itself."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(0, 2), "c": torch.tensor(True)}
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"kind": "test"})
    whole, (read, said) = path.read_bytes(), read_tensors(path)
    assert said == {"kind": "test"}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    places = [8 * whole.index(part) + 1 for part in (b"kind", b"test", b'"a"', b"F32", b"[2,3]")]
    bits = [*places, *range(3, 8 * len(whole), 97)]
    found = [bit for bit in bits if is_found(path, whole, bit, tensors)]
    assert {*places} <= {*found}
    assert len(found) > len(bits) / 2  # much of so small a file is padding


def is_found(path, whole, bit, tensors) -> bool:
    """Whether a flipped bit is found; one that is not changes nothing: in the padding, or the checksum's own name."""
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        read, said = read_tensors(path)
    except ValueError as error:
        return str(error).startswith(f"{path} is damaged (")
    assert said.items() >= {"kind": "test"}.items()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    return False


def test_the_random_state_of_a_model_is_that_of_the_gpu_on_which_it_is(monkeypatch):
    """Not of the current one, which nothing here sets."""
    states = {"cuda": torch.tensor([0]), "cuda:1": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states[str(device)].copy_(state))

    class Placed(torch.nn.Module):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(device=torch.device("cuda:1"))])

    for model, name in ((Placed(), "cuda:1"), (torch.nn.Linear(1, 1), "cuda"), (None, "cuda")):
        before = random_state(model)
        expected = states[name].clone()
        states[name].add_(5)
        set_random_state(before, model)
        assert torch.equal(states[name], expected)
        assert torch.equal(before["cuda"], expected)


def test_random_state_goes_back():
    before = random_state()
    first = torch.rand(3)
    set_random_state(before)
    assert torch.equal(torch.rand(3), first)
