"""Training text: every token once, and a held-out part that is never trained on."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from wanda import sources
from wanda.calibration import encode
from wanda.errors import ConfigurationError


def sequences(
    source: str, tokenizer: Any, *, steps: int, batch: int, held_out: int, seqlen: int, seed: int
) -> tuple[Tensor, Tensor, list[str]]:
    """Training and held-out sequences of SOURCE: int64 [<= steps * batch, seqlen] and [<= held_out, seqlen], notes.

    Documents are put in random order, tokenised, joined and cut; unlike calibration's random crops no token comes
    twice, and the held-out part (the end, at most a tenth) shares none with the training part. Reads no more documents
    than it takes. Raises ConfigurationError for a text shorter than two sequences: one to train on, one to measure.
    """
    wanted = steps * batch
    text = sources.read(source, "calibration")
    documents = list(text.documents)
    if text.whole:
        documents = [text.joined()]
    random.Random(seed).shuffle(documents)
    ids: list[int] = []
    for document in documents:
        if len(ids) >= (wanted + held_out) * seqlen:
            break
        ids += encode(tokenizer, document + text.separator)
    count = min(len(ids) // seqlen, wanted + held_out)
    if count < 2:
        raise ConfigurationError(
            f"the training text {source} is too short: it has {len(ids)} tokens, and two sequences of {seqlen} are "
            "needed, one to train on and one to measure; give more text, or a smaller --seqlen"
        )
    rows = torch.tensor(ids[: count * seqlen], dtype=torch.int64).reshape(count, seqlen)
    held = min(held_out, max(1, count // 10))
    notes = []
    if held < held_out:
        notes.append(f"{held} instead of {held_out} sequences are held out, a tenth of the text")
    short = count - held < wanted
    if short:
        passes = steps / math.ceil((count - held) / batch)
        notes.append(f"the text has {count - held} training sequences, seen {passes:.1f} times")
    if short and (count - held) % batch:
        notes.append(f"the last step of each pass over them takes {(count - held) % batch} instead of {batch}")
    return rows[:-held], rows[-held:], notes
