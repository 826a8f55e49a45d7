"""2:4 layers on an NVIDIA GPU's sparse tensor cores, through torch.sparse.to_sparse_semi_structured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wanda.errors import ConfigurationError
from wanda.patterns import NM

_SPARSE = 0.3  # share of zeros above which a layer was meant to be sparse


def require_cuda() -> None:
    """Raise ConfigurationError unless there is an NVIDIA GPU with sparse tensor cores (compute capability 8.0)."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ConfigurationError(
            "the semi_structured backend needs an NVIDIA GPU and a CUDA build of torch, and this machine has none; "
            "leave backend away to run packed on the CPU"
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise ConfigurationError(
            f"the semi_structured backend needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        )


def sparse_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers to convert: those that are sparse, all of which must be 2:4.

    Raises ConfigurationError when there is none, or a sparse layer has another pattern, a shape or a type that the
    hardware does not take.
    """
    names, wrong = [], []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        weight = module.weight
        if float((weight == 0).float().mean()) < _SPARSE:
            continue
        if not NM(2, 4).obeyed(weight):
            wrong.append(name)
        elif weight.dtype not in (torch.float16, torch.bfloat16) or weight.shape[0] % 32 or weight.shape[1] % 64:
            raise ConfigurationError(
                f"{name} is {tuple(weight.shape)} of {weight.dtype}; sparse tensor cores take float16 or bfloat16 in "
                "multiples of 32 x 64"
            )
        else:
            names.append(name)
    if wrong:
        raise ConfigurationError(
            f"{len(wrong)} sparse layers are not 2:4 ({wrong[0]}, ...); prune with --pattern 2:4 for this backend"
        )
    if not names:
        raise ConfigurationError("the model has no 2:4 layers; prune it with --pattern 2:4 for this backend")
    return names


def convert(model: Any) -> Any:
    """Move the model to the GPU with its 2:4 layers in the semi-structured form; raises what `sparse_layers` raises."""
    from torch.sparse import to_sparse_semi_structured

    names = sparse_layers(model)
    model = model.to("cuda")
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return model.eval()
