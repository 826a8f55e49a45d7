"""Decoding, prefill, loading and size of packed bfloat16 models against dense ones, beside a roofline.

    python bench/decode_speed.py --out bench/results/decode_speed.json

Everything is measured in alternating runs on the machine at hand. The linear layers are also timed alone, against torch
and against a dense kernel of ours that is written like the packed one, so that the gain is sparsity and not torch's
weakness (where there is one, on AVX-512 BF16). Both compute in bfloat16, or in float32 on a CPU that does not multiply
bfloat16 itself. The roofline: bytes each format must read, over the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from facts import processor
from wanda.checkpoint.packed import pack
from wanda.checkpoint.source import weight_files
from wanda.checkpoint.tensors import read_header, write_file
from wanda.kernels.native import LEVELS, level
from wanda.kernels.packed import dense_multiply, tiled
from wanda.runtime.layers import PackedLinear
from wanda.runtime.loading import computed_dtype, load
from wanda.runtime.measure import (
    Spread,
    alternate,
    decode_seconds,
    folder_bytes,
    fresh,
    prefill_seconds,
    ratios,
    read_bandwidth,
)

LARGE = 8_000_000  # weights from which a layer is called large
READ = 1 << 29  # bytes read to measure the bandwidth


def prune(weight: Tensor, sparsity: float) -> Tensor:
    """Magnitude per row: the floor(width * sparsity) smallest of each row go."""
    gone = weight.abs().float().topk(int(weight.shape[1] * sparsity), dim=1, largest=False).indices
    return weight.scatter(1, gone, 0.0)


def make_llama(folder: Path, config: dict[str, Any], sparsity: float) -> None:
    """A checkpoint whose blocks all hold the same random block: files and memory are as large as they would be."""
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**config)
    settings.dtype, settings.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    once: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        common = ".".join(part for part in parts if not part.isdigit())
        if common not in once:
            if parameter.ndim == 1:
                once[common] = torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                weight = (torch.randn(parameter.shape) * 0.02).bfloat16()
                once[common] = prune(weight, sparsity) if "layers" in parts else weight
        tensors[name] = once[common]
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", tensors, {"format": "pt"})
    settings.save_pretrained(folder)


def make_demo(folder: Path, sparsity: float) -> None:
    """The demo's model, pruned."""
    from wanda.demo import model_folder

    source = model_folder()
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".index.json")):
            shutil.copyfile(file, folder / file.name)
    tensors = {}
    for file in weight_files(source):
        for key, entry in read_header(file)[0].items():
            weight = entry.read()
            tensors[key] = prune(weight, sparsity) if weight.ndim == 2 and "layers" in key else weight
    write_file(folder / "model.safetensors", tensors, {"format": "pt"})


def measure_layers(dense: nn.Module, packed: nn.Module, rounds: int) -> dict[str, Any]:
    """One token through every sparse linear layer, kernels alone, all of them and the large ones.

    Plain reading of memory takes its turn in the same rounds; the share of its bandwidth is the roofline's.
    """
    groups: dict[str, list[tuple[Tensor, PackedLinear, Tensor]]] = {"all": [], "large": []}
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear) and 10 * layer.matrix.survivors < 9 * layer.matrix.out * layer.matrix.width:
            weight = dense.get_submodule(name).weight.detach()
            entry = (weight, layer, torch.randn(1, layer.in_features, dtype=weight.dtype))
            groups["all"].append(entry)
            if weight.numel() >= LARGE:
                groups["large"].append(entry)
    found: dict[str, Any] = {}
    for group, entries in groups.items():
        if not entries:
            continue

        def timed(run: Callable[[Tensor, PackedLinear, Tensor], object], entries: Any = entries) -> float:
            start = time.perf_counter()
            with torch.no_grad():
                for weight, layer, x in entries:
                    run(weight, layer, x)
            return time.perf_counter() - start

        actions = {
            "torch": partial(timed, lambda weight, layer, x: functional.linear(x, weight)),
            "dense_kernel": partial(timed, lambda weight, layer, x: dense_multiply(weight, x)),
            "packed_kernel": partial(timed, lambda weight, layer, x: layer.matrix.multiply(x)),
            "read": lambda: READ / read_bandwidth(READ, 1),
        }
        if not tiled(entries[0][0].dtype):
            del actions["dense_kernel"]
        taken = alternate(actions, rounds)
        reading = taken.pop("read")
        read = {
            "dense": sum(weight.nbytes for weight, _, _ in entries),
            "packed": sum(layer.matrix.nbytes for _, layer, _ in entries),
        }
        # The bandwidth changes from one round to the next: a kernel is held against the reading of its own round.
        at_bandwidth = {name: [seconds * nbytes / READ for seconds in reading] for name, nbytes in read.items()}
        found[group] = {
            "layers": len(entries),
            "seconds": {name: asdict(Spread.of(seconds)) for name, seconds in taken.items()},
            "times_torch": asdict(ratios(taken["torch"], taken["packed_kernel"])),
            "bytes": read,
            "read_bandwidth_bytes_per_second": asdict(Spread.of([READ / seconds for seconds in reading])),
            "share_of_bandwidth": {
                name: asdict(ratios(at_bandwidth[name.removesuffix("_kernel")], taken[name]))
                for name in ("dense_kernel", "packed_kernel")
                if name in taken
            },
        }
        if "dense_kernel" in taken:
            found[group]["times_dense_kernel"] = asdict(ratios(taken["dense_kernel"], taken["packed_kernel"]))
    return found


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_loading(dense: Path, packed: Path, times: int, dtype: str) -> dict[str, Any]:
    """Seconds until every byte of the weights was read, in new processes, alternating; and resident bytes."""
    found: dict[str, Any] = {}
    for cache in ("warm", "cold"):
        runs: dict[str, list[Any]] = {"dense": [], "packed": []}
        for _ in range(times + 1):
            for name, folder in (("dense", dense), ("packed", packed)):
                if cache == "cold":
                    forget(folder)
                runs[name].append(fresh(folder, packed=name == "packed", dtype=dtype))
        found[cache] = {
            name: {
                "load_returned": asdict(Spread.of([run.opened for run in values[1:]])),
                "all_bytes_read": asdict(Spread.of([run.ready for run in values[1:]])),
            }
            for name, values in runs.items()
        }
        found["resident_bytes"] = {name: values[-1].resident for name, values in runs.items()}
    return found


