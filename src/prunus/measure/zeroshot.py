"""Zero-shot accuracy with lm-eval's model wrapper, on local files or on lm-eval's own tasks.

Every choice is scored as a continuation of the prompt; nothing is generated and nothing is downloaded for files:

    acc:      argmax_c  log p(" " + c | prompt) = gold
    acc_norm: argmax_c  log p(" " + c | prompt) / len(c) = gold        (len in characters)

Prompts are those of lm-eval 0.4.9 to 0.4.13 (arc_easy, boolq, openbookqa, rte), so numbers compare with published
ones where the examples are the same.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.machine import import_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A prompt, the choices that may continue it (after one blank), and the number of the right one."""

    prompt: str
    choices: tuple[str, ...]
    gold: int


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, str | Path | None],
    *,
    limit: int | None = None,
    batch_size: int | str = 8,
) -> dict[str, dict[str, float]]:
    """Task name -> {acc, acc_norm, stderr, n}, measured where `model` is; stderr is that of acc.

    tasks: name -> file (see `read_task`), or name -> None for lm-eval's task of that name, which needs the network.
    limit: only the first so many examples. batch_size: requests at a time, or "auto". Prompts longer than the model's
    window lose their beginning.

    Raises ImportError when lm-eval is not installed; ValueError for an unreadable file or no task.

    >>> zero_shot(model, tokenizer, {"arc_easy": "arc_easy.jsonl"}, limit=100)
    """
    if not tasks:
        raise ValueError("no zero-shot task was given; give at least one name and its file")
    files = {name: read_task(path)[:limit] for name, path in tasks.items() if path is not None}
    named = [name for name, path in tasks.items() if path is None]
    training = model.training
    wrapped = _wrap(model, tokenizer, batch_size)
    try:
        found = {name: _score(wrapped, name, examples) for name, examples in files.items()}
        found |= _named(wrapped, named, limit) if named else {}
    finally:
        model.train(training)
    return {name: found[name] for name in tasks}


def read_task(path: str | Path) -> list[Example]:
    """The examples of a .jsonl or .tsv file, with lm-eval's prompts.

    .jsonl: {"query", "choices", "gold"} a line. A query that begins with "Question:" (ARC) or "Passage:" (BoolQ, whose
    first word is dropped) gets "\\nAnswer:" appended; any other (OpenBookQA) is continued as it stands.
    .tsv: GLUE's RTE, columns sentence1, sentence2, label; choices True and False.

    Raises ValueError naming file, line and what is wrong with it; FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"zero-shot file {path} is not there; give a .jsonl or .tsv file")
    readers = {".jsonl": _choice_lines, ".tsv": _entailment_lines}
    if path.suffix not in readers:
        raise ValueError(f"zero-shot file {path} is neither .jsonl nor .tsv; convert it to query, choices, gold lines")
    examples = readers[path.suffix](path)
    if not examples:
        raise ValueError(f"zero-shot file {path} holds no example")
    return examples


def _choice_lines(path: Path) -> list[Example]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_choice_line(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _choice_line(path: Path, number: int, line: str) -> Example:
    try:
        row = json.loads(line)
        query, choices, gold = row["query"], tuple(row["choices"]), row["gold"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line {number}: needs query, choices and gold as JSON ({error!r})") from error
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"{path}, line {number}: gold {gold!r} is not the number of one of {len(choices)} choices")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{path}, line {number}: choices must be texts that are not empty, got {choices!r}")
    if query.startswith(("Question:", "Passage:")):
        query = query.removeprefix("Passage:").lstrip() + "\nAnswer:"
    return Example(query, choices, gold)


def _entailment_lines(path: Path) -> list[Example]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [_entailment_line(path, i, row) for i, row in enumerate(rows, 2)]


def _entailment_line(path: Path, number: int, row: Mapping[str, str | None]) -> Example:
    labels = {"entailment": 0, "not_entailment": 1}
    premise, hypothesis, label = row.get("sentence1"), row.get("sentence2"), row.get("label")
    if premise is None or hypothesis is None or label not in labels:
        raise ValueError(
            f"{path}, line {number}: needs the columns sentence1, sentence2 and label (entailment or not_entailment), "
            f"got {dict(row)}"
        )
    prompt = f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    return Example(prompt, ("True", "False"), labels[label])


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str) -> Any:
    """lm-eval's HFLM around the model where it is."""
    library = import_extra("lm_eval.models.huggingface", "zeroshot", "zero-shot evaluation needs lm-eval")
    talk = logging.getLogger("lm_eval.models.huggingface")
    level = talk.level
    talk.setLevel(logging.ERROR)  # it warns of every model that is not named by a string
    try:
        return library.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        talk.setLevel(level)


def _score(wrapped: Any, name: str, examples: list[Example]) -> dict[str, float]:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    requests = [
        Instance("loglikelihood", {}, (example.prompt, f" {choice}"), idx=j, metadata=(name, i, 1))
        for i, example in enumerate(examples)
        for j, choice in enumerate(example.choices)
    ]
    scores = iter(wrapped.loglikelihood(requests, disable_tqdm=True))
    right: list[bool] = []
    right_normed: list[bool] = []
    for example in examples:
        found = [next(scores)[0] for _ in example.choices]
        right.append(_argmax(found) == example.gold)
        normed = [score / len(choice) for score, choice in zip(found, example.choices, strict=True)]
        right_normed.append(_argmax(normed) == example.gold)
    n = len(examples)
    acc = sum(right) / n
    stderr = math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else math.nan
    return {"acc": acc, "acc_norm": sum(right_normed) / n, "stderr": stderr, "n": n}


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)  # the first of equals, as lm-eval takes it


def _named(wrapped: Any, names: list[str], limit: int | None) -> dict[str, dict[str, float]]:
    """lm-eval's own tasks, which it downloads."""
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    report: Any = simple_evaluate(model=wrapped, tasks=list(names), limit=limit)
    return {name: _row(report["results"][name], report["n-samples"][name]["effective"]) for name in names}


def _row(result: Mapping[str, Any], n: int) -> dict[str, float]:
    keys = {"acc": "acc,none", "acc_norm": "acc_norm,none", "stderr": "acc_stderr,none"}
    return {ours: float(result[theirs]) for ours, theirs in keys.items() if theirs in result} | {"n": n}
