"""Laws of reading, cutting and serving text."""

import csv
import gzip
import io
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from prunus.data import tokens as tokens_module
from prunus.data.texts import ASSETS, TextSource, read_texts
from prunus.data.tokens import (
    PackedTokens,
    Tokens,
    calibration,
    head_of,
    labels,
    mixed,
    read_tokens,
    tokenize,
    tokenize_documents,
    windows,
)
from tests.conftest import byte_tokenizer


class Bytes:
    """A tokenizer of bytes that puts a start token before every text, as many real ones do."""

    eos_token_id = 256

    def __call__(self, texts: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        if isinstance(texts, str):
            return {"input_ids": [257] * add_special_tokens + list(texts.encode())}
        return {"input_ids": [self(text, add_special_tokens=add_special_tokens)["input_ids"] for text in texts]}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """The embedded tokenizer: byte-level BPE of 4,096 tokens."""
    return PreTrainedTokenizerFast.from_pretrained(ASSETS)


def test_windows_do_not_overlap_and_drop_the_rest():
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="3 tokens hold no window of 4"):
        windows(torch.arange(3), 4)
    with pytest.raises(ValueError, match=r"shape \(2, 4\)"):
        windows(torch.zeros(2, 4), 4)


def test_joined_texts_are_one_stream_and_the_start_token_is_at_the_head_of_windows():
    stream = tokenize(["ab", "c"], Bytes())
    assert stream.dtype == torch.int64
    assert stream.tolist() == [*b"ab\n\nc"]
    assert head_of(Bytes()) == (257,)
    assert head_of(byte_tokenizer()) == ()
    headed = Tokens(stream, head_of(Bytes()))
    assert windows(headed, 3).tolist() == [[257, *b"ab"], [257, *b"\n\n"]]
    assert labels(headed, 3).tolist() == [[-100, *b"ab"], [-100, *b"\n\n"]]
    drawn = calibration(headed, 2, 3, seed=0)
    assert {tuple(row) for row in drawn.tolist()} <= {(257, *stream[i : i + 2].tolist()) for i in range(4)}
    packed = PackedTokens(headed, 3)
    assert len(packed) == 2
    assert sorted(packed.at(0, batch=2, seed=0).tolist()) == sorted(windows(headed, 3).tolist())
    with pytest.raises(ValueError, match="5 tokens hold no window of 7"):
        windows(headed, 7)
    with pytest.raises(ValueError, match="no character"):
        tokenize([""], Bytes(), separator="")


def test_a_string_is_one_text_and_not_one_a_character():
    assert tokenize("ab", Bytes()).equal(tokenize(["ab"], Bytes()))
    assert tokenize_documents("ab", Bytes()).equal(tokenize_documents(["ab"], Bytes()))


def test_documents_end_with_the_end_token():
    assert tokenize_documents(["ab", "c"], Bytes()).tolist() == [*b"ab", 256, *b"c", 256]


