"""The script that runs other implementations beside ours: its stand-ins, what it measures, its table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from prunus.layers import Inputs, Layer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# As drivers are that were written for a GPU: a neighbour of a common name, a download, prints, a global.
DRIVER = """
import torch
from quant import share

def get_loaders(*args, **kwargs):
    raise OSError("no network")

def prune(args, model, tokenizer, device=torch.device("cuda:0"), prune_n=0, prune_m=0):
    print("pruning")
    loaded, _ = get_loaders("c4", nsamples=args.nsamples)
    assert len(loaded) == args.nsamples and model.hf_device_map == {}
    assert loaded[0][0].to("cuda:0").cuda().shape == (1, model.seqlen)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                zeros = int(module.weight.shape[1] * share(args.sparsity_ratio))
                lowest = module.weight.abs().sort(1).indices[:, :zeros]
                module.weight.data.scatter_(1, lowest, 0.0)
    torch.cuda.synchronize()

def opt_sequential(model, batches, device):
    args.share(batches)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("peers")
    del sys.modules["peers"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "driver.py").write_text(DRIVER)
    (tmp_path / "opt.py").write_text(DRIVER)
    (tmp_path / "quant.py").write_text("def share(asked): return asked")
    return tmp_path


@pytest.fixture
def inputs(peers: ModuleType):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=32, hidden_size=12, word_embed_proj_dim=12, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    ids = torch.randint(32, (2, 16))
    return peers.Inputs(model, torch.randint(32, (512,)), ids, peers.dense_layers(model, ids))


def test_the_error_of_a_layer_is_that_of_its_outputs(peers):
    seen = Inputs(2, gram=True)
    seen.add_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    layer = Layer("fc", torch.tensor([[2.0, 1.0]]), seen)
    assert peers.relative_error(layer, torch.tensor([[0.0, 1.0]])) == pytest.approx(4 / 8)
    assert peers.relative_error(layer, layer.weight) == 0


def test_a_driver_for_a_gpu_runs_as_it_stands_and_leaves_nothing(
    peers, folder: Path, inputs, monkeypatch: pytest.MonkeyPatch, capsys
):
    peer = peers.Peer("wanda", "rows", "Wanda, refit", peers.listed("lib.driver", "prune"))
    monkeypatch.setattr(peers, "PEERS", [peer])
    to, path, modules = Tensor.to, list(sys.path), set(sys.modules)
    row = {"pattern": "60 %", "folder": "wanda", "method": "rows", "seed": 0}
    found = peers.run(inputs, row, {"wanda": folder})
    # Of 12 columns 7 are zero and of 16 nine, where 60 % of all would be more: ours is run with as few in each layer.
    assert found["zeros"] == pytest.approx((768 * 7 / 12 + 192 * 9 / 16) / 960, abs=1e-5)
    assert found["beside"]["zeros"] == found["zeros"]
    assert 0 < found["error"] < 1
    assert found["perplexity"] > 1
    ours = peers.run(inputs, row | {"folder": "prunus", "method": "Wanda, refit"}, {})
    assert ours["zeros"] > found["zeros"] + peers.FEWER
    assert "beside" not in ours
    assert capsys.readouterr().out == ""
    assert Tensor.to is to
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name in ("lib", "lib.driver", "quant")}


def test_a_driver_with_a_global_of_its_own_and_one_that_fails(peers, folder: Path, inputs, monkeypatch):
    seen: list[int] = []
    peer = peers.Peer(
        "alps", "its", "magnitude", peers.sequential(lambda asked: {"share": lambda each: seen.append(len(each))})
    )
    monkeypatch.setattr(peers, "PEERS", [peer, peers.Peer("ria", "its", "magnitude", peers.listed("absent", "prune"))])
    row = {"pattern": "2:4", "folder": "alps", "method": "its", "seed": 0}
    assert peers.run(inputs, row, {"alps": folder})["error"] == 0
    assert seen == [2]
    failed = peers.run(inputs, row | {"folder": "ria"}, {"ria": folder})
    assert failed == {"failed": "ModuleNotFoundError: No module named 'absent'"}


def test_what_stands_in_the_file_is_not_run_again_and_the_table_is_of_means(peers):
    numbers = {"error": 0.25, "zeros": 0.6, "seconds": 3.0}
    keys = {"pattern": "60 %", "folder": "admm", "method": "ADMM"}
    rows = [
        keys | numbers | {"seed": 0, "perplexity": 40.0},
        keys | numbers | {"seed": 1, "perplexity": 42.0, "beside": numbers | {"perplexity": 39.0}},
        *(keys | numbers | {"folder": "prunus", "seed": seed, "perplexity": 41.0} for seed in (0, 1)),
    ]
    wanted = peers.missing(rows, 2, ["60 %", "4:8"], ["admm"])
    assert [(row["folder"], row["pattern"]) for row in wanted] == [("prunus", "60 %"), ("admm", "60 %")]
    assert peers.missing(rows, 1, ["60 %"], ["admm"]) == []
    failed = keys | {"pattern": "50 %", "seed": 0, "failed": "why"}
    first, second = peers.table([*rows, failed])
    assert first["perplexity, theirs"] == "failed"
    assert second["perplexity, theirs"] == "41.00 ± 1.41"
    assert second["perplexity, ours"] == "40.00 ± 1.41"  # of 41 at the first seed, of 39 with as few zeros at the other
    assert second["error, ours"] == "0.2500 ± 0.0000"
