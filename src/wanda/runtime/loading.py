"""Loading a packed checkpoint as an ordinary transformers model whose sparse layers stay packed in memory.

transformers itself does the loading, with all its renaming, tying and buffers. Each packed weight is handed to it as a
placeholder: one element expanded to the weight's shape, which takes no memory. Where that very element turns up in the
finished model is where the packed matrix belongs; no architecture is known here. What packing would slow down is loaded
dense (choice.py).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wanda.checkpoint.packed import PackedCheckpoint, is_packed, open_packed, stored_dtypes
from wanda.checkpoint.source import bars_on_terminals_only, load_config, load_model, resolve, weight_files
from wanda.checkpoint.tensors import read_header
from wanda.device import DTYPES, cpu_has_bfloat16
from wanda.errors import ConfigurationError, RunError, near
from wanda.kernels.native import LEVELS, level, native
from wanda.kernels.packed import PackedMatrix, tiled
from wanda.runtime.choice import kept_as_stored, without_gain
from wanda.runtime.layers import FastLinear, PackedLinear, PackedTable

BACKENDS = ("cpu", "semi_structured")
PREFERENCES = ("speed", "memory")


def load(
    path: str | os.PathLike[str],
    backend: Literal["cpu", "semi_structured"] = "cpu",
    prefer: Literal["speed", "memory"] = "speed",
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> Any:
    """A transformers model, in eval mode, of a packed checkpoint: generate, pipelines and evaluation work as ever.

    backend "cpu": sparse linear layers stay packed, mapped from the file, and run on our kernels.
    backend "semi_structured": the 2:4 layers of a packed or ordinary checkpoint, in the type they are stored in, run on
    a GPU's sparse tensor cores.
    prefer "speed": layers that are not predicted to decode faster packed (choice.py) are loaded dense, which is said on
    stderr; "memory": everything stays packed.
    trust_remote_code: run modelling code that lies in the folder.
    dtype: what the model computes in, the type that is stored or float32; "auto" is the first, but on a CPU that does
    not multiply bfloat16 itself float32, which is several times as fast there. Packed values stay as they are stored.
    Raises ConfigurationError when the folder is not packed or what is asked for cannot be had here, RunError for
    damage.
    """
    faults = []
    if backend not in BACKENDS:
        faults.append(f"unknown backend {backend!r}: {near(backend, BACKENDS)}")
    if prefer not in PREFERENCES:
        faults.append(f"unknown preference {prefer!r}: {near(prefer, PREFERENCES)}")
    if dtype not in ("auto", *DTYPES):
        faults.append(f"unknown dtype {dtype!r}: {near(dtype, ['auto', *DTYPES])}")
    if backend == "semi_structured":
        ignored = {'prefer="memory"': prefer == "memory", f"dtype={dtype!r}": dtype != "auto"}
        faults += [
            f"{option} would change nothing on the semi_structured backend; leave it away"
            for option, given in ignored.items()
            if given
        ]
    if faults:
        raise ConfigurationError(faults)
    folder = Path(path)
    if backend == "semi_structured":
        from wanda.runtime.semi_structured import convert, require_cuda

        require_cuda()
        if is_packed(folder):
            stored = stored_dtypes(folder)
            return convert(_all_dense(folder, stored.pop() if len(stored) == 1 else None, trust_remote_code))
        folder = resolve(path, trust_remote_code)
        return convert(load_model(folder, _stored(folder), "cpu", trust_remote_code))
    computed = computed_dtype(folder, dtype)
    if dtype == "auto" and computed == torch.float32 and stored_dtypes(folder) != {torch.float32}:
        _say("this CPU does not multiply bfloat16 itself, so the model computes in float32")
    if native() is None:
        if prefer == "memory":
            raise ConfigurationError(
                'prefer="memory" needs the C kernels, which are not here, so that packed layers are expanded when they '
                "are loaded; reinstall wanda-prune where there is a C compiler (`pip install -v` shows what it said)"
            )
        return _all_dense(folder, computed, trust_remote_code)
    checkpoint = open_packed(folder)
    dense = set() if prefer == "memory" else without_gain(checkpoint.matrices, computed)
    if dense:
        _say(
            f"{len(dense)} of {len(checkpoint.matrices)} packed matrices are loaded dense, because torch is predicted "
            f"to decode faster with them than the packed kernels of this machine ({LEVELS[level()]}); "
            "prefer memory to speed (--prefer memory) to keep them packed"
        )
    kept = kept_as_stored(checkpoint.tensors, checkpoint.matrices, computed, prefer == "speed")
    model = _from_checkpoint(checkpoint, dense, kept, computed, trust_remote_code)
    if tiled(torch.bfloat16):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.is_cpu:
                model.set_submodule(name, FastLinear.of(module))
    return model


def computed_dtype(folder: Path, dtype: str = "auto") -> torch.dtype | None:
    """What a packed folder's model computes in on this CPU, as `load` says; None: everything as it is stored.

    Raises ConfigurationError for a type that is neither stored nor float32, or a folder that is not packed.
    """
    return type_of(stored_dtypes(folder), dtype, folder)


def type_of(stored: set[torch.dtype], dtype: str, folder: Path) -> torch.dtype | None:
    """`computed_dtype` for packed values of the types `stored`, in a folder that messages name."""
    if dtype == "auto":
        slow = stored - {torch.float32} and not cpu_has_bfloat16()
        return torch.float32 if slow else stored.pop() if len(stored) == 1 else None
    if DTYPES[dtype] != torch.float32 and stored != {DTYPES[dtype]}:
        held = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in stored)) or "no packed"
        raise ConfigurationError(
            f"{folder} holds {held} values, which cannot be computed in {dtype}; choose float32 or auto"
        )
    return DTYPES[dtype]


def _all_dense(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    checkpoint = open_packed(folder)
    return _from_checkpoint(checkpoint, set(checkpoint.matrices), set(), dtype, trust_remote_code)


def _stored(folder: Path) -> str:
    """The name of the type that most bytes of an ordinary checkpoint's matrices are stored in."""
    nbytes: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        for entry in read_header(file)[0].values():
            nbytes[entry.dtype] += entry.nbytes if len(entry.shape) > 1 else 0
    return str(max(nbytes, key=nbytes.__getitem__, default=torch.float32)).removeprefix("torch.")


