"""Zero-shot and few-shot scores by lm-eval: any task of its own, or of a local file, which needs no network.

    name, file ─▶ a task's YAML in a folder of ours ─▶ lm-eval's simple_evaluate ─▶ a row a task, lm-eval's report

Local files are tasks by `tasks/choices.yaml` (JSON lines) and `tasks/entailment.yaml` (TSV), which have the prompts of
lm-eval's arc_easy, boolq, openbookqa and rte, so numbers compare with published ones where the examples are the same.
A file that is such a YAML itself is taken as it is.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch

from prunus.machine import give_back_memory, import_extra, in_mode, put_back, random_state, set_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMS = Path(__file__).parent / "tasks"
_LABELS = ("entailment", "not_entailment")
_TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}
_levels: list[list[int]] = []  # of lm-eval's messages, which the whole process has
_BARE = ("samples", "config", "configs", "pretty_env_info")  # of lm-eval's report: long, or of the machine

Tasks = Mapping[str, "str | Path | None"]


@dataclass(frozen=True)
class Scores:
    """rows: task -> its metrics, `stderr` of the first, and `n` examples. report: what lm-eval says, as JSON has it."""

    rows: dict[str, dict[str, float]]
    report: dict[str, Any]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    shots: int | None = None,
    chat: bool = False,
    limit: int | None = None,
    batch_size: int | Literal["auto"] = 8,
) -> Scores:
    """The scores of tasks, measured where `model` is.

    tasks: name -> file (see `check_task`), or name -> None for lm-eval's task of that name, whose data it downloads.
    shots: examples before each question; None: the task's own number, mostly none. chat: through the tokenizer's chat
    template. limit: only the first so many examples. batch_size: requests at a time, fewer where these do not fit
    beside what else the GPU holds, or "auto". Prompts longer than the model's window lose their beginning. Random
    states are as before.

    Raises ImportError when lm-eval is not installed; ValueError for no task, one that lm-eval does not know, an
    unreadable file, and a chat template that is not there.

    >>> zero_shot(model, tokenizer, {"arc_easy": "arc_easy.jsonl"}, limit=100).rows  # doctest: +SKIP
    """
    if not tasks:
        raise ValueError("no zero-shot task was given; give at least one name")
    check_tasks(tasks)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: the tokenizer has no chat template; leave it out, or give an instruction-tuned model")
    how: dict[str, Any] = {"num_fewshot": shots, "limit": limit, "apply_chat_template": chat}
    how |= {"fewshot_as_multiturn": chat, "tasks": list(tasks), "log_samples": False}
    evaluator = _lm_eval("evaluator")

    def score(size: int | Literal["auto"]) -> dict[str, Any]:
        wrapped = _lm_eval("models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        return evaluator.simple_evaluate(wrapped, task_manager=manager, **how)

    before = random_state(model)
    try:
        with _manager(tasks) as manager, _quiet(), in_mode(model, training=False):
            found = score(batch_size) if batch_size == "auto" else _fitting(score, batch_size)
    finally:
        set_random_state(before, model)
    report = {key: value for key, value in found.items() if key not in _BARE}
    return Scores({name: _row(report, name) for name in tasks}, report)


def _fitting(score: Callable[[int], dict[str, Any]], size: int) -> dict[str, Any]:
    """What `score(size)` says; of half as many requests at a time, and again, while memory runs out."""
    while True:
        with suppress(torch.OutOfMemoryError) if size > 1 else nullcontext():
            return score(size)
        size //= 2
        give_back_memory()


def check_tasks(tasks: Tasks) -> None:
    """Raise ImportError without lm-eval; ValueError for a file that is no task, or a name that lm-eval has not.

    >>> check_tasks({})
    """
    for path in tasks.values():
        if path is not None:
            check_task(path)
    named = [name for name, path in tasks.items() if path is None]
    if tasks:
        import_extra("lm_eval", "zeroshot", "tasks are measured by lm-eval")
    known = _lm_eval("tasks").TaskManager().all_tasks if named else []  # reading them takes seconds
    strange = next((name for name in named if name not in set(known)), None)
    if strange is not None:
        raise ValueError(f"lm-eval has no task {strange!r}: `lm-eval ls tasks` lists them; of your own, give its file")


def check_task(path: str | Path) -> None:
    """Raise ValueError, naming file and line, for a file that is no task; FileNotFoundError for a missing one.

    .jsonl: {"query", "choices", "gold"} a line. A query that begins with "Question:" (ARC) or "Passage:" (BoolQ, whose
    first word is dropped) gets "\\nAnswer:" appended; any other (OpenBookQA) is continued as it stands.
    .tsv: GLUE's RTE, columns sentence1, sentence2, label; choices True and False. .yaml: a task of lm-eval's own form.

    >>> check_task("arc_easy.jsonl")  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"zero-shot file {path} is not there; give a .jsonl, .tsv or .yaml file")
    if path.suffix == ".yaml":
        return
    if path.suffix not in (".jsonl", ".tsv"):
        raise ValueError(f"zero-shot file {path} is none of .jsonl, .tsv, .yaml; make it query, choices, gold lines")
    wrong, count = (_wrong_line if path.suffix == ".jsonl" else _wrong_row), 0
    with path.open(encoding="utf-8", newline="") as file:
        rows: Any = file if path.suffix == ".jsonl" else csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for count, row in enumerate(rows, 1):
            said = wrong(row)
            if said:
                raise ValueError(f"{path}, line {count + (path.suffix == '.tsv')}: {said}")
    if not count:
        raise ValueError(f"zero-shot file {path} holds no example")


