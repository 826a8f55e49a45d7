"""Where text comes from: named sets of the hub, text that ships with Python, local files.

SOURCE is c4, wikitext2, ptb, builtin, or FILE[:FIELD[+FIELD]] with FILE a .jsonl, .jsonl.gz or .parquet file (one
document a record; the fields are put together as they are; default `text`), anything else UTF-8 text as one document.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import json
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wanda.errors import ConfigurationError, near

Role = Literal["calibration", "evaluation"]
_PROBE = 1 << 16  # bytes of a text file that are looked at before anything heavy is loaded
_RECORDS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Text:
    """The documents of a source.

    documents: the texts.
    separator: what stands between documents when they are joined.
    whole: the documents are pieces of one text, to be joined before sampling; False samples them one by one.
    windows: how many windows the field measures perplexity on; None for all.
    label: what was read, for reports.
    """

    documents: Sequence[str]
    separator: str
    whole: bool
    label: str
    windows: int | None = None

    def joined(self) -> str:
        """All documents as one text."""
        return self.separator.join(self.documents)


def read(source: str, role: Role) -> Text:
    """The text of `source`: for calibration the part to sample from, for evaluation the part to measure on.

    Raises ConfigurationError, with the cure, for everything `faults` finds, for a file that turns out to be no text
    further on, and for a set that neither the hub nor its cache can give.
    """
    if source in NAMED:
        return NAMED[source](role)
    found = faults(source)
    if found:
        raise ConfigurationError(found)
    file, fields = _split(source)
    if _is_records(file):
        documents = [text for text in _records(file, fields or ("text",)) if text.strip()]
        text = Text(documents, " ", whole=False, label=source)
    else:
        text = Text([_plain(file)], "", whole=True, label=source)
    if not any(document.strip() for document in text.documents):
        raise ConfigurationError(f"{file} holds only blank text; give a file with text in it")
    return text


def faults(source: str) -> list[str]:
    """What is wrong with a source as far as can be told cheaply, one sentence each; a named set is not asked for."""
    if source in NAMED:
        return []
    file, fields = _split(source)
    if not file.exists():
        if file.parent != Path() or file.suffix or ":" in source:
            return [f"text file {file} does not exist{_similar(file)}; check the path"]
        return [f"unknown text {source!r}: {near(source, NAMED)} (or give the path of a file)"]
    if file.is_dir():
        return [f"{file} is a directory; give a text, .jsonl or .parquet file inside it"]
    try:
        if file.stat().st_size == 0:
            return [f"{file} is empty; give a file with text in it"]
        if file.suffix == ".parquet":
            _parquet(file, fields or ("text",))
        elif _is_records(file):
            next(_records(file, fields or ("text",)))
        elif fields:
            cure = "leave the field away or convert the file"
            return [f"{source}: fields can be chosen in {', '.join(_RECORDS)} files only; {cure}"]
        else:
            with open(file, "rb") as stream:
                _decode(str(file), stream.read(_PROBE), final=False)
    except ConfigurationError as error:
        return list(error.faults)
    except StopIteration:
        return [f"{file} holds no records; give a file with text in it"]
    except OSError as error:
        return [f"{file} cannot be read ({error.strerror or error}); check its permissions"]
    return []


def identity(source: str) -> str:
    """What tells the content of a source without faults from another's: a set's name, else a digest of its file."""
    if source in NAMED:
        return source
    file, fields = _split(source)
    with open(file, "rb") as stream:
        return "+".join([hashlib.file_digest(stream, "sha256").hexdigest(), *fields])


def name_of(source: str) -> str:
    """A source without the folder that its file is in."""
    return source if source in NAMED else source.removeprefix(str(Path(source).parent)).lstrip("/")


def file_of(source: str) -> Path:
    """The file of a source that is no named set."""
    return _split(source)[0]


def _split(source: str) -> tuple[Path, tuple[str, ...]]:
    """FILE:a+b -> file and fields; a file whose own name has a colon wins."""
    path = Path(source).expanduser()
    name, colon, fields = source.rpartition(":")
    if path.exists() or not colon or not name:
        return path, ()
    return Path(name).expanduser(), tuple(fields.split("+"))


def _is_records(file: Path) -> bool:
    return file.name.endswith(_RECORDS)


def _similar(file: Path) -> str:
    names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    close = difflib.get_close_matches(file.name, names, n=3)
    return f", did you mean {' or '.join(close)}?" if close else ""


def _decode(place: str, data: bytes, final: bool = True) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final)
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{place} is no UTF-8 text (byte {error.start}); give a UTF-8 text, .jsonl or .parquet file"
        ) from error
    if "\0" in text:
        raise ConfigurationError(f"{place} is binary; give a UTF-8 text, .jsonl or .parquet file")
    return text


def _plain(file: Path) -> str:
    try:
        return _decode(str(file), file.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read ({error.strerror}); check its permissions") from error


def _records(file: Path, fields: tuple[str, ...]) -> Iterator[str]:
    """The text of every record of a .jsonl(.gz) or .parquet file."""
    if file.suffix == ".parquet":
        for batch in _parquet(file, fields).iter_batches(columns=list(fields)):
            columns = [batch.column(field).to_pylist() for field in fields]
            for values in zip(*columns, strict=True):
                yield "".join(value or "" for value in values)
        return
    try:
        with open(file, "rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            for number, line in enumerate(lines, 1):
                place = f"{file}, line {number},"
                text = _decode(place, line)
                if text.strip():
                    yield _record(place, text, fields)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigurationError(f"{file} is no whole gzip file ({error}); copy or download it again") from error


def _record(place: str, line: str, fields: tuple[str, ...]) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{place} is no JSON ({error}); every line has to be one JSON object") from error
    if not isinstance(record, dict):
        raise ConfigurationError(f'{place} is no JSON object; every line has to be one, such as {{"text": ...}}')
    _have(place, fields, record)
    values = [record[field] for field in fields]
    for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str | None):
            raise ConfigurationError(
                f"{place}: field {field!r} holds no text but {type(value).__name__}; choose another"
            )
    return "".join(value or "" for value in values)


def _parquet(file: Path, fields: tuple[str, ...]) -> Any:
    """An opened parquet file that has the fields, as text; reads its footer only."""
    import pyarrow
    import pyarrow.parquet
    import pyarrow.types

    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ConfigurationError(f"{file} is no whole parquet file ({error}); copy or download it again") from error
    schema = opened.schema_arrow
    _have(str(file), fields, schema.names)
    for field in fields:
        kind = schema.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ConfigurationError(f"{file}: field {field!r} holds no text but {kind}; choose another")
    if opened.metadata.num_rows == 0:
        raise ConfigurationError(f"{file} holds no records; give a file with text in it")
    return opened


def _have(place: str, fields: tuple[str, ...], there: Any) -> None:
    missing = [field for field in fields if field not in there]
    if missing:
        raise ConfigurationError(
            f"{place} has no field {' and no '.join(map(repr, missing))}; it has {', '.join(there) or 'none'}: "
            "choose with FILE:FIELD or FILE:FIELD+FIELD"
        )


def _builtin(role: Role) -> Text:
    """The language reference that CPython carries, in two parts without a common paragraph, topics taken in turn."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for position, name in enumerate(sorted(topics)):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())  # some topics include others, indented differently
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            parts[position % 2].append("\n\n".join(paragraphs))
    chosen = parts[0] if role == "calibration" else parts[1]
    version = ".".join(platform.python_version_tuple()[:2])
    return Text(chosen, "\n\n", whole=True, label=f"builtin ({role} part, Python {version})")