def _from_checkpoint(
    checkpoint: PackedCheckpoint, dense: set[str], kept: set[str], dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    """The model, the matrices named in `dense` ordinary parameters of it; dtype None: as everything is stored.

    kept: tensors that are not packed on the disk, but in memory.
    """
    store, state = _placeholders(checkpoint, dense, kept, dtype)
    model = _build(checkpoint, state, dtype, trust_remote_code)
    fused = store.keys() - _put_in_place(model, checkpoint, store, dtype)
    if fused:
        # transformers made something else of them: experts that lie fused in memory, say.
        packed = fused - kept
        if packed:
            _say(f"{len(packed)} packed matrices are fused in memory ({min(packed)}, ...), so they run dense")
        shapes = {checkpoint.tensors[key].shape for key in fused & kept}  # tied weights may have two names
        kept = {key for key in kept if checkpoint.tensors[key].shape not in shapes}
        return _from_checkpoint(checkpoint, dense | packed, kept, dtype, trust_remote_code)
    return model.eval()


def _placeholders(
    checkpoint: PackedCheckpoint, dense: set[str], kept: set[str], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One element for every matrix that is packed in memory, and the state for transformers to load."""
    store: dict[str, Tensor] = {}
    state: dict[str, Tensor] = dict(checkpoint.tensors)
    for key, matrix in checkpoint.matrices.items():
        if key in dense:
            state[key] = matrix.dense()
        else:
            store[key] = torch.zeros(1, dtype=dtype or matrix.dtype)
            state[key] = store[key].expand(matrix.out, matrix.width)
    for key in kept:
        store[key] = torch.zeros(1, dtype=dtype)
        state[key] = store[key].expand(checkpoint.tensors[key].shape)
    return store, state


def _class(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """The model's class: from the code beside config.json when there is some and it may run, else transformers' own."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own and trust_remote_code:
        try:
            return get_class_from_dynamic_module(own, folder)
        except (ValueError, OSError, ImportError, AttributeError, SyntaxError) as error:
            raise ConfigurationError(
                f"{folder}: the code {own} that config.json names cannot be loaded "
                f"({(str(error).strip() or repr(error)).splitlines()[0]}); copy it from the original model"
            ) from error
    kind = getattr(transformers, (getattr(config, "architectures", None) or ["?"])[0], None)
    if kind is None and own:
        raise ConfigurationError(
            f"{folder}: the model brings code of its own ({own}); read it, and allow it with --trust-remote-code "
            "(trust_remote_code=True)"
        )
    if kind is None:
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise ConfigurationError(f"{folder}: its config.json names no architecture that transformers knows")
    return kind


def _build(
    checkpoint: PackedCheckpoint, state: dict[str, Tensor], dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    import transformers

    config = load_config(checkpoint.folder, trust_remote_code)
    kind = _class(checkpoint.folder, config, trust_remote_code)
    try:
        with bars_on_terminals_only():
            model, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except (ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise RunError(f"{checkpoint.folder}: tensors and config.json do not fit together: {reason}") from error
    if found["missing_keys"] or found["mismatched_keys"]:
        lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
        raise RunError(
            f"{checkpoint.folder} lacks {lacking[0]} in the shape that config.json asks for; pack the original again"
        )
    model.config._name_or_path = model.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    return model


def _put_in_place(
    model: nn.Module, checkpoint: PackedCheckpoint, store: dict[str, Tensor], dtype: torch.dtype | None
) -> set[str]:
    """Replace the layers whose weights are placeholders; returns the matrices that were found.

    One that is not packed on the disk is not among them where a layer of another kind has it.
    """
    key_of = {element.data_ptr(): key for key, element in store.items()}
    matrices = dict(checkpoint.matrices)
    matrices |= {key: PackedMatrix.pack(checkpoint.tensors[key]) for key in store.keys() - matrices.keys()}
    seen: set[str] = set()
    ordinary: set[str] = set()
    for module_name, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = key_of.get(parameter.data_ptr())
            if key is None or any(parameter.stride()):
                continue
            seen.add(key)
            matrix = matrices[key]
            if isinstance(module, nn.Embedding) and name == "weight" and module.max_norm is None:
                PackedTable(matrix, dtype or matrix.dtype).put_into(module)
                continue
            packed = _layer(module, name, matrix, dtype)
            if packed is not None:
                model.set_submodule(module_name, packed)
            else:
                if key not in checkpoint.matrices:  # as it would have been loaded, tied weights once
                    ordinary.add(key)
                    continue
                _say(f"{key} belongs to a {type(module).__name__}, which is not run packed; it runs dense")
                weight = matrix.dense(dtype=dtype)
                setattr(module, name, nn.Parameter(weight, requires_grad=parameter.requires_grad))
    return seen - ordinary


def _layer(module: nn.Module, name: str, matrix: PackedMatrix, dtype: torch.dtype | None) -> PackedLinear | None:
    """The packed layer that computes what `module` does, None when it is not known to be a linear layer."""
    from transformers.pytorch_utils import Conv1D

    if name != "weight":
        return None
    if type(module) is nn.Linear:
        return PackedLinear(matrix, module.bias, dtype)
    if type(module) is Conv1D:  # x @ weight: the stored matrix is the transpose
        return PackedLinear(PackedMatrix.pack(matrix.dense().T), module.bias, dtype)
    return None


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The tensors that hold modules' weights: parts of packed matrices, parameters and buffers, each storage once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        tensors = [*module.parameters(), *module.buffers()]
        for part in module.modules():
            packed = vars(part).get("weight", part)
            if isinstance(packed, PackedLinear | PackedTable):
                tensors += [packed.matrix.mask, packed.matrix.offsets, packed.matrix.values]
        found.update({tensor.data_ptr(): tensor.detach() for tensor in tensors})
    return list(found.values())


def _say(text: str) -> None:
    print(f"wanda: {text}", file=sys.stderr)
