"""The report of a run: rows per matrix, totals, wanda.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wanda.memory import peak_memory

if TYPE_CHECKING:
    from wanda.plan import Plan

FORMAT = 1


@dataclass
class Report:
    """What a pruning run did; wanda.json is its dictionary.

    layers: a row per pruned matrix (name, block, shape, pattern, removed, sparsity, relative_error, error, tokens,
    seconds, notes). left_dense: parameters of the blocks that were not pruned, with the reason.
    identity: digests of what went in and of the files that came out, by which the result is known again.
    """

    model: str
    recipe: dict[str, Any]
    layers: list[dict[str, Any]]
    left_dense: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    model_weights: int = 0
    command: str | None = None
    out: str | None = None
    loaded_by: str = "AutoModelForCausalLM.from_pretrained"
    identity: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @classmethod
    def of(
        cls, plan: Plan, rows: list[dict[str, Any]], notes: list[str], seconds: float, command: str | None
    ) -> Report:
        """The report of a finished run of a plan."""
        recipe = plan.recipe
        calibration: dict[str, Any] = {"used": plan.calibrated}
        if plan.calibrated:
            length = {"seqlen": plan.seqlen} if plan.image is None else {"image": list(plan.image)}
            calibration |= {"source": recipe.calibration, "samples": recipe.samples} | length
            calibration |= {"seed": recipe.seed, "dtype": str(plan.skeleton.dtype).removeprefix("torch.")}
        return cls(
            model=plan.model,
            recipe=recipe.as_dict(),
            layers=rows,
            left_dense=plan.dense,
            calibration=calibration,
            notes=[*plan.notes, *notes],
            seconds=round(seconds, 2),
            peak_memory_bytes=peak_memory(),
            model_weights=sum(_numel(entry.shape) for entry in plan.checkpoint.entries.values()),
            command=command,
            out=str(plan.out),
            loaded_by=plan.loaded_by(),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report of an earlier run, from its wanda.json."""
        same = ("model", "out", "recipe", "calibration", "command", "versions", "notes", "left_dense", "layers")
        totals = ("seconds", "peak_memory_bytes", "model_weights")
        return cls(
            **{name: values[name] for name in same},
            **{name: values["totals"][name] for name in totals},
            identity=values.get("identity", {}),
        )

    @property
    def weights(self) -> int:
        """Prunable weights: those of the matrices that were pruned."""
        return sum(row["shape"][0] * row["shape"][1] for row in self.layers)

    @property
    def removed(self) -> int:
        """Weights that were removed."""
        return sum(row["removed"] for row in self.layers)

    @property
    def sparsity(self) -> float:
        """Removed weights over prunable weights."""
        return self.removed / max(1, self.weights)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "out": self.out,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "command": self.command,
            "versions": self.versions,
            "totals": {
                "prunable_weights": self.weights,
                "removed_weights": self.removed,
                "sparsity": self.sparsity,
                "model_weights": self.model_weights,
                "model_zeros_share": self.removed / self.model_weights if self.model_weights else None,
                "seconds": self.seconds,
                "peak_memory_bytes": self.peak_memory_bytes,
            },
            "notes": self.notes,
            "left_dense": self.left_dense,
            "identity": self.identity,
            "layers": self.layers,
        }

    def json(self) -> str:
        """The text of wanda.json."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def all_notes(self) -> list[str]:
        """Notes of the run and of its layers, the latter with the layer's name."""
        return self.notes + [f"{row['name']}: {note}" for row in self.layers for note in row["notes"]]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("wanda-prune", "torch", "transformers", "safetensors"):
        found[name] = importlib.metadata.version(name)
    return found


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
