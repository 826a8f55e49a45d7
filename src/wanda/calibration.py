"""Calibration: text -> token ids [samples, seqlen]."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda import sources
from wanda.errors import ConfigurationError
from wanda.images import PREFIX, is_images

_STREAK = 2000  # so many documents drawn one after the other, all too short: there are too few long ones to look for
_CHARACTERS_A_TOKEN = 16  # generous: no ordinary text has fewer tokens than characters / 16


def check_source(source: str) -> list[str]:
    """Faults of a SOURCE (see `wanda.sources`) that show without loading much: [] when there is none."""
    return sources.faults(source)


def local_files(source: str) -> list[Path]:
    """The file or folder that a source (`images:` too) is read from, where it is on this machine."""
    if is_images(source):
        path = Path(source.removeprefix(PREFIX)).expanduser()
    elif source in sources.NAMED:
        return []
    else:
        path = sources.file_of(source)
    return [path] if path.exists() else []


def token_ids(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    notes: list[str] | None = None,
) -> Tensor:
    """Calibration sequences of SOURCE (see `wanda.sources`): int64 [samples, seqlen].

    As published for Wanda (arXiv:2306.11695) and SparseGPT: from documents drawn at random that are longer than
    seqlen tokens a random crop each; texts that are one whole (a text file, WikiText, PTB) are tokenised once, then
    cropped at random. The same seed gives the same sequences. Where hardly any document is long enough, documents are
    joined in random order and cropped; that and overlapping crops are said in `notes` (sentences are appended).
    Raises ConfigurationError when the text cannot be read or has fewer than seqlen tokens.
    """
    if samples < 1 or seqlen < 1:
        raise ConfigurationError(f"samples {samples} and seqlen {seqlen} have to be at least 1")
    text = sources.read(source, "calibration")
    notes = [] if notes is None else notes
    draw = random.Random(seed)
    rows: list[list[int]] = []
    if not text.whole:
        rows = _crops_of_documents(text.documents, tokenizer, samples, seqlen, draw)
        if len(rows) < samples:
            notes.append(
                f"{source}: too few documents have more than {seqlen} tokens; "
                f"{'' if not rows else f'{samples - len(rows)} of '}{samples} sequences are crops of joined documents"
            )
    if len(rows) < samples:
        documents: Sequence[str] = text.documents
        if not text.whole:
            documents = _enough(documents, (samples - len(rows)) * seqlen * _CHARACTERS_A_TOKEN, draw)
        ids = encode(tokenizer, text.separator.join(documents))
        if len(ids) < seqlen:
            raise ConfigurationError(
                f"{source} is too short: {len(ids)} tokens in all, a sequence has {seqlen}; "
                f"give more text or a smaller --seqlen"
            )
        if len(ids) < (samples - len(rows)) * seqlen:
            notes.append(f"{source}: {len(ids)} tokens are fewer than {samples} x {seqlen}, so sequences overlap")
        while len(rows) < samples:
            start = draw.randint(0, max(0, len(ids) - seqlen - 1))
            rows.append(ids[start : start + seqlen])
    return torch.tensor(rows, dtype=torch.int64)


def evaluation_text(source: str) -> sources.Text:
    """The text that perplexity is measured on, to be joined with its separator: what the field uses of each set.

    wikitext2: the rows of the raw test set joined by blank lines; c4: the first 1100 validation documents joined by
    spaces, 256 windows; ptb: the test sentences joined by spaces; builtin: the part that calibration never sees;
    .jsonl and .parquet: all records joined by spaces; a text file as it is. Raises ConfigurationError.
    """
    return sources.read(source, "evaluation")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, with the special tokens that the tokenizer puts around a text."""
    return tokenizer(text, verbose=False)["input_ids"]  # verbose: texts longer than the context are meant to be cut


def _crops_of_documents(
    documents: Sequence[str], tokenizer: Any, samples: int, seqlen: int, draw: random.Random
) -> list[list[int]]:
    """Random crops of documents longer than seqlen, drawn as the published code does; fewer rows when few are."""
    rows: list[list[int]] = []
    short: set[int] = set()
    streak = 0
    while len(rows) < samples and streak < _STREAK and len(short) < len(documents):
        number = draw.randint(0, len(documents) - 1)
        if number in short:
            continue
        ids = encode(tokenizer, documents[number])
        if len(ids) > seqlen:
            start = draw.randint(0, len(ids) - seqlen - 1)
            rows.append(ids[start : start + seqlen])
            streak = 0
        else:
            short.add(number)
            streak += 1
    return rows


def _enough(documents: Sequence[str], characters: int, draw: random.Random) -> list[str]:
    """Documents in random order until they have so many characters, or all of them."""
    chosen: list[str] = []
    for number in draw.sample(range(len(documents)), len(documents)):
        chosen.append(documents[number])
        characters -= len(chosen[-1])
        if characters <= 0:
            break
    return chosen