def marks(end: Any = "</s>"):
    """A tokenizer without pre-tokenizer, whose words may be of any characters: merges reach over spaces."""
    alphabet = ["<unk>", end, "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    pairs = [("e", "▁"), ("t", "h"), ("th", "e▁"), ("a", "n"), ("an", "d"), ("▁", "an"), (".", "▁"), ("d", "▁")]
    vocabulary = {word: number for number, word in enumerate([*alphabet, *(one + two for one, two in pairs)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)


@pytest.mark.parametrize("make", ["words", "marks"])
def test_a_long_text_in_chunks_has_the_tokens_of_the_whole(
    make: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = request.getfixturevalue("words") if make == "words" else marks()
    text = read_texts("embedded", split="test")[0][:30_000]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    monkeypatch.setattr(tokens_module, "_CHUNK", 1200)
    monkeypatch.setattr(tokens_module, "_OVERLAP", 400)
    monkeypatch.setattr(tokens_module, "_BATCH", 5000)
    assert tokenize([text], tokenizer).tolist() == whole
    parts = [text[:700], text[700:9000], text[9000:]]
    assert tokenize(parts, tokenizer, separator="").tolist() == whole
    ends = [token for part in parts for token in [*tokenizer(part, add_special_tokens=False)["input_ids"], 1]]
    assert tokenize_documents(parts, tokenizer).tolist() == ends


def test_a_text_that_reads_otherwise_from_every_place_is_tokenised_all_the_same(
    words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens_module, "_CHUNK", 1000)
    monkeypatch.setattr(tokens_module, "_OVERLAP", 40)
    text = "\N{GRINNING FACE}" * 1501
    assert words.decode(tokenize([text], words)) == text


def test_no_more_is_read_than_is_asked_for(words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    for name, size in (("_CHUNK", 500), ("_OVERLAP", 100), ("_BATCH", 1000)):
        monkeypatch.setattr(tokens_module, name, size)
    read = []

    def rows():
        for number in range(100):
            read.append(number)
            yield (f"row {number} " * 10,)

    monkeypatch.setattr(TextSource, "documents", lambda self: rows())
    found = read_tokens(TextSource("embedded", split="test"), words, most=300)
    assert len(found) == 300
    assert len(read) < 40


def test_a_long_stream_is_tokenised_once_for_each_content(
    words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "kept"))
    for name in ("_SMALL", "_HELD"):
        monkeypatch.setattr(tokens_module, name, 100)
    source = TextSource(str(tmp_path / "a.txt"))
    Path(source.source).write_text("one plum, two plums " * 90)
    plain = words(Path(source.source).read_text(), verbose=False)["input_ids"]
    assert read_tokens(source, words).ids.tolist() == plain
    monkeypatch.setattr(tokens_module, "_encoded", lambda *_: pytest.fail("tokenised twice"))
    assert read_tokens(source, words).ids.tolist() == plain
    Path(tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert read_tokens(TextSource(str(tmp_path / "b.txt")), words).ids.tolist() == plain
    monkeypatch.undo()
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "kept"))
    (tmp_path / "b.txt").write_text("another text " * 90)
    other = read_tokens(TextSource(str(tmp_path / "b.txt")), words)
    assert words.decode(other.ids) == "another text " * 90


def test_texts_that_are_cut_elsewhere_are_others(
    words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "kept"))
    for name in ("_SMALL", "_HELD"):
        monkeypatch.setattr(tokens_module, name, 100)
    found = []
    for cut in (900, 909):  # a line goes from the head of one file to the end of the other
        folder, text = tmp_path / str(cut), "one plum\n" * 200
        folder.mkdir()
        (folder / "a.txt").write_text(text[:cut])
        (folder / "b.txt").write_text(text[cut:])
        found.append(words.decode(read_tokens(TextSource(str(folder)), words, join="|").ids).index("|"))
    assert found == [900, 909]


def test_a_mixture_has_the_shares_that_are_asked_for():
    few, many = Tokens(torch.arange(10), head=(7,)), Tokens(torch.arange(100, 200))
    mix = mixed([few, many], [1, 3])
    assert mix.ids.tolist() == [*range(10), *range(100, 130)]
    assert mix.head == (7,)
    again = mixed([few, many], [0.5, 0.5], total=24)
    assert again.ids.tolist() == [*range(10), 0, 1, *range(100, 112)]
    answered = Tokens(torch.arange(4), answers=torch.tensor([True, False, False, True]))
    both = mixed([answered, many], [1, 1]).answers
    assert both is not None
    assert both.tolist() == [True, False, False, True] + 4 * [True]
    with pytest.raises(ValueError, match="above 0"):
        mixed([few, many], [1, 0])
    with pytest.raises(ValueError, match="text 2 of the mixture holds no token"):
        mixed([few, many.part(0.0, 0.001)], [1, 1], total=24)


def test_a_mixture_takes_from_all_over_a_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens_module, "_PIECE", 10)
    answers = torch.arange(1000) % 3 == 0
    mix = mixed([Tokens(torch.arange(1000), answers=answers), Tokens(torch.arange(40))], [0.75, 0.25], total=133)
    taken, rest = mix.ids[:100], mix.ids[100:]
    assert taken.tolist() == [place * 110 + each for place in range(10) for each in range(10)]
    assert rest.tolist() == [*range(11), *range(14, 25), *range(29, 40)]
    assert mix.answers is not None
    assert torch.equal(mix.answers[:100], answers[taken])


@given(st.integers(1, 10**12), st.data())
def test_pieces_of_a_mixture_do_not_overlap_and_lie_from_end_to_end(available: int, data: st.DataObject):
    count = data.draw(st.integers(0, min(available - 1, 50 * tokens_module._PIECE)))
    cuts = tokens_module._cuts(available, count)
    assert sum(cut.stop - cut.start for cut in cuts) == count
    assert all(one.stop <= other.start for one, other in pairwise(cuts))
    assert cuts[0].start == 0
    assert cuts[-1].stop == (available if len(cuts) > 1 else count)
    sizes = [cut.stop - cut.start for cut in cuts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 5), (8, 8), (7, 1)])
