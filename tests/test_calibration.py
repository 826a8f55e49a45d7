"""Text becomes calibration sequences as published, and everything that is no text is refused with its cure."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import tiny_tokenizer
from wanda.calibration import check_source, evaluation_text, token_ids
from wanda.errors import ConfigurationError

TOKENIZER = tiny_tokenizer()


def tokens(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def documents(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices("abcdefghij", k=draw.randint(2, 60))) for _ in range(count)]


def write_jsonl(file: Path, records: list[dict[str, object]]) -> str:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return str(file)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), samples=st.integers(1, 20), seqlen=st.integers(1, 60))
def test_documents_are_sampled_as_the_published_code_does(
    tmp_path_factory: pytest.TempPathFactory, seed: int, samples: int, seqlen: int
) -> None:
    texts = documents(20)
    source = write_jsonl(tmp_path_factory.mktemp("x") / "c.jsonl", [{"text": text} for text in texts])
    draw = random.Random(seed)
    expected = []
    for _ in range(samples):
        while True:  # get_c4 of github.com/locuslab/wanda, in words: draw until longer than seqlen, crop at random
            ids = tokens(texts[draw.randint(0, len(texts) - 1)])
            if len(ids) > seqlen:
                break
        start = draw.randint(0, len(ids) - seqlen - 1)
        expected.append(ids[start : start + seqlen])
    notes: list[str] = []
    got = token_ids(source, TOKENIZER, samples=samples, seqlen=seqlen, seed=seed, notes=notes)
    assert got.dtype == torch.int64 and got.tolist() == expected and notes == []


def test_text_file_is_one_document_cropped_at_random(tmp_path: Path) -> None:
    text = "\n".join(documents(50))
    (tmp_path / "text.txt").write_text(text)
    whole = tokens(text)
    got = token_ids(str(tmp_path / "text.txt"), TOKENIZER, samples=9, seqlen=32, seed=5)
    draw = random.Random(5)
    starts = [draw.randint(0, len(whole) - 33) for _ in range(9)]
    assert got.tolist() == [whole[start : start + 32] for start in starts]
    assert not torch.equal(got, token_ids(str(tmp_path / "text.txt"), TOKENIZER, samples=9, seqlen=32, seed=6))


def test_short_documents_are_joined_and_that_is_said(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in ["ab cd", "ef gh", "ij kl"] * 40])
    notes: list[str] = []
    got = token_ids(source, TOKENIZER, samples=2, seqlen=50, seed=0, notes=notes)
    assert got.shape == (2, 50) and "joined documents" in notes[0]
    text = TOKENIZER.decode(got[0])
    assert " ef gh " in text and " ab cd " in text  # documents keep a blank between them
    assert set(text.split()[1:-1]) <= {"ab", "cd", "ef", "gh", "ij", "kl"}

    notes = []
    token_ids(source, TOKENIZER, samples=100, seqlen=50, seed=0, notes=notes)
    assert any("overlap" in note for note in notes)


def test_a_text_of_exactly_one_sequence_is_enough_and_one_token_less_is_not(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the lazy dog sleeps")
    source, whole = str(tmp_path / "t.txt"), tokens("the lazy dog sleeps")
    assert token_ids(source, TOKENIZER, samples=2, seqlen=len(whole)).tolist() == [whole, whole]
    with pytest.raises(ConfigurationError, match=rf"too short: {len(whole)} tokens.*more text or a smaller --seqlen"):
        token_ids(source, TOKENIZER, samples=2, seqlen=len(whole) + 1)


def test_fields_of_jsonl_gzip_and_parquet_are_put_together(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"a": text[:5], "b": text[5:], "text": "no"} for text in documents(9)]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "c.parquet")
    sources = [
        write_jsonl(tmp_path / "c.jsonl", records) + ":a+b",
        write_jsonl(tmp_path / "c.jsonl.gz", records) + ":a+b",
        f"{tmp_path / 'c.parquet'}:a+b",
    ]
    for source in sources:
        assert check_source(source) == []
        assert evaluation_text(source).joined() == " ".join(documents(9))
        assert check_source(source.removesuffix(":a+b")) == []


def test_builtin_text_has_two_disjoint_parts() -> None:
    from wanda.sources import read

    parts = [read("builtin", role) for role in ("calibration", "evaluation")]
    paragraphs = [{" ".join(p.split()) for p in part.joined().split("\n\n")} for part in parts]
    assert not paragraphs[0] & paragraphs[1]
    assert min(len(part.joined()) for part in parts) > 100_000
    assert token_ids("builtin", TOKENIZER, samples=3, seqlen=64).shape == (3, 64)


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("empty.txt", b"", "", "is empty; give"),
        ("blank.txt", b" \n\n", "", "only blank text"),
        ("binary.txt", b"abc\x00\x01def", "", "is binary; give a UTF-8 text"),
        ("latin.txt", "na\u00efve".encode("latin-1") * 9, "", r"no UTF-8 text \(byte 2\)"),
        ("late.txt", b"a" * 100_000 + b"\xff", "", r"no UTF-8 text \(byte 100000\)"),
        ("text.txt", b"some text", ":text", "fields can be chosen in .jsonl.*leave the field away"),
        ("c.jsonl", b'{"body": "x", "id": "y"}\n', "", r"line 1, has no field 'text'; it has body, id.*FILE:FIELD"),
        ("c.jsonl", b'{"body": "x"}\n', ":body+title", "no field 'title'; it has body"),
        ("c.jsonl", b'{"text": ["x"]}\n', "", "'text' holds no text but list"),
        ("c.jsonl", b'{"text": "x"}\n{"text"', "", r"line 2, is no JSON"),
        ("c.jsonl", b"[1]\n", "", "is no JSON object"),
        ("c.jsonl", b"\n\n", "", "no records"),
        ("c.jsonl.gz", b"no gzip", "", "no whole gzip file.*again"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "", "no whole gzip file.*again"),
        ("c.parquet", b"no parquet", "", "no whole parquet file.*again"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes, field: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        token_ids(str(tmp_path / name) + field, TOKENIZER, samples=1, seqlen=4)


def test_parquet_without_rows_text_or_field(tmp_path: Path) -> None:
    file = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert "no records" in check_source(str(file))[0]
    pq.write_table(pa.table({"text": [1], "body": ["x"]}), file)
    assert "'text' holds no text but int64" in check_source(str(file))[0]
    assert "no field 'title'; it has text, body" in check_source(f"{file}:title")[0]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "x"}')
    assert "did you mean train.jsonl" in check_source(str(tmp_path / "trian.jsonl"))[0]
    assert "is a directory" in check_source(str(tmp_path))[0]
    assert "unknown text 'wikitext': did you mean wikitext2?" in check_source("wikitext")[0]
    assert [check_source(name) for name in ("c4", "wikitext2", "ptb", "builtin")] == [[]] * 4


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_hub_sets_out_of_reach_are_explained(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConfigurationError, match=f"text {name} cannot be had from https://huggingface.co/.*network.*"):
        token_ids(name, TOKENIZER)


def test_hub_sets_are_read_as_the_field_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["first row", "", "second row"] * 1000
    asked = []

    def load_dataset(repository: str, **options: object) -> dict[str, list[str]]:
        asked.append((repository, options))
        return {"text": rows, "sentence": rows}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    wikitext, c4, ptb = (evaluation_text(name) for name in ("wikitext2", "c4", "ptb"))
    assert wikitext.joined() == "\n\n".join(rows) and wikitext.windows is None
    assert c4.joined() == " ".join(rows[:1100]) and c4.windows == 256
    assert ptb.joined() == " ".join(rows)
    assert [repository for repository, _ in asked] == [
        "Salesforce/wikitext",
        "allenai/c4",
        "ptb-text-only/ptb_text_only",
    ]
    ids = tokens(" ".join(rows))
    got = token_ids("wikitext2", TOKENIZER, samples=1, seqlen=64, seed=3).tolist()[0]
    start = random.Random(3).randint(0, len(ids) - 65)
    assert got == ids[start : start + 64]
    assert [options["split"] for _, options in asked] == ["test", "train", "test", "train"]
