"""A run writes and deletes in folders of its own alone."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunus.run.cli import app

TASKS = {"a language model": "model: embedded", "a classifier": "images: {source: digits}\nmodel: resnet20"}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_a_folder_of_the_user_is_refused_and_left_alone(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = {Path("recipe.yaml"): f"# mine\n{task}\n", Path("work/notes.txt"): "years of it"}
    for path, text in mine.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    done = CliRunner().invoke(app, ["run", "recipe.yaml", "--out", "."])
    assert done.exit_code != 0
    assert isinstance(done.exception, ValueError)
    assert "is no run folder" in str(done.exception)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        tmp_path / path: text for path, text in mine.items()
    }
