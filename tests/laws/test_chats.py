"""Chats and pairs: the loss is on the answers alone, in the stream, in windows, in the loss and in perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from prunus.data import IGNORED, PackedTokens, TextSource, labels, read_chats, windows
from prunus.measure import perplexity
from prunus.train import distilled_next_token, next_token, next_token_loss, train
from prunus.train.next_token import answered
from tests.conftest import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn.role == 'system' and not loop.first %}{{ raise_exception('system goes first') }}{% endif %}"
    "<{{ turn.role[0] }}>{{ turn.content | trim }}|\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, start: bool = False) -> Any:
    """One token a byte, and an end token; start: it also stands before every text."""
    made = byte_tokenizer()
    made.chat_template = template
    if start:
        end = made.eos_token_id
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", end)]
        )
    return made


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def written(path: Path, *rows: Any) -> TextSource:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return TextSource(str(path))


def shown(tokens: Any, made: Any) -> str:
    """The stream as text, with every token that the loss is on in capitals."""
    letters = [made.decode([token]) for token in tokens.ids.tolist()]
    return "".join(each.upper() if on else each for each, on in zip(letters, tokens.answers.tolist(), strict=True))


def test_of_chats_the_answers_and_their_ends_are_learnt(tmp_path: Path):
    source = written(tmp_path / "c.jsonl", {"m": turns("q", " why ", "r", "no")}, {"m": turns("s", "ok"), "n": 1})
    made = tokenizer()
    found = read_chats(source, made, messages="m")
    assert shown(found, made) == "<u>q|\n<a>WHY|\n<u>r|\n<a>NO|\n</s><u>s|\n<a>OK|\n</s>"
    assert found.ids.dtype == torch.int32
    assert len(read_chats(source, made, messages="m", most=7)) == 7


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_of_pairs_the_answers_and_the_end_token_are_learnt(tmp_path: Path, ending: Any):
    path = tmp_path / f"p.{ending}"
    source = written(path, {"ask": "2+2=", "say": " four"}, {"ask": "", "say": "x"})
    if ending == "csv":
        path.write_text('ask,say\n2+2=," four"\n,x\n')
    made = tokenizer()
    assert shown(read_chats(source, made, prompt="ask", answer="say"), made) == "2+2= FOUR</S>X</S>"


def test_pairs_of_turns_go_through_the_template(tmp_path: Path):
    source = written(tmp_path / "p.jsonl", {"prompt": turns("q"), "completion": turns("", "a")[1:]})
    made = tokenizer()
    assert shown(read_chats(source, made), made) == "<u>q|\n<a>A|\n</s>"


def test_contents_that_the_template_understands_are_taken(tmp_path: Path):
    parts = "{% if turn.content is string %}{{ turn.content }}{% else %}{{ (turn.content or [''])[0] }}{% endif %}"
    made = tokenizer(TEMPLATE.replace("{{ turn.content | trim }}", parts))
    found = read_chats(written(tmp_path / "c.jsonl", {"m": turns(["None"], "b", None, "c")}), made, messages="m")
    assert shown(found, made) == "<u>None|\n<a>B|\n<u>|\n<a>C|\n</s>"


def test_a_start_token_of_the_template_is_not_there_twice(tmp_path: Path):
    made = tokenizer("</s>" + TEMPLATE, start=True)
    source = written(tmp_path / "c.jsonl", {"m": turns("q", "a")})
    found = read_chats(source, made, messages="m")
    assert found.head == (made.eos_token_id,)
    assert shown(found, made) == "<u>q|\n<a>A|\n</s>"


def test_a_token_with_a_part_of_the_answer_belongs_to_it(tmp_path: Path):
    from transformers import AutoTokenizer

    from prunus.data import ASSETS

    made = AutoTokenizer.from_pretrained(ASSETS)
    found = read_chats(written(tmp_path / "p.jsonl", {"prompt": "It was ", "completion": "the end"}), made)
    pieces = [made.decode([token]) for token in found.ids.tolist()]
    assert pieces == ["It", " was", " the", " end", "</s>"]
    assert found.answers is not None
    assert found.answers.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"m": "text"}, "line 2 is no chat"),
        ({"m": [{"from": "human", "value": "x"}]}, "line 2 is no chat"),
        ({"m": []}, "line 2 is no chat"),
        ({"m": turns("only asked")}, "line 2 holds no turn of the role 'assistant'"),
        ({"m": [*turns("q", "a"), {"role": "system", "content": "s"}]}, "line 2: .*refuses.*system goes first"),
        ({"n": 1}, "line 2 has no column 'm'"),
        ({"m": turns("q", "\ud83d")}, "line 2, column 'm': half a character"),
        ({"m": turns([{"type": "text"}], "a")}, "line 2: .*writes the content of turn 1 as it stands in Python, "),
    ],
)
def test_rows_that_are_no_chats_are_refused_with_their_place(tmp_path: Path, row: Any, message: Any):
    source = written(tmp_path / "c.jsonl", {"m": turns("q", "a")}, row)
    with pytest.raises(ValueError, match=message):
        read_chats(source, tokenizer(), messages="m")


def test_what_cannot_make_chats_is_refused(tmp_path: Path):
    source = written(tmp_path / "c.jsonl", {"m": turns("q", "a", "r", "b"), "prompt": "x", "completion": ""})
    with pytest.raises(ValueError, match="no chat template"):
        read_chats(source, tokenizer(None), messages="m")
    last = "{% for turn in messages %}<{{ turn.role[0] }}>{% if loop.last %}!{% endif %}{{ turn.content }}{% endfor %}"
    with pytest.raises(ValueError, match="line 1: the chat template writes turn 2 otherwise when more follow"):
        read_chats(source, tokenizer(last), messages="m")
    with pytest.raises(ValueError, match="line 1, column 'completion': the answer is empty"):
        read_chats(source, tokenizer())
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="has no columns"):
        read_chats(TextSource(str(tmp_path / "a.txt")), tokenizer(), messages="m")


def pairs(tmp_path: Path, *rows: tuple[str, str]) -> tuple[Any, Any]:
    made = tokenizer()
    asked = [{"prompt": prompt, "completion": answer} for prompt, answer in rows]
    return read_chats(written(tmp_path / "p.jsonl", *asked), made), made


def test_labels_of_windows_by_hand(tmp_path: Path):
    found, made = pairs(tmp_path, ("ab", "c"), ("defghijk", "l"))  # ab C END | defg hijk | L END
    c, l, end = (int(made(letter)["input_ids"][0]) for letter in ("c", "l", "</s>"))
    n = IGNORED
    assert labels(found, 4).tolist() == [[n, n, c, end], [n, n, n, n], [n, n, n, n]]
    packed = PackedTokens(found, 4)
    assert len(packed) == 1  # where nothing is learnt nothing is seen
    ids, wanted = packed.batch(5, batch=2, seed=0)
    assert ids.tolist() == 2 * windows(found, 4)[:1].tolist()
    assert wanted.tolist() == 2 * [[n, n, c, end]]
    assert labels(found, 7).tolist() == [[n, n, c, end, n, n, n], [n, n, n, n, n, l, end]]
    assert labels(found, 14).tolist() == [[n, n, c, end, *8 * [n], l, end]]
    with pytest.raises(ValueError, match="No window of 5 tokens holds a part of an answer"):
        len(PackedTokens(pairs(tmp_path, ("abcdefghijk", "l"))[0], 5))


@pytest.mark.parametrize("entries", [1 << 25, 600], ids=["whole", "in chunks"])
def test_the_loss_is_the_mean_over_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Any):
    monkeypatch.setattr(next_token, "_ENTRIES", entries)
    monkeypatch.setattr(next_token, "_TILE", 2)
    found, _ = pairs(tmp_path, ("ab", "c"), ("de", "fgh"), ("i", "jk"))
    model = tiny_llama()
    words = next(model.parameters())  # the embedding, which is the head, too
    ids, wanted = (rows[:2] for rows in (windows(found, 7).long(), labels(found, 7).long()))
    places = [(row, place) for row in range(2) for place in range(1, 7) if wanted[row, place] != IGNORED]
    assert len(places) == 8  # ab C E de F | G H E i J K E, of which G, the first of a window, is not predicted
    logs = torch.log_softmax(model(input_ids=ids).logits, -1)
    by_hand = -torch.stack([logs[row, place - 1, ids[row, place]] for row, place in places]).mean()
    gradient = torch.autograd.grad(by_hand, words)[0]
    loss = next_token_loss(model, (ids, wanted))
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss, words)[0], gradient)
    assert perplexity(model, found, window=7) == pytest.approx(math.exp(by_hand.item()), rel=1e-5)


@pytest.mark.parametrize("entries", [1 << 25, 600], ids=["whole", "in chunks"])
@pytest.mark.parametrize("taught", [False, True], ids=["plain", "distilled"])
def test_answers_count_alike_in_whatever_micro_batch_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught: bool, entries: Any
):
    monkeypatch.setattr(next_token, "_ENTRIES", entries)
    monkeypatch.setattr(next_token, "_TILE", 2)
    loss = distilled_next_token(tiny_llama(seed=1), 0.5, 2.0) if taught else next_token_loss
    found, _ = pairs(tmp_path, ("abcdef", "g"), ("a", "bcdefgh"), ("abcd", "ef"), ("a", "bcdef"))
    packed = PackedTokens(found, 8)
    counts = {int(answered(packed.batch(place, batch=1, seed=0)) or 0) for place in range(4)}
    assert len(counts) > 1
    trained = {}
    for parts in (1, 2, 4):
        model = tiny_llama().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trace = train(
            model, lambda place, b=4 // parts: packed.batch(place, batch=b, seed=0), optimizer, lambda _: 1.0, steps=2,
            loss=loss, accumulate=parts,
        )  # fmt: skip
        trained[parts] = (trace.losses, torch.cat([each.detach().flatten() for each in model.parameters()]))
    for parts in (2, 4):
        assert trained[parts][0] == pytest.approx(trained[1][0], rel=1e-5)
        torch.testing.assert_close(trained[parts][1], trained[1][1], rtol=1e-5, atol=1e-7)


def test_labels_that_all_count_change_no_bit():
    ids = torch.randint(60, (4, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for batch in (ids, (ids, ids)):
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found.append(train(model, lambda _, b=batch: b, optimizer, lambda _: 1.0, steps=2, accumulate=3).losses)
    assert found[0] == found[1]
