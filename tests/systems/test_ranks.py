"""One recipe under two processes: the same masks, to rounding the same weights, and one set of files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from prunus.language.single import compress
from prunus.machine import ranks
from prunus.masks import Masks
from prunus.recipe import Recipe, parse
from prunus.report import read_metrics
from prunus.run.cli import main
from tests.processes import run_ranks, start
from tests.systems.test_compress import raw

FITTED = {"reconstruct": {"steps": 4, "lr": 1e-3}}
SHARED = {"prune": {"criterion": "sparsegpt", "pattern": "2:4"}}  # calibration and layers are shared, too


def two_processes(recipe: Path, launcher: bool) -> str:
    """What `prunus run` printed in all, begun by torchrun or as two ranks that know each other already."""
    if not launcher:
        return "".join(run_ranks(command, str(recipe), folder=recipe.parent))
    shown = recipe.parent / "shown"
    process = start(launch, str(recipe), str(shown))
    process.join(300)
    texts = [path.read_text() for path in sorted(shown.rglob("std*.log"))]
    assert process.exitcode == 0, "\n".join(text[-3000:] for text in texts)
    return "".join(texts)


def launch(recipe: str, shown: str) -> None:
    """As torchrun does, and `accelerate launch` for several GPUs, but with forks for workers, not interpreters."""
    here = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    logs = DefaultLogsSpecs(shown, redirects=Std.ALL)
    how = LaunchConfig(1, 1, 2, **here, start_method="spawn", max_restarts=0, logs_specs=logs)
    elastic_launch(how, command)(recipe)


def command(recipe: str) -> None:
    sys.argv = ["prunus", "run", recipe]
    with pytest.raises(SystemExit, match="0"):
        main()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FITTED, SHARED], ids=["fitted", "shared"])
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_make_the_model_of_one(
    tiny_folder: Path, text_file: Path, tmp_path: Path, streaming: bool, changes: dict[str, Any]
) -> None:
    for name in ("one", "two"):
        asked = raw(tiny_folder, text_file, tmp_path / name, streaming=streaming, **changes)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(asked))
    alone = compress(parse(yaml.safe_load((tmp_path / "one.yaml").read_text()), Recipe, "one"))
    shown = two_processes(tmp_path / "two.yaml", launcher=streaming and changes is SHARED)
    assert shown.count("perplexity, text") == 1  # one table
    files = [{p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert files[1] - files[0] == {Path("report.html"), Path("loss.png")}  # which the command makes
    assert files[0] < files[1]
    rows = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert len(rows) == len(read_metrics(tmp_path / "one" / "metrics.jsonl"))
    together = yaml.safe_load((tmp_path / "two" / "result.json").read_text())
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert together["perplexity"]["merged"]["text"] == pytest.approx(alone["perplexity"]["merged"]["text"], rel=1e-4)
    assert together["retraining"]["tokens"] == alone["retraining"]["tokens"]
    masks = [Masks.load(tmp_path / name / "model" / "masks.safetensors") for name in ("one", "two")]
    assert masks[0] == masks[1]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    asked = parse(raw(tiny_folder, text_file, tmp_path / "out"), Recipe, "test")
    with pytest.raises(ValueError, match=r"retrain\.batch_size: 4 sequences .* by 3 processes; use a multiple of 3"):
        compress(asked)
    with pytest.raises(ValueError, match="'cuda:1' is one GPU, but 3 processes run; use device: auto"):
        ranks.join(torch.device("cuda:1"))
    assert not (tmp_path / "out").exists()
