"""Shared small things: a random Llama with a byte tokenizer in a folder, a text it can read, GPUs not waited for."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import interpreter, processes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260


def set_up() -> None:
    """What a process that runs tests needs before anything imports Triton, which transformers does."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault(
        "PET_LOCAL_ADDR", "127.0.0.1"
    )  # where ranks that torchrun starts meet, whatever the host is called
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.hasten()
    processes.forked()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no" and not config.option.collectonly:
        return  # this process of xdist's runs no test, and would import torch for nothing
    gc.disable()  # until what stays is there: nearly all of what imports and collection make does
    set_up()


def pytest_collection_finish() -> None:
    gc.freeze()  # so that no later collection looks at it
    gc.set_threshold(20_000)  # what a run makes lives on, and to look at it every 700 objects is a fiftieth of all time
    gc.enable()


def pytest_unconfigure() -> None:
    processes.stop()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate([*alphabet, "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two blocks, hidden size 32, tied head: random weights of the given seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def unwaited() -> Iterator[None]:
    """While active, whatever waits for the GPU raises RuntimeError."""
    import torch

    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype; it is on by then
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture(scope="session")
def drawn() -> dict[Any, bytes]:
    """The first picture of each kind: of a size, with panels of the same axes."""
    return {}


@pytest.fixture(autouse=True, scope="module")
def drawn_once(request: pytest.FixtureRequest, drawn: dict[Any, bytes]) -> Iterator[None]:
    """The first picture of each kind is drawn; others of that kind are copies of it.

    A picture takes a fifth of a second, a run makes several, and most tests ask no more than that it is there. Files
    that look at pictures are marked so.
    """
    from matplotlib.figure import Figure

    own: Any = Figure.savefig

    def savefig(figure: Figure, path: Path, **how: Any) -> None:
        panels = [(each.get_xlabel(), each.get_ylabel(), each.get_xscale(), each.get_yscale()) for each in figure.axes]
        kind = (*figure.get_size_inches(), *panels)
        if kind in drawn:
            path.write_bytes(drawn[kind])
        else:
            own(figure, path, **how)
            drawn[kind] = path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("pictures") is None:
            patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 4,000 bytes of text with structure to learn."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"The {i % 7}th plum tree of row {i % 11} bears {i * i % 13} plums." for i in range(90)]
    path.write_text("\n".join(lines))
    return path
