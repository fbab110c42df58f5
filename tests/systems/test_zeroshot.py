"""Zero-shot scores: lm-eval's prompts, and accuracies that an independent computation finds as well."""

import json
import logging
import math
import sys
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunus.machine import write_json
from prunus.measure import zeroshot
from prunus.measure.zeroshot import check_task, check_tasks, zero_shot
from prunus.recipe import Evaluate

FORMS = Path(zeroshot.__file__).parent / "tasks"
ARC = {"query": "Question: What do plants make?", "choices": ["sugar", "salt", "glass and sand"], "gold": 0}
BOOLQ = {"query": "Passage: Ice floats.\nQuestion: does ice sink?", "choices": ["no", "yes"], "gold": 0}
OPEN = {"query": "Predators eat", "choices": ["bunnies", "grass"], "gold": 0}
RTE = 'index\tsentence1\tsentence2\tlabel\n0\tHe said "no.\tHe spoke.\tentailment\n1\tA.\tB.\tnot_entailment\n'


def file_of(tmp_path, *rows, name="task.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompt(form, **document):
    """What a task's YAML makes of an example."""
    task = yaml.safe_load((FORMS / f"{form}.yaml").read_text())
    return jinja2.Template(task["doc_to_text"]).render(document)


def test_prompts():
    assert prompt("choices", **ARC) == "Question: What do plants make?\nAnswer:"
    assert prompt("choices", **BOOLQ) == "Ice floats.\nQuestion: does ice sink?\nAnswer:"
    assert prompt("choices", **OPEN) == "Predators eat"
    rte = {"sentence1": 'He said "no.', "sentence2": "He spoke."}
    assert prompt("entailment", **rte) == 'He said "no.\nQuestion: He spoke. True or False?\nAnswer:'


def test_prompts_are_lm_evals():
    lm_eval = pytest.importorskip("lm_eval")

    def theirs(task, **document):
        text = (Path(lm_eval.__file__).parent / "tasks" / task).read_text()
        template = next(line for line in text.splitlines() if line.startswith("doc_to_text:"))
        return jinja2.Template(yaml.safe_load(template)["doc_to_text"]).render(document)

    rte = {"sentence1": 'He said "no.', "sentence2": "He spoke."}
    assert prompt("choices", **ARC) == theirs("arc/arc_easy.yaml", question="What do plants make?")
    boolq = theirs("super_glue/boolq/default.yaml", passage="Ice floats.", question="does ice sink")
    assert prompt("choices", **BOOLQ) == boolq
    assert prompt("entailment", **rte) == theirs("glue/rte/default.yaml", **rte)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ARC, "gold": 3}, "line 2: gold 3 is not"),
        ({**ARC, "gold": "0"}, "line 2: gold '0' is not"),
        ({**ARC, "choices": ["a", ""]}, "line 2: choices must be texts"),
        ({"query": "x"}, "line 2: needs query, choices and gold"),
    ],
)
def test_bad_lines_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        check_task(file_of(tmp_path, ARC, row))


def test_bad_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(file_of(tmp_path, ARC, name="at-home.jsonl").parent))
    check_task("~/at-home.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is not there"):
        check_task(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no example"):
        check_task(file_of(tmp_path))
    with pytest.raises(ValueError, match=r"none of \.jsonl, \.tsv, \.yaml"):
        check_task(file_of(tmp_path, ARC, name="task.csv"))
    (tmp_path / "rte.tsv").write_text(RTE.replace("not_entailment", "maybe"))
    with pytest.raises(ValueError, match="line 3: needs the columns"):
        check_task(tmp_path / "rte.tsv")
    with pytest.raises(ValueError, match="no zero-shot task"):
        zero_shot(None, None, {})


def character_tokenizer():
    letters = {chr(i): i - 31 for i in range(32, 127)} | {"\n": 96, "<s>": 0}
    inner = Tokenizer(models.WordLevel(letters, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", unk_token="<s>")


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=128, initializer_range=0.8, **sizes))


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, continuation):
    """Sum of log p of the continuation's tokens, the plain way."""
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + continuation)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))


def random_rows(count):
    generator = torch.Generator().manual_seed(1)

    def word(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (length,), generator=generator))

    golds = torch.randint(0, 3, (count,), generator=generator).tolist()
    return [{"query": word(4, 20), "choices": [word(1, 9) for _ in range(3)], "gold": gold} for gold in golds]


