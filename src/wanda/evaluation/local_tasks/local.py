"""Local copies of the task sets, in the shape in which the harness's own tasks know them from the hub.

Each function is the `custom_dataset` of one task file here. `data` is the folder that holds the sets (its layout is in
docs/evaluation.md); the harness hands it over from the task manager's metadata. Only the shape of a record changes
here; prompts and scoring are those of the task files.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars

from wanda.errors import ConfigurationError

LETTERS = "ABCDEFGH"
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # damaged, or encrypted


def boolq(data: str, **_: Any) -> DatasetDict:
    """boolq/boolq_dev.jsonl: {query: "Passage: ...\\nQuestion: ...?", choices: [no, yes], gold}."""

    def shaped(record: dict[str, Any]) -> dict[str, Any]:
        passage, _, question = record["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
        return {"passage": passage, "question": question.removesuffix("?"), "label": record["gold"]}

    return _validation(_lines(data, "boolq/boolq_dev.jsonl", shaped))


def rte(data: str, **_: Any) -> DatasetDict:
    """rte/rte_dev.tsv: GLUE's columns sentence1, sentence2, label (0 entailment, 1 not), idx."""
    name = "rte/rte_dev.tsv"
    # Only "\n" ends a line: sentences hold other characters that str.splitlines takes for ends.
    header, *rows = (line.removesuffix("\r").split("\t") for line in _text(data, name).rstrip("\n").split("\n"))
    for column in ("sentence1", "sentence2", "label"):
        if column not in header:
            raise ConfigurationError(f"{Path(data) / name} has no column {column} in its first line; copy it again")

    def shaped(row: list[str]) -> dict[str, Any]:
        record = dict(zip(header, row, strict=True))
        return {**record, "label": _choice(record["label"], 2)}

    return _validation(_shaped(Path(data) / name, enumerate(rows, 2), shaped))


