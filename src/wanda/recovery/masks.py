"""Which weights of a pruned checkpoint were removed, and how to keep them so while the others are trained.

The masks are the zeros of the matrices that wanda.json lists, checked against what it says was removed. Without
wanda.json (a model pruned by another tool) every matrix of the blocks counts that is clearly sparse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda.blocks import find_blocks
from wanda.errors import ConfigurationError
from wanda.patterns import NM
from wanda.weights import Matrix, find_matrices

SPARSE = 0.05  # a matrix with a larger share of zeros counts as pruned when no recipe tells
DENSE_ZEROS = 0.01  # a dense matrix has hardly any zeros: so many more than were removed are another pruning's


@dataclass(frozen=True)
class Masks:
    """The masks of a pruned model.

    parameters: by name in the model, bool in the parameter's shape, True survives; those with pruned matrices only.
    matrices: the pruned matrices.
    notes: sentences for the report.
    """

    parameters: dict[str, Tensor]
    matrices: list[Matrix]
    notes: list[str] = field(default_factory=list)

    @property
    def zeros(self) -> int:
        """Weights that are zero and stay it."""
        return sum(mask.numel() - int(mask.sum()) for mask in self.parameters.values())

    @property
    def weights(self) -> int:
        """All weights of the pruned matrices."""
        return sum(matrix.numel for matrix in self.matrices)


def read_masks(model: nn.Module, folder: Path) -> Masks:
    """The masks of a pruned checkpoint whose weights `model` holds; folder: where its wanda.json may lie.

    Raises ConfigurationError when the zeros are not those that wanda.json lists, or nothing is pruned.
    """
    blocks = find_blocks(model)
    found = [
        matrix for index, block in enumerate(blocks.modules) for matrix in find_matrices(block, blocks.prefix(index))[0]
    ]
    parameters = dict(model.named_parameters())
    rows = recorded_layers(folder)
    notes: list[str] = []
    if rows is None:
        pruned = [m for m in found if _zeros(m.view(parameters[m.parameter])) > SPARSE * m.numel]
        notes.append(
            f"there is no wanda.json with the pruned layers: the {len(pruned)} of {len(found)} matrices of the blocks "
            f"with more than {SPARSE:.0%} zeros are taken as pruned, and their zeros are held"
        )
    else:
        by_name = {matrix.name: matrix for matrix in found}
        faults = [f"{name} is not a matrix of the model" for name in rows if name not in by_name]
        pruned = [by_name[name] for name in rows if name in by_name]
        faults += [
            fault
            for matrix in pruned
            if (fault := _mismatch(matrix.view(parameters[matrix.parameter]), rows[matrix.name]))
        ]
        if faults:
            more = f" (and {len(faults) - 3} more like it)" if len(faults) > 3 else ""
            raise ConfigurationError(
                f"the masks of {folder} do not match its recipe in wanda.json: {'; '.join(faults[:3])}{more}. "
                "Was an adapter merged into it without the masks, or was it pruned again by another tool? "
                "Prune the original again, or remove wanda.json to hold whatever is zero now"
            )
    if not pruned:
        raise ConfigurationError(f"{folder} is not pruned: none of its {len(found)} matrices is sparse; prune it first")
    masks: dict[str, Tensor] = {}
    for matrix in pruned:
        parameter = parameters[matrix.parameter]
        if matrix.parameter not in masks:  # experts share one
            masks[matrix.parameter] = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        matrix.view(masks[matrix.parameter]).copy_(matrix.view(parameter.detach()) != 0)
    return Masks(masks, pruned, notes)


def recorded_layers(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The rows of the pruned matrices in a folder's wanda.json, by name; None when there are none.

    Raises ConfigurationError for a wanda.json that cannot be read.
    """
    file = folder / "wanda.json"
    if not file.is_file():
        return None
    try:
        rows = json.loads(file.read_text(encoding="utf-8")).get("layers")
        return {row["name"]: row for row in rows} if rows else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error!r}); copy it again, or remove it") from error


def hold_zeros(
    parameters: Iterable[tuple[str, nn.Parameter]], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[Any]:
    """Keep masked weights at exactly zero in every step of any optimizer; returns the hooks' handles.

    Gradients are masked as soon as they are accumulated, so that neither gradient clipping nor momentum sees them;
    after the step weights and the optimizer's state are masked again, so that weight decay, rounding or a state from
    elsewhere cannot bring anything back. Works on FSDP2's sharded parameters (DTensor): masks are sharded alike.
    """
    held: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in parameters:
        mask = masks.get(name)
        if mask is not None and parameter.requires_grad:
            held.append((parameter, ~_placed_like(mask, parameter)))

    def mask_gradient(parameter: Tensor, removed: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(removed, 0)

    @torch.no_grad()
    def mask_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, removed in held:
            parameter.masked_fill_(removed, 0)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(removed, 0)

    handles: list[Any] = [
        parameter.register_post_accumulate_grad_hook(lambda p, removed=removed: mask_gradient(p, removed))
        for parameter, removed in held
    ]
    return [*handles, optimizer.register_step_post_hook(mask_step)]


def as_stored(weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weight` rounded to the stored type, with exactly the zeros of the mask.

    A survivor that the type would round to zero becomes the type's smallest normal number of its sign, so that the
    sparsity is unchanged to the weight.
    """
    stored = weight.to(dtype)
    if mask is None:
        return stored
    smallest = torch.full_like(stored, torch.finfo(dtype).smallest_normal)
    stored = torch.where((stored == 0) & mask, torch.copysign(smallest, stored), stored)
    return stored.masked_fill_(~mask, 0)


def _placed_like(mask: Tensor, parameter: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    mask = mask.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(mask, parameter.device_mesh, parameter.placements)
    return mask


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


def _mismatch(weight: Tensor, row: Mapping[str, Any]) -> str | None:
    """What is wrong with the zeros of a matrix [out, in] against its row in wanda.json, None when nothing is."""
    name, shape = row["name"], list(row.get("shape", weight.shape))
    if shape != list(weight.shape):
        return f"{name} is {list(weight.shape)}, recorded as {shape}"
    removed = row.get("removed", round(row["sparsity"] * weight.numel()))
    zeros = _zeros(weight)
    if not removed <= zeros <= removed + DENSE_ZEROS * weight.numel():
        return f"{name} has {zeros} zeros, recorded as {removed}"
    pattern = str(row.get("pattern", ""))
    if ":" in pattern:
        nm = NM.parse(pattern)
        if not nm.obeyed(weight):
            return f"{name} has a group of {nm.m} with more than {nm.n} survivors, recorded as {pattern}"
    return None
