"""Training text: disjoint parts, every token once, and plain words when there is too little."""

from __future__ import annotations

import json

import pytest

from models import tiny_tokenizer
from wanda.errors import ConfigurationError
from wanda.recovery.text import sequences


def test_parts_are_disjoint_pieces_of_the_text_in_order(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(" ".join(str(number) for number in range(3000)), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    train, held, notes = sequences(str(file), tokenizer, steps=8, batch=5, held_out=3, seqlen=16, seed=0)
    assert (train.shape, held.shape, notes) == ((40, 16), (3, 16), [])
    ids = tokenizer(file.read_text())["input_ids"]
    assert train.flatten().tolist() + held.flatten().tolist() == ids[: 43 * 16]


def test_documents_come_in_the_seeds_order_each_once(tmp_path):
    file = tmp_path / "documents.jsonl"
    texts = [f"document {chr(97 + number)} " * 9 for number in range(20)]
    file.write_text("".join(json.dumps({"a": t[:10], "b": t[10:]}) + "\n" for t in texts), encoding="utf-8")
    tokenizer = tiny_tokenizer()

    def all_text(seed):
        train, held, notes = sequences(f"{file}:a+b", tokenizer, steps=10**6, batch=1, held_out=4, seqlen=8, seed=seed)
        assert len(held) == 4 and "times" in notes[0]
        return tokenizer.decode(train.flatten().tolist() + held.flatten().tolist())

    assert all_text(1) == all_text(1) != all_text(2)
    assert all(all_text(1).count(text.strip()) <= 1 for text in texts)


def test_too_short_and_rather_short_texts(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("the quick brown fox " * 4, encoding="utf-8")
    count = len(tiny_tokenizer()(file.read_text())["input_ids"])
    with pytest.raises(
        ConfigurationError, match=rf"too short: it has {count} tokens, and two sequences of {count} are"
    ):
        sequences(str(file), tiny_tokenizer(), steps=1, batch=2, held_out=1, seqlen=count, seed=0)
    train, held, notes = sequences(str(file), tiny_tokenizer(), steps=1, batch=2, held_out=9, seqlen=count // 2, seed=0)
    assert (len(train), len(held)) == (1, 1)
    assert "1 instead of 9" in notes[0] and "seen 1.0 times" in notes[1] and "takes 1 instead of 2" in notes[2]
