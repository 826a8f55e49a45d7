"""Where a model comes from: a local Hugging Face folder, a hub id, or a .gguf file; and loading it whole.

Only safetensors weights are read. Everything else is refused here, before anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from wanda.checkpoint.folder import INDEX
from wanda.checkpoint.tensors import read_header, sync_files
from wanda.device import compute_dtype, pick_device
from wanda.errors import ConfigurationError, MissingExtraError, RunError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.tiktoken"]  # config, tokenizer, index, card
NO_HEAD = "it is no trained classifier; give the model that was fine-tuned to classify"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def cache_folder() -> Path:
    """Where this package keeps what it fetched or converted: $XDG_CACHE_HOME/wanda, else ~/.cache/wanda."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "wanda"


def gguf_folder(sha256: str) -> Path:
    """Where the checkpoint made from the .gguf file with this sha256 is, or will be."""
    return cache_folder() / "gguf" / sha256


def resolve(
    model: str | os.PathLike[str], trust_remote_code: bool = False, revision: str | None = None, packed: bool = False
) -> Path:
    """The local folder of an ordinary safetensors checkpoint for `model`; with `packed`, a packed one will do too.

    model: a Hugging Face folder; a hub id (fetched into the hub's cache, of which a warm one works offline); or a
    .gguf file (dequantised once into a bfloat16 checkpoint in `cache_folder()`).
    Raises ConfigurationError when there is no such model, or it has no config or weights, lacks a shard, is cut
    short, holds pickles only, or is quantised.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if path.is_dir():
        from wanda.checkpoint.packed import is_packed

        if not (packed and is_packed(path)):
            check_folder(path)
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return _from_gguf(path)
        raise ConfigurationError(
            f"{text} is a file; a model is a folder with config.json and safetensors weights, a hub id or a .gguf file"
        )
    local = text.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors")
    if local or not _REPOSITORY.fullmatch(text):
        raise ConfigurationError(f"no such model: there is nothing at {text}{_similar(path)}")
    return _from_hub(text, trust_remote_code, revision)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no whole, unquantised, unpacked safetensors checkpoint; reads headers only.

    Raises ConfigurationError with the reason and the cure.
    """
    from wanda.checkpoint.packed import is_packed

    if is_packed(folder):
        raise ConfigurationError(f"{folder} is packed; make an ordinary checkpoint of it first: wanda unpack")
    config = read_config(folder)
    _refuse_quantised(config, str(folder))
    files = weight_files(folder)
    for file in files:
        try:
            read_header(file)
        except RunError as error:
            raise ConfigurationError(str(error)) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint as a table; raises ConfigurationError when it is missing or malformed."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigurationError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder; give the folder that has it"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error}); copy or download it again") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{file} is no table of options; copy or download it again")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted: those its index names, else the one file it has.

    Raises ConfigurationError when there is none, one is missing, or there are only pickles.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{index} is no index of weights ({error!r}); copy or download it again"
            ) from error
        if outside:
            raise ConfigurationError(
                f"{index} names {outside[0]}, which is outside of the folder; copy the file into it, and name it there"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigurationError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}); download or copy them too"
            )
        return [folder / name for name in names]
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise ConfigurationError(
            f"{folder} has {len(files)} safetensors files but no model.safetensors.index.json that says what is where; "
            "copy the index too"
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ConfigurationError(
            f"{folder} holds its weights as pickle files only ({pickles[0]}), which can run any code when they are "
            "opened; only safetensors is read: load the model where you trust it and save_pretrained() it again"
        )
    raise ConfigurationError(f"{folder} has a config.json but no weights (*.safetensors); copy or download them too")


def load_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a resolved folder; ConfigurationError for an architecture that is not known."""
    from transformers import AutoConfig

    if is_timm(read_config(path)):
        _check_timm(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if getattr(config, "model_args", None):  # timm writes the number of classes there too, which is said twice then
            config.model_args = {k: v for k, v in config.model_args.items() if k != "num_classes"}
        return config
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ConfigurationError(
            f"{path}: {_unknown_architecture(path, error, trust_remote_code, 'a causal language model')}"
        ) from error


def is_timm(config: dict[str, Any]) -> bool:
    """Whether a config.json is of timm's format (`architecture`, no `model_type`), which transformers wraps."""
    return "architecture" in config and "model_type" not in config


def _check_timm(path: Path) -> None:
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"the model {path}", "timm", "vision") from error
    except RuntimeError as error:  # a torchvision built for another torch
        raise ConfigurationError(
            f"the model {path} needs timm, which cannot be imported ({_first_line(error)}); install the torchvision "
            "that belongs to this torch"
        ) from error


