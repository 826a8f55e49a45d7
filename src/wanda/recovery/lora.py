"""LoRA: low-rank adaptation (Hu et al., arXiv:2106.09685) through peft, plain or trained through the masks.

Merged into a pruned matrix, a plain adapter B A fills its zeros; put under the mask afterwards, the product loses the
part that it relied on. Sparse-aware training puts the mask into the forward pass, y = x (W + M * (B A) s)^T, so that
the merged and masked weight is what was trained. The adapter itself is an ordinary one.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wanda.checkpoint.tensors import read_header
from wanda.errors import ConfigurationError, MissingExtraError, RunError
from wanda.recovery.masks import Masks
from wanda.recovery.settings import Settings

ADAPTER = "default"  # peft's name for the only adapter of a model
QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value", "query_key_value", "qkv_proj", "Wqkv", "c_attn", "qkv")


def require_peft() -> None:
    """Raise MissingExtraError unless peft is installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("tuning with LoRA", "peft", "tune") from error


def add_adapter(model: Any, masks: Masks, settings: Settings) -> Any:
    """The model with a fresh adapter, everything else frozen: a peft model.

    With `sparse_aware` the adapter works through the masks. Raises ConfigurationError when no matrix is a target.
    """
    from peft import LoraConfig, get_peft_model

    targets = _targets(model, masks, settings.target)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft computes with fractions, too
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=any(matrix.transposed for matrix in masks.matrices),
        task_type="CAUSAL_LM",
    )
    with _peft_only():
        tuned = get_peft_model(model, config)
    if settings.sparse_aware:
        for name, layer in adapted_layers(tuned):
            mask = masks.parameters.get(f"{name}.weight")
            if mask is not None:
                layer.lora_variant[ADAPTER] = ThroughMask(mask)
    return tuned


def adapted_layers(tuned: Any) -> Iterator[tuple[str, Any]]:
    """The adapted linear layers of a peft model, with the name each has in the model itself.

    Raises ConfigurationError for an adapter that is not plain LoRA on linear layers: there is no mask for it.
    """
    from peft.tuners.lora import Linear, LoraLayer

    for name, layer in tuned.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            others = [
                type(variant).__name__
                for variant in layer.lora_variant.values()
                if not isinstance(variant, ThroughMask)
            ]
            if not isinstance(layer, Linear) or others or any(layer.lora_bias.values()):
                raise ConfigurationError(
                    f"{name} is adapted by {', '.join(others) or type(layer).__name__}, not by plain LoRA on a linear "
                    "layer; merge it with the tool that made it"
                )
            yield name, layer


class ThroughMask:
    """A peft LoRA variant whose update of the weight is masked in the forward pass.

    mask: bool in the shape of the layer's weight, True survives.
    """

    def __init__(self, mask: Tensor):
        self.mask = mask

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """result + dropout(x) (M * (B A) s)^T; x: [..., in], result: [..., out]."""
        self.mask = self.mask.to(x.device)
        update = module.get_delta_weight(active_adapter) * self.mask
        x = module.lora_dropout[active_adapter](x)
        return result + (x @ update if module.fan_in_fan_out else functional.linear(x, update))


@torch.no_grad()
def merged_weights(tuned: Any, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + M * (B A) s of every adapted layer in float32, by parameter name; where there is no mask, M is all ones."""
    merged = {}
    for name, layer in adapted_layers(tuned):
        update = layer.get_delta_weight(ADAPTER).float()
        mask = masks.get(f"{name}.weight")
        if mask is not None:
            update = update * mask.to(update.device)
        merged[f"{name}.weight"] = layer.get_base_layer().weight.float() + update
    return merged


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with a saved adapter. Raises ConfigurationError when there is none or it does not fit the model."""
    from peft import PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    for file in ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            raise ConfigurationError(f"{folder} has no {file}, so it is not an adapter; give the folder that has it")
    _refuse_other_kinds(folder)
    try:
        with _peft_only():
            return PeftModel.from_pretrained(model, str(folder), adapter_name=ADAPTER, use_safetensors=True).eval()
    except (ValueError, KeyError, RuntimeError, TypeError, UserWarning) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(
            f"the adapter {folder} does not fit the model ({reason}); give the one it was trained on"
        ) from error


def _refuse_other_kinds(folder: Path) -> None:
    """Raise ConfigurationError for an adapter of which merging B A would leave something out."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    file = folder / "adapter_config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error!r}); copy the adapter again") from error
    try:
        entries = read_header(folder / SAFETENSORS_WEIGHTS_NAME)[0]
    except RunError as error:
        raise ConfigurationError(str(error)) from error
    others = [name for name in entries if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if kind != "LORA" or others:
        what = f"kind {kind}" if kind != "LORA" else f"it has {others[0]}"
        raise ConfigurationError(
            f"the adapter {folder} is not plain LoRA on linear layers ({what}), and merging would lose "
            "something of it; merge it with the tool that made it"
        )


@contextlib.contextmanager
def _peft_only() -> Iterator[None]:
    """Keep a warning to peft's authors (an attribute of transformers that they still use) from its users.

    What peft only warns of though it leaves an adapter half loaded is an error here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _targets(model: nn.Module, masks: Masks, target: str) -> list[str]:
    """Full names of the layers to adapt: the pruned matrices that are whole modules, all or queries and values."""
    modules = dict(model.named_modules())
    candidates = [m.name for m in masks.matrices if m.expert is None and m.name in modules]
    chosen = [n for n in candidates if target == "all" or n.rpartition(".")[2] in QUERY_AND_VALUE]
    if not chosen:
        raise ConfigurationError(
            f"no pruned layer of {type(model).__name__} is called {' or '.join(QUERY_AND_VALUE)}; use --target all"
            if candidates
            else f"{type(model).__name__} has no pruned linear layer (fused experts take no adapter); use --full"
        )
    return chosen