def _c4(role: Role) -> Text:
    shard = "train.00000-of-01024" if role == "calibration" else "validation.00000-of-00008"
    documents = _hub("c4", "allenai/c4", "text", data_files={"train": f"en/c4-{shard}.json.gz"}, split="train")
    if role == "calibration":
        return Text(documents, " ", whole=False, label="allenai/c4, en, first shard of train")
    return Text(documents[:1100], " ", whole=True, label="allenai/c4, en, validation, 1100 documents", windows=256)


def _wikitext2(role: Role) -> Text:
    split, separator = ("train", " ") if role == "calibration" else ("test", "\n\n")
    documents = _hub("wikitext2", "Salesforce/wikitext", "text", name="wikitext-2-raw-v1", split=split)
    return Text(documents, separator, whole=True, label=f"Salesforce/wikitext, wikitext-2-raw-v1, {split}")


def _ptb(role: Role) -> Text:
    # The repository itself holds a loading script, which datasets no longer runs; the hub's conversion of it is data.
    split = "train" if role == "calibration" else "test"
    documents = _hub(
        "ptb",
        "ptb-text-only/ptb_text_only",
        "sentence",
        revision="refs/convert/parquet",
        data_files={split: f"penn_treebank/{split}/*.parquet"},
        split=split,
    )
    return Text(documents, " ", whole=True, label=f"ptb-text-only/ptb_text_only, penn_treebank, {split}")


NAMED: dict[str, Callable[[Role], Text]] = {"builtin": _builtin, "c4": _c4, "ptb": _ptb, "wikitext2": _wikitext2}


def _hub(source: str, repository: str, field: str, **options: Any) -> Sequence[str]:
    """One column of a hub set, through `datasets` and its cache; ConfigurationError when it cannot be had."""
    import datasets

    try:
        # no_checks: a single file of a set is not the set that its card counts
        rows: Any = datasets.load_dataset(repository, verification_mode="no_checks", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        page = f"https://huggingface.co/datasets/{repository}"
        if "gated" in reason:
            cure = f"accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
        else:
            cure = "check the network, fill the cache by loading it once elsewhere, or use builtin or a local file"
        raise ConfigurationError(f"text {source} cannot be had from {page} ({reason}): {cure}") from error
    return rows[field]