def classifies_images(config: Any) -> bool:
    """Whether a config is an image classifier's rather than a causal language model's.

    Raises ConfigurationError when transformers has neither for it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    code = getattr(config, "auto_map", None) or {}
    text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in code
    images = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or "AutoModelForImageClassification" in code
    if text and images:
        return any("ForImageClassification" in name for name in config.architectures or ())
    if not text and not images:
        name = ", ".join(config.architectures or ()) or config.model_type
        raise ConfigurationError(
            f"{name} is neither a decoder nor an image classifier; give a model that AutoModelForCausalLM or "
            "AutoModelForImageClassification of transformers loads"
        )
    return images


def load_model(
    path: Path, dtype: str = "auto", device: str | torch.device = "auto", trust_remote_code: bool = False
) -> Any:
    """The causal language model of a resolved folder, whole, in eval mode on `device`, in `compute_dtype`'s type.

    Raises ConfigurationError when transformers has no causal model for its config.
    """
    from transformers import AutoModelForCausalLM

    stored = stored_dtype(load_config(path, trust_remote_code))
    return _loaded(path, stored, AutoModelForCausalLM, dtype, device, trust_remote_code=trust_remote_code)[0]


def load_classifier(
    path: Path, dtype: str = "auto", device: str | torch.device = "auto", trust_remote_code: bool = False
) -> Any:
    """The image classifier of a resolved folder, whole, as `load_model` does it.

    Raises ConfigurationError when its config is of none, or the files hold no classification head.
    """
    from transformers import AutoModelForImageClassification

    config = load_config(path, trust_remote_code)
    if not classifies_images(config):
        raise ConfigurationError(f"{path} is no image classifier; measure language models with --text or --tasks")
    options = {"config": config, "trust_remote_code": trust_remote_code}
    model, missing = _loaded(path, stored_dtype(config), AutoModelForImageClassification, dtype, device, **options)
    if missing:
        raise ConfigurationError(f"{path} lacks {missing[0]}: {NO_HEAD}")
    return model


def _loaded(
    path: Path, stored: torch.dtype | None, auto_class: Any, dtype: str, device: str | torch.device, **options: Any
) -> tuple[Any, list[str]]:
    """The model that an auto class of transformers loads, and the names of parameters that the files lack."""
    place = pick_device(device) if isinstance(device, str) else device
    kind = compute_dtype(place, dtype, stored)
    try:
        with bars_on_terminals_only():
            model, told = auto_class.from_pretrained(
                path, dtype=kind, use_safetensors=True, output_loading_info=True, **options
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        trusted = options["trust_remote_code"]
        kind_of_model = "an image classifier" if "Image" in auto_class.__name__ else "a causal language model"
        why = _unknown_architecture(path, error, trusted, kind_of_model)
        raise ConfigurationError(f"{path}: {why}") from error
    return model.to(place).eval(), sorted(told["missing_keys"])


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a resolved folder; ConfigurationError when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError, TypeError) as error:
        raise ConfigurationError(
            f"{path} has no tokenizer that can be loaded ({_first_line(error)}); "
            "copy tokenizer.json and tokenizer_config.json from the original model"
        ) from error


def stored_dtype(config: Any) -> torch.dtype | None:
    """The type that a config says its weights are stored in, None when it does not say."""
    dtype = getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def context_length(config: Any) -> int | None:
    """How many tokens a model can see at once, by its config; None for a model without such a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def sequence_length(config: Any, asked: int | None, usual: int = 2048) -> int:
    """Tokens of a sequence or window: `asked`, or min(usual, the model's context).

    Raises ConfigurationError when more is asked for than the context holds.
    """
    context = context_length(config)
    if asked is None:
        return min(usual, context or usual)
    if context is not None and asked > context:
        raise ConfigurationError(f"--seqlen {asked} is above the model's context of {context} tokens; choose less")
    return asked


@contextlib.contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep transformers' progress bars out of logs."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _unknown_architecture(path: Path, error: Exception, trusted: bool, kind: str) -> str:
    if "trust_remote_code" in str(error) and not trusted:
        return "the model brings code of its own; read it, and allow it with --trust-remote-code"
    name = read_config(path).get("model_type", "?")
    return f"transformers cannot load it as {kind} (model_type {name!r}): {_first_line(error)}"


def _refuse_quantised(config: dict[str, Any], name: str) -> None:
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    quantisation = config.get("quantization_config") or inner
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise ConfigurationError(
            f"{name} is a quantised checkpoint ({method}); prune the original model, then quantise the result"
        )


def _similar(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(str(folder / name) for name in close)}?" if close else ""


def _from_hub(name: str, trust_remote_code: bool, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    small = [*_SMALL_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=small, ignore_patterns=["*/*.safetensors"])
        )
        _refuse_quantised(read_config(folder), name)  # before gigabytes are fetched
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*small, "*.safetensors"],
                ignore_patterns=["*/*.safetensors", "consolidated*"],  # copies of the weights in other layouts
            )
        )
    except GatedRepoError as error:
        raise ConfigurationError(
            f"{name} is gated on the hub: accept its terms at https://huggingface.co/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"{name} on the hub has no revision {revision!r}; leave --revision away") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigurationError(
            f"no such model: there is neither a folder {name} nor a public hub repository of that name; check the "
            "spelling, or log in with `hf auth login` when it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigurationError(
            f"no such model: there is no folder {name}, and the hub cannot be asked for it and its cache does not hold "
            f"it ({_first_line(error)}); check the path or the network"
        ) from error
    try:
        check_folder(folder)
    except ConfigurationError as error:
        raise ConfigurationError(f"hub model {name}: {error}") from error
    return folder


def _from_gguf(file: Path) -> Path:
    """Dequantise a .gguf file into an ordinary bfloat16 checkpoint, once: the cache's key is the file's sha256."""
    with open(file, "rb") as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = gguf_folder(key)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{key}.{os.getpid()}.partial")
    try:
        # the reader's bar is of another make than transformers' own, and knows no terminal
        bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with bar, bars_on_terminals_only():
            _dequantise(file, partial)
        check_folder(partial)
        sync_files(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first; both hold the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _dequantise(file: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise MissingExtraError(f"reading {file}", "gguf", "gguf")
    options: dict[str, Any] = {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        if hasattr(transformers, "GgufConfig"):  # since it can keep weights packed, that has to be declined
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError, IndexError, struct.error) as error:
        raise ConfigurationError(
            f"{file} cannot be read as a GGUF model ({_first_line(error)}); download it again or use the original"
        ) from error
    # A model that came from GGUF refuses to be saved for as long as it knows its quantiser.
    model.hf_quantizer = None
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