def measure_model(dense_folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    packed_folder = dense_folder.with_name(dense_folder.name + "-packed")
    start = time.perf_counter()
    summary = pack(str(dense_folder), packed_folder)
    result: dict[str, Any] = {
        "pack_seconds": time.perf_counter() - start,
        "packed_tensors_ratio": summary.packed_bytes / summary.dense_bytes,
        "folder_ratio": folder_bytes(packed_folder) / folder_bytes(dense_folder),
    }
    log("loading")
    computed = computed_dtype(packed_folder)
    result["dtype"] = str(computed).removeprefix("torch.")
    result["loading"] = measure_loading(dense_folder, packed_folder, config["loads"], result["dtype"])
    dense = transformers.AutoModelForCausalLM.from_pretrained(dense_folder, dtype=computed).eval()
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()  # in memory of its own, as after any training or conversion
    models = {"dense": dense, "packed": load(packed_folder)}
    actions = {
        "decode": lambda model: decode_seconds(model, config["prompt"], config["decode_tokens"]),
        "prefill": lambda model: prefill_seconds(model, config["prefill"]),
    }
    for what, run in actions.items():
        log(what)
        taken = alternate({name: partial(run, model) for name, model in models.items()}, config["rounds"])
        result[what] = {
            **{name: asdict(Spread.of(seconds)) for name, seconds in taken.items()},
            "ratio": asdict(ratios(taken["dense"], taken["packed"])),
        }
    log("linear layers alone")
    result["linear_layers"] = measure_layers(dense, models["packed"], config["layer_rounds"])
    del dense, models
    gc.collect()
    log(f"compressing; decode {result['decode']['ratio']}, prefill {result['prefill']['ratio']}")
    small = dense_folder.with_name(dense_folder.name + "-small")
    compressed = pack(str(dense_folder), small, compress=True)
    result["compressed_packed_tensors_ratio"] = (
        compressed.folder_after - (compressed.folder_before - compressed.dense_bytes)
    ) / compressed.dense_bytes
    result["compressed_folder_ratio"] = folder_bytes(small) / folder_bytes(dense_folder)
    for folder in (dense_folder, packed_folder, small):
        shutil.rmtree(folder)
    return result


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("llama", "demo"))
    parser.add_argument("--sparsity", type=float, help="this one only")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; the system's temporary folder")
    arguments = parser.parse_args()
    config = tomllib.loads(arguments.config.read_text())
    chosen = [
        (kind, sparsity)
        for kind in ("llama", "demo")
        for sparsity in config[kind]["sparsities"]
        if arguments.only in (None, kind) and arguments.sparsity in (None, sparsity)
    ]
    if not chosen:
        there = {kind: config[kind]["sparsities"] for kind in ("llama", "demo") if arguments.only in (None, kind)}
        parser.error(f"{arguments.config} has no sparsity {arguments.sparsity}; it has {json.dumps(there)}")
    transformers.utils.logging.disable_progress_bar()
    result: dict[str, Any] = {
        "config": config,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "kernels": LEVELS[level()],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "load_average_before": os.getloadavg(),
        "models": {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for kind, sparsity in chosen:
            log(f"{kind} at {sparsity}")
            folder = Path(temporary) / f"{kind}-{sparsity}"
            if kind == "llama":
                make_llama(folder, config["llama"]["config"], sparsity)
            else:
                make_demo(folder, sparsity)
            result["models"][folder.name] = measure_model(folder, config)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps(
            {
                name: {what: model[what]["ratio"] for what in ("decode", "prefill")}
                for name, model in result["models"].items()
            }
        )
    )


if __name__ == "__main__":
    main()
