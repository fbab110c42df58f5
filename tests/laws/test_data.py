"""Laws of reading, cutting and serving text."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from prunus.data.texts import PackedTokens, calibration, read_texts, tokenize, tokenize_documents, windows


class Bytes:
    """A tokenizer of bytes that puts a start token before every text, as many real ones do."""

    eos_token_id = 256

    def __call__(self, texts: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        if isinstance(texts, str):
            return {"input_ids": [257] * add_special_tokens + list(texts.encode())}
        return {"input_ids": [self(text, add_special_tokens=add_special_tokens)["input_ids"] for text in texts]}


def test_windows_do_not_overlap_and_drop_the_rest():
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="3 tokens hold no window of 4"):
        windows(torch.arange(3), 4)
    with pytest.raises(ValueError, match=r"shape \(2, 4\)"):
        windows(torch.zeros(2, 4), 4)


def test_joined_texts_get_special_tokens_once():
    stream = tokenize(["ab", "c"], Bytes())
    assert stream.dtype == torch.int64
    assert stream.tolist() == [257, *b"ab\n\nc"]
    with pytest.raises(ValueError, match="no character"):
        tokenize([""], Bytes(), separator="")


def test_documents_end_with_the_end_token():
    assert tokenize_documents(["ab", "c"], Bytes()).tolist() == [*b"ab", 256, *b"c", 256]


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 5), (8, 8), (7, 1)])
def test_each_epoch_serves_each_window_once(count, batch):
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
def test_calibration_windows_do_not_overlap_where_the_stream_is_long_enough(length):
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


def test_every_form_of_file_holds_the_same_texts(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["first\u2028line\nsecond", "übrig"]
    rows = "".join(json.dumps({"text": text, "n": n}, ensure_ascii=False) + "\n" for n, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert read_texts(tmp_path / name) == texts, name
        assert read_texts(tmp_path / name, most=1) == texts[:1], name
        with pytest.raises(ValueError, match="no column 'body'"):
            read_texts(str(tmp_path / name), column="body")
    (tmp_path / "b.txt").write_text(texts[0], encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(texts[0].encode()))
    assert read_texts(tmp_path / "b.txt") == read_texts(tmp_path / "b.txt.gz") == texts[:1]


@pytest.mark.parametrize("most", [None, 2])
def test_hub_data_sets_are_read_through_datasets(most, monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_texts("owner/name:config:test", most=most) == ["a", "b", "c"][:most]
    assert asked == [("owner/name", "config", "test", most is not None)]
    with pytest.raises(ValueError, match="no column 'body'"):
        read_texts("owner/name", column="body")


def test_a_folder_is_read_by_split(tmp_path):
    for name in ("test.txt", "train-00000-of-00002.txt", "train-00001-of-00002.txt", "trainer.txt"):
        (tmp_path / name).write_text(name)
    assert read_texts(tmp_path, split="train") == ["train-00000-of-00002.txt", "train-00001-of-00002.txt"]
    with pytest.raises(FileNotFoundError, match="no file of split 'validation'"):
        read_texts(tmp_path, split="validation")
    with pytest.raises(ValueError, match="say which split"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="is one file"):
        read_texts(tmp_path / "test.txt", split="test")


@pytest.mark.parametrize("name", ["texts/missing.parquet", "missing.txt", "/no/such/place/x.jsonl.gz"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        read_texts(name)


def test_an_unknown_ending_is_refused(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a\.docx ends in none of \.txt"):
        read_texts(tmp_path / "a.docx")


def test_an_unknown_embedded_split_is_refused():
    with pytest.raises(ValueError, match="'dev' is none of them"):
        read_texts("embedded", split="dev")
