"""A model larger than memory, measured with one block in memory at a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda.activations import Activations
from wanda.blocks import record, replay
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.skeleton import Skeleton
from wanda.checkpoint.source import load_config, stored_dtype
from wanda.device import compute_dtype, pick_device
from wanda.report.progress import Progress


class Streamed(nn.Module):
    """The logits of a checkpoint for the parts of one text, in their order, as a causal language model gives them.

    All parts pass through one block after another, each read, used and dropped; what stays in memory are embeddings,
    head and the hidden states of the text. Equivalent to the model in memory, bit for bit.
    seconds: what the blocks took, with reading them; norm and head run later, in `forward`.
    """

    def __init__(
        self,
        folder: Path,
        parts: list[Tensor],
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        progress: bool = True,
    ):
        super().__init__()
        place = pick_device(device)
        kind = compute_dtype(place, dtype, stored_dtype(load_config(folder, trust_remote_code)))
        self.skeleton = Skeleton(Checkpoint.open(folder), kind, place, trust_remote_code)
        self.inner = self.skeleton.model
        self.config = self.inner.config
        self._next = 0
        start = time.perf_counter()
        self._hidden = self._run(
            [part.to(place) for part in parts], Progress(len(self.skeleton.blocks), progress, "blocks")
        )
        self.seconds = time.perf_counter() - start

    @torch.no_grad()
    def _run(self, parts: list[Tensor], progress: Progress) -> Activations:
        skeleton = self.skeleton
        skeleton.load_outside(head=True)
        recording = record(self.inner, skeleton.blocks, parts)
        hidden = recording.hidden
        with progress:
            for index, block in enumerate(skeleton.blocks.modules):
                skeleton.load_block(index)
                for place, calls in enumerate(recording.calls):
                    hidden[place] = calls[index].run(block, hidden[place].to(skeleton.device))
                skeleton.drop_block(index)
                progress.block(index)
        return hidden

    @torch.no_grad()
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """The output for the next part of the text; the model's own norm and head run on the streamed hidden states."""
        hidden = self._hidden[self._next].to(self.skeleton.device)
        self._next += 1
        return replay(self.inner, self.skeleton.blocks, input_ids, hidden)