def hellaswag(data: str, **_: Any) -> DatasetDict:
    """hellaswag/hellaswag_val_1000.jsonl: records in HellaSwag's original format, any number of them."""

    def shaped(record: dict[str, Any]) -> dict[str, Any]:
        return {key: record[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")} | {
            "label": str(record["label"])
        }

    return _validation(_lines(data, "hellaswag/hellaswag_val_1000.jsonl", shaped))


def hellaswag_full(data: str, **_: Any) -> DatasetDict:
    """hellaswag/hellaswag_val_full.txt.bz2: six lines a record, already cleaned: context, gold, four endings.

    The cleaning left the last, unfinished sentence in lower case, which the harness starts with a capital.
    """
    name = "hellaswag/hellaswag_val_full.txt.bz2"
    lines = _text(data, name).rstrip("\n").split("\n")
    if len(lines) % 6:
        raise ConfigurationError(f"{Path(data) / name} has {len(lines)} lines, not six a record; copy it again")

    def shaped(six: list[str]) -> dict[str, Any]:
        return {"query": capitalised(six[0]), "label": _choice(six[1], 4), "choices": six[2:]}

    rows = ((i + 1, lines[i : i + 6]) for i in range(0, len(lines), 6))
    return _validation(_shaped(Path(data) / name, rows, shaped))


def capitalised(context: str) -> str:
    """The context with its last, unfinished sentence as str.capitalize would write it."""
    return re.sub(r"(?<=[.!?] )[a-z][^.!?]*$", lambda match: match[0].capitalize(), context)


def winogrande(data: str, **_: Any) -> DatasetDict:
    """winogrande/winogrande_dev.jsonl: WinoGrande's original format."""

    def shaped(record: dict[str, Any]) -> dict[str, Any]:
        return {key: record[key] for key in ("sentence", "option1", "option2", "answer")}

    return _validation(_lines(data, "winogrande/winogrande_dev.jsonl", shaped))


def arc(data: str, subset: str, **_: Any) -> DatasetDict:
    """arc-easy/arc_easy_test.jsonl, arc-challenge/arc_challenge_test.jsonl: {question, choices: 3 to 5 texts, gold}."""
    file = f"{subset}/{subset.replace('-', '_')}_test.jsonl"
    return _test(_lines(data, file, lambda record: {"question": record["question"]} | _lettered(record)))


def openbookqa(data: str, **_: Any) -> DatasetDict:
    """openbookqa/openbookqa_test.jsonl: {query, choices, gold}."""
    file = "openbookqa/openbookqa_test.jsonl"
    return _test(_lines(data, file, lambda record: {"question_stem": record["query"]} | _lettered(record)))


def mmlu(data: str, subject: str, **_: Any) -> DatasetDict:
    """mmlu/mmlu_dev_test.zip: dev/SUBJECT_dev.csv and test/SUBJECT_test.csv: question, choice0..3, answer (0 to 3)."""
    path = _existing(data, "mmlu/mmlu_dev_test.zip")

    def shaped(row: dict[str, str]) -> dict[str, Any]:
        choices = [row[f"choice{i}"] for i in range(4)]
        if None in (row["question"], *choices):
            raise ValueError("too few columns")
        return {
            "question": row["question"],
            "subject": subject,
            "choices": choices,
            "answer": _choice(row["answer"], 4),
        }

    splits = {}
    for split in ("dev", "test"):
        name = f"{split}/{subject}_{split}.csv"
        try:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(name).decode("utf-8") if name in archive.namelist() else None
        except _UNREADABLE as error:
            raise ConfigurationError(f"{path} cannot be read ({name}: {error}); copy it again") from error
        if text is None:
            raise ConfigurationError(f"{path} lacks {name}, which the task mmlu_{subject} reads; copy it again")
        table = csv.DictReader(io.StringIO(text, newline=""))
        rows = ((table.line_num, row) for row in table)
        splits[split] = Dataset.from_list(_shaped(path / name, rows, shaped))
    return DatasetDict(splits)


def clean_hellaswag(dataset: Dataset) -> Dataset:
    """The harness's own preparation of HellaSwag records, imported from it."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    disable_progress_bars()
    try:
        return process_docs(dataset)
    finally:
        enable_progress_bars()


def winogrande_answer(doc: dict[str, str]) -> int:
    """Index of the right option."""
    return {"1": 0, "2": 1}[doc["answer"]]


def winogrande_rest(doc: dict[str, str]) -> str:
    """What follows the gap: the scored continuation."""
    return doc["sentence"].partition("_")[2].strip()


def winogrande_beginnings(doc: dict[str, str]) -> list[str]:
    """The sentence up to the gap with either option filled in: the contexts."""
    before = doc["sentence"].partition("_")[0]
    return [before + doc["option1"], before + doc["option2"]]


def _lettered(record: dict[str, Any]) -> dict[str, Any]:
    letters = list(LETTERS[: len(record["choices"])])
    return {"choices": {"text": record["choices"], "label": letters}, "answerKey": letters[record["gold"]]}


def _existing(data: str, name: str) -> Path:
    path = Path(data).expanduser() / name
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}; put it there or name another folder with --data")
    return path


def _text(data: str, name: str) -> str:
    path = _existing(data, name)
    try:
        raw = path.read_bytes()
        return (bz2.decompress(raw) if path.suffix == ".bz2" else raw).decode("utf-8")
    except _UNREADABLE as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); copy it again") from error


def _lines(data: str, name: str, shaped: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    rows = ((number, line) for number, line in enumerate(_text(data, name).split("\n"), 1) if line.strip())
    return _shaped(Path(data) / name, rows, lambda line: shaped(json.loads(line)))


def _shaped(
    path: Path, rows: Iterable[tuple[int, Any]], shaped: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows (line, content) of a file as records; a row that has not the right shape is named."""
    records = []
    for number, row in rows:
        try:
            records.append(shaped(row))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{path}, line {number} is not as docs/evaluation.md describes it ({error!r}); mend it or copy it again"
            ) from error
    if not records:
        raise ConfigurationError(f"{path} holds no records; copy it again")
    return records


def _choice(text: str, count: int) -> int:
    """The index of a choice out of `count`."""
    if not 0 <= int(text) < count:
        raise ValueError(f"there is no choice {text} of {count}")
    return int(text)


def _validation(records: Iterable[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"validation": Dataset.from_list(list(records))})


def _test(records: Iterable[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(list(records))})