def test_accuracies_match_a_plain_computation(tmp_path, caplog):
    pytest.importorskip("lm_eval")
    model, tokenizer, rows = tiny_model(), character_tokenizer(), random_rows(30)
    right = right_normed = 0
    for row in rows:
        scores = [log_likelihood(model, tokenizer, row["query"], " " + choice) for choice in row["choices"]]
        normed = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["gold"]
        right_normed += normed.index(max(normed)) == row["gold"]
    assert right != right_normed  # the two accuracies are told apart
    model.train()
    with caplog.at_level(logging.WARNING):
        scores = zero_shot(model, tokenizer, {"mine": file_of(tmp_path, *rows)}, batch_size=4)
    found = scores.rows
    assert found["mine"]["acc"] == right / 30
    assert found["mine"]["acc_norm"] == right_normed / 30
    acc = right / 30
    assert found["mine"]["stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / 29))
    assert found["mine"]["n"] == 30
    assert model.training
    assert not caplog.records
    assert scores.report["results"]["mine"]["acc,none"] == acc
    assert scores.report["n-shot"] == {"mine": 0}
    write_json(tmp_path / "report.json", scores.report)  # nothing in it that JSON does not know


def test_requests_that_do_not_fit_are_asked_fewer_at_a_time(tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer, tasks = tiny_model(), character_tokenizer(), {"mine": file_of(tmp_path, *random_rows(6))}
    fits = zero_shot(model, tokenizer, tasks, batch_size=3).rows
    sizes, most = [], 3

    def run_out(_, args):
        sizes.append(len(args[0]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.26 GiB.")

    model.register_forward_pre_hook(run_out)
    assert zero_shot(model, tokenizer, tasks, batch_size=6).rows == fits
    assert sizes[0] == 6
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        zero_shot(model, tokenizer, tasks, batch_size=6)


def test_limit_and_order_of_tasks(tmp_path):
    pytest.importorskip("lm_eval")
    files = {name: file_of(tmp_path, *random_rows(6), name=f"{name}.jsonl") for name in ("b", "a")}
    (tmp_path / "rte.tsv").write_text(RTE)
    own = {"include": str(FORMS / "choices.yaml"), "dataset_kwargs": {"data_files": {"test": str(files["a"])}}}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    tasks = files | {"rte": tmp_path / "rte.tsv", "own": tmp_path / "own.yaml"}
    found = zero_shot(tiny_model(), character_tokenizer(), tasks, limit=4).rows
    assert list(found) == ["b", "a", "rte", "own"]
    assert found["own"] == found["a"]
    assert found["rte"]["n"] == 2
    assert found["a"]["n"] == 4


def test_missing_lm_eval_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"prunus\[zeroshot\]"):
        zero_shot(tiny_model(), character_tokenizer(), {"mine": file_of(tmp_path, ARC)})
    with pytest.raises(ImportError, match=r"prunus\[zeroshot\]"):
        check_tasks({"hellaswag": None})


def test_shots_and_chats_change_the_prompt(tmp_path, monkeypatch):
    """Few-shot examples come before the question, and a chat template around it."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    asked = []
    score = HFLM.loglikelihood

    def seen(self, requests, **how):
        asked.append(requests[0].args[0])
        return score(self, requests, **how)

    monkeypatch.setattr(HFLM, "loglikelihood", seen)
    tokenizer, task = character_tokenizer(), {"mine": file_of(tmp_path, ARC, OPEN, ARC)}
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    for how in ({}, {"shots": 1}, {"chat": True}):
        zero_shot(tiny_model(), tokenizer, task, limit=1, **how)
    plain, shot, chat = asked
    assert plain == "Question: What do plants make?\nAnswer:"
    assert shot.endswith(plain)
    assert len(shot) > len(plain)
    assert chat == f"[user]{plain}[assistant]"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        zero_shot(tiny_model(), tokenizer, task, chat=True)


@pytest.mark.slow
def test_a_name_that_lm_eval_has_not_is_refused():
    pytest.importorskip("lm_eval")
    check_tasks({"hellaswag": None})
    with pytest.raises(ValueError, match=r"lm-eval has no task 'arc_eazy'"):
        check_tasks({"hellaswag": None, "arc_eazy": None})


@pytest.mark.parametrize("said", [{"a": None, "b": None}, ["a", "b"], "a, b"])
def test_recipes_name_tasks_alone_or_with_files(said):
    assert Evaluate(tasks=said).tasks == {"a": None, "b": None}
    with pytest.raises(ValueError, match=r"no file or folder 'none\.jsonl'"):
        Evaluate(tasks={"a": "none.jsonl"})