def test_each_epoch_serves_each_window_once(count: Any, batch: Any):
    packed = PackedTokens(torch.arange(count * 2 + 1, dtype=torch.int32), 2)
    served = torch.cat([packed.at(step, batch=batch, seed=3) for step in range(count)])  # `batch` whole epochs
    assert served.dtype == torch.int64
    for epoch in served.split(count):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 2 * count, 2))
        assert torch.equal(epoch[:, 1], epoch[:, 0] + 1)
    assert Counter(served[:, 0].tolist()) == dict.fromkeys(range(0, 2 * count, 2), batch)


def test_batches_depend_on_seed_and_step_alone():
    packed = PackedTokens(torch.arange(400), 4)
    late = packed.at(30, batch=8, seed=5)
    for step in range(3):
        packed.at(step, batch=8, seed=6)
    torch.manual_seed(99)
    assert torch.equal(PackedTokens(torch.arange(400), 4).at(30, batch=8, seed=5), late)
    assert not torch.equal(packed.at(30, batch=8, seed=6), late)
    orders = [torch.cat([packed.at(s, batch=100, seed=seed) for s in range(3)]) for seed in (0, 1)]
    epochs = [tuple(epoch[:, 0].tolist()) for order in orders for epoch in order.split(100)]
    assert len(set(epochs)) == 6


def test_ranks_share_a_batch():
    packed = PackedTokens(torch.arange(60), 3)
    parts = [packed.at(2, batch=6, seed=1, rank=rank, world=3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), packed.at(2, batch=6, seed=1))
    with pytest.raises(ValueError, match="batch of 5"):
        packed.at(0, batch=5, seed=1, rank=0, world=2)


@pytest.mark.parametrize("length", [30, 24, 60])
def test_calibration_windows_do_not_overlap_where_the_stream_is_long_enough(length: Any):
    samples = 120 // length
    drawn = calibration(torch.arange(120), samples, length, seed=7)
    assert drawn.shape == (samples, length)
    assert torch.equal(drawn.diff(dim=1), torch.ones(samples, length - 1, dtype=torch.int64))
    assert drawn.flatten().unique().numel() == samples * length
    assert torch.equal(drawn, calibration(torch.arange(120), samples, length, seed=7))


def test_calibration_of_a_short_stream():
    drawn = calibration(torch.arange(11), 4, 8, seed=0)
    assert drawn[:, 0].unique().numel() == 4
    with pytest.raises(ValueError, match="need at least 12 tokens; there are 11"):
        calibration(torch.arange(11), 5, 8, seed=0)


def rows_of(texts: Any):
    return "".join(json.dumps({"text": text, "n": n}, ensure_ascii=False) + "\n" for n, text in enumerate(texts))


def csv_of(texts: Any, delimiter: Any = ","):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([("n", "text"), *enumerate(texts)])
    return file.getvalue()


