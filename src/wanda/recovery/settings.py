"""Every option of a tuning run, frozen; what can be checked without the model is checked here, all at once."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from cyclopts import Parameter

_ADAPTER = ("sparse_aware", "rank", "alpha", "dropout", "target")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a tuning run does."""

    lora: bool = False
    """Train a low-rank adapter (Hu et al., arXiv:2106.09685); the model itself stays as it is."""
    full: bool = False
    """Train every weight that survived; the removed ones stay zero."""
    sparse_aware: bool = False
    """With --lora: train the adapter through the masks, so that merging it under the masks loses nothing."""
    calibration: str = "c4"
    """Training text: c4, wikitext2, ptb, builtin, or a file (FILE, FILE.jsonl:field, FILE.parquet:field+field)."""
    steps: int = 200
    """Optimizer steps."""
    minutes: float | None = None
    """Stop training after so much time, whatever the number of steps."""
    seqlen: int | None = None
    """Tokens of a training sequence; min(1024, the model's context) when nothing is said."""
    batch: int = 8
    """Sequences in one optimizer step, over all devices."""
    micro_batch: int = 1
    """Sequences that a device holds at a time."""
    learning_rate: float | None = None
    """Highest learning rate; 2e-4 for --lora, 5e-5 for --full when nothing is said."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; then it falls as a cosine."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    rank: int = 8
    """Rank of the adapter."""
    alpha: float = 16
    """The adapter counts alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapter's input."""
    target: Literal["qv", "all"] = "qv"
    """Matrices that get an adapter: the query and value projections, or every linear layer of the blocks."""
    held_out: int = 16
    """Sequences of the text that are not trained on, but measured; at most a tenth of the text."""
    evaluations: int = 10
    """How often, at most, the held-out part is measured and a checkpoint is kept; the last step is."""
    patience: int = 3
    """Stop when so many measurements in a row were no better than the best; the best is what is written."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    seed: int = 0
    """Seed of the order of the text, of dropout and of the adapter's start."""
    device: str = "auto"
    """Where to train: auto (the GPUs when there are any) or cpu."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model."""

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate if self.learning_rate is not None else 2e-4 if self.lora else 5e-5

    def faults(self) -> list[str]:
        """Everything wrong with these settings that can be told without the model, one sentence each."""
        from wanda.calibration import check_source

        faults = []
        if self.lora == self.full:
            faults.append("choose one of --lora (an adapter beside the model) and --full (the model's own weights)")
        of_adapter = [
            f"--{field.name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for field in dataclasses.fields(self)
            if field.name in _ADAPTER and (value := getattr(self, field.name)) != field.default
        ]
        if self.full and not self.lora and of_adapter:
            given = " and ".join(of_adapter)
            faults.append(f"{given} would change nothing with --full: there is no adapter, and the masks always hold")
        for name, least in (
            ("steps", 1),
            ("seqlen", 2),
            ("batch", 1),
            ("micro_batch", 1),
            ("rank", 1),
            ("held_out", 1),
            ("evaluations", 1),
            ("patience", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"--{name.replace('_', '-')} {value} must be at least {least}")
        for name in ("minutes", "learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                faults.append(f"--{name.replace('_', '-')} {value} must be above 0")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"--{name} {getattr(self, name)} must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            faults.append(f"--seed {self.seed} must be in [0, 2^32)")
        if self.weight_decay < 0:
            faults.append(f"--weight-decay {self.weight_decay} must not be negative")
        if self.batch >= 1 and self.micro_batch >= 1 and self.batch % self.micro_batch:
            faults.append(f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch}")
        if self.device not in ("auto", "cpu"):
            faults.append(
                f"--device {self.device}: training runs on all GPUs that it sees (auto) or on the cpu; "
                "choose GPUs with CUDA_VISIBLE_DEVICES or `accelerate launch`"
            )
        return faults + check_source(self.calibration)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))