def _wrong_line(line: str) -> str:
    """What is wrong with a line of JSON; nothing where it is right."""
    try:
        row = json.loads(line)
        choices, gold = row["choices"], row["gold"]
        if not isinstance(row["query"], str) or not isinstance(choices, list):
            raise TypeError("query is a text and choices a list")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return f"needs query, choices and gold as JSON ({error!r})"
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold {gold!r} is not the number of one of {len(choices)} choices"
    if not all(isinstance(choice, str) and choice for choice in choices):
        return f"choices must be texts that are not empty, got {choices!r}"
    return ""


def _wrong_row(row: Mapping[str, str | None]) -> str:
    """What is wrong with a row of RTE."""
    if None not in (row.get("sentence1"), row.get("sentence2")) and row.get("label") in _LABELS:
        return ""
    return f"needs the columns sentence1, sentence2 and label ({' or '.join(_LABELS)}), got {dict(row)}"


@contextmanager
def _manager(tasks: Tasks) -> Generator[Any]:
    """lm-eval's index of tasks, with those of local files."""
    with TemporaryDirectory() as folder:
        for name, path in tasks.items():
            if path is not None:
                text = json.dumps(_task(name, Path(path).expanduser().resolve()))  # which is YAML
                (Path(folder) / f"{name.replace('/', '_')}.yaml").write_text(text, encoding="utf-8")
        yield _lm_eval("tasks").TaskManager(include_path=folder, include_defaults=None in tasks.values())


def _task(name: str, path: Path) -> dict[str, Any]:
    if path.suffix == ".yaml":
        return {"include": str(path), "task": name}
    form, reader = ("choices", {}) if path.suffix == ".jsonl" else ("entailment", _TSV)
    data = {"data_files": {"test": str(path)}, **reader}
    return {"include": str(_FORMS / f"{form}.yaml"), "task": name, "dataset_kwargs": data}


def _lm_eval(module: str) -> Any:
    return import_extra(f"lm_eval.{module}", "zeroshot", "tasks are measured by lm-eval")


@contextmanager
def _quiet() -> Generator[None]:
    """lm-eval warns of every model that is not named by a string, and says at length what it does."""
    talk = logging.getLogger("lm_eval")
    with put_back(_levels, lambda: talk.level, talk.setLevel):
        talk.setLevel(logging.ERROR)
        yield


def _row(report: Mapping[str, Any], name: str) -> dict[str, float]:
    """The metrics of a task or a group, without lm-eval's filter where that is none."""
    found: Mapping[str, Any] = report["results"].get(name) or report.get("groups", {}).get(name, {})
    row: dict[str, float] = {}
    for key, value in found.items():
        metric, _, rule = key.partition(",")
        if rule and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
            row[metric if rule == "none" else f"{metric}, {rule}"] = float(value)
    first = next((key for key in found if "," in key), ",")
    stderr = found.get("{}_stderr,{}".format(*first.split(",", 1)))
    counts = report.get("n-samples", {}).get(name, {})
    return (
        row
        | ({"stderr": float(stderr)} if isinstance(stderr, (int, float)) else {})
        | ({"n": counts["effective"]} if counts else {})
    )