def test_every_form_of_file_holds_the_same_texts(tmp_path: Path):
    texts = ["first\u2028line\nsecond", 'übrig, "so" to\tsay', ""]
    (tmp_path / "a.jsonl").write_text(rows_of(texts), encoding="utf-8")
    (tmp_path / "a.csv").write_text(csv_of(texts), encoding="utf-8", newline="")
    (tmp_path / "a.tsv").write_text(csv_of(texts, "\t"), encoding="utf-8", newline="")
    (tmp_path / "marked.jsonl").write_text(
        "\n" + rows_of(texts).replace("\n", "\r\n \n"), encoding="utf-8-sig", newline=""
    )
    (tmp_path / "marked.csv").write_text(csv_of(texts), encoding="utf-8-sig", newline="")
    for name in ("a.jsonl", "a.csv", "a.tsv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read_texts(path) == texts, path.name
        assert read_texts(path, most=1) == texts[:1], path.name
        with pytest.raises(ValueError, match="no column 'body'"):
            read_texts(str(path), column="body")


def test_a_text_file_is_one_text_with_its_own_line_ends(tmp_path: Path):
    text = "one\r\ntwo\n"
    (tmp_path / "b.txt").write_bytes(text.encode())
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert [read_texts(path) for path in tmp_path.iterdir()] == 3 * [[text]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", rows_of(["x", None]), "line 2, column 'text': null is no text"),
        ("a.jsonl", rows_of(["x", 12]), "line 2, column 'text': a number is no text"),
        ("a.jsonl", "\n" + rows_of([["x"]]), "line 2, column 'text': a list is no text"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1, column 'text': half a character"),
        ("a.jsonl", '["x"]', "line 1 is no object"),
        ("a.jsonl", '"x"', "line 1 is no object"),
        ("a.jsonl", '{"text": "x"\n', "line 1 is no JSON"),
        ("a.jsonl", '{"other": "x"}\n', r"line 1 has no column 'text', only \['other'\]"),
        ("a.jsonl", rows_of(["ü"]).encode("latin-1"), "no UTF-8 .byte 0xfc"),
        ("a.txt", "naïve".encode("utf-16"), "no UTF-8 .byte 0xff"),
        ("a.csv", b"text\n\xfc", "no UTF-8 .byte 0xfc"),
        ("a.csv", "n,text\n1,x\n\n2,y,z\n", "line 4 has 3 fields, the first line 2"),
        ("a.csv", 'n,text\n1,"x', "line 2 is no row"),
        ("a.csv", "", "no column 'text'"),
        ("a.csv", "text,n,text\nx,1,y\n", "2 columns 'text'"),
        ("a.txt.gz", b"plain", "no whole gzip file"),
        ("a.jsonl.gz", gzip.compress(rows_of(["x"] * 999).encode())[:-20], "no whole gzip file"),
        ("a.parquet", b"version https://git-lfs", "no whole parquet file"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, name: Any, content: Any, message: Any):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_texts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [(["x"] * 300 + [None], "row 301.*null"), ([b"x"], "row 1.*bytes"), ([[{"role": "user"}]], "row 1.*a list")],
)
def test_rows_of_parquet_that_are_no_texts_are_refused(tmp_path: Path, values: Any, message: Any):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "a.parquet")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path):
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns 'text'"):
        read_texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("owner/name:config:test", ("owner/name", "config", "test")), ("name", ("name", None, "train"))],
)
def test_hub_data_sets_are_read_through_datasets(name: Any, wanted: Any, most: Any, monkeypatch: pytest.MonkeyPatch):
    datasets, asked = pytest.importorskip("datasets"), []
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]})

    def load(name: Any, config: Any, *, split: Any, revision: Any, streaming: Any):
        asked.append((name, config, split, revision, streaming))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_texts(name, revision="v1", most=most) == ["a", "b", "c"][:most]
    assert asked == [(*wanted, "v1", most is not None)]
    with pytest.raises(ValueError, match="no column 'body'"):
        read_texts(name, column="body")
    with pytest.raises(ValueError, match="row 0, column 'n': a number is no text"):
        read_texts(name, column="n")


@pytest.mark.parametrize(
    "error", [ValueError("Unknown split\n'dev'"), FileNotFoundError("nowhere"), OSError("offline")]
)
def test_a_data_set_that_does_not_open_is_named_in_one_line(error: Any, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")

    def load(*_, **__: Any):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"'mytexts' is no file or folder here, and no data set that opens .*[^\n]$"):
        read_texts("mytexts")


def test_without_the_data_sets_package_a_name_is_said_to_be_no_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"no file or folder 'mytexts'.*pip install 'prunus\[datasets\]'"):
        read_texts("mytexts")


def test_a_folder_is_read_by_split(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("test.txt", "data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt", "trainer.txt"):
        (tmp_path / name).write_text(name)
    assert read_texts(tmp_path, split="train") == ["data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt"]
    with pytest.raises(FileNotFoundError, match="no file of split 'validation'"):
        read_texts(tmp_path, split="validation")
    with pytest.raises(ValueError, match=r"has splits .train-00000.*say which"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="is one file"):
        read_texts(tmp_path / "test.txt", split="test")


def test_folders_of_splits_are_splits(tmp_path: Path):
    for name in ("train/a.txt", "train/b/c.txt", "test/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_texts(tmp_path, split="train") == ["train/a.txt", "train/b/c.txt"]
    with pytest.raises(ValueError, match=r"has splits .test.*say which"):
        read_texts(tmp_path)
    assert read_texts(tmp_path / "train") == ["train/a.txt", "train/b/c.txt"]


def test_a_folder_without_splits_is_all_its_texts_in_order(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "test").mkdir()  # of a project, perhaps: there is no train
    for name in ("a.txt", "b/one.txt", "c.txt", ".git/x.txt", "picture.png", "test/d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "two.jsonl").write_text(rows_of(["in rows"]))
    assert read_texts(tmp_path) == ["a.txt", "b/one.txt", "in rows", "c.txt", "test/d.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no text"):
        read_texts(tmp_path / "empty")


@pytest.mark.parametrize("name", ["texts/missing.parquet", "missing.txt", "/no/such/place/x.jsonl.gz"])
def test_a_missing_file_is_named(name: Any):
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        read_texts(name)


def test_an_unknown_ending_is_refused(tmp_path: Path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a\.docx ends in none of \.txt"):
        read_texts(tmp_path / "a.docx")


def test_an_unknown_embedded_split_is_refused():
    with pytest.raises(ValueError, match="'dev' is none of them"):
        read_texts("embedded", split="dev")
