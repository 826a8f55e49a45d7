"""Peak resident memory of pruning, in processes of their own: against the number of blocks, and for a 7B shape.

    python bench/memory.py [--blocks 4] [--only blocks|large] [--out bench/results/memory.json]

blocks: one shape with 4, 16 and 64 blocks, both ways through a block. large: a LLaMA-2-7B-shaped checkpoint of random
weights (13.5 GB on disk with all its 32 blocks; --blocks says how many are made), both ways, and under --memory. The
peak is the process's VmHWM, which wanda.json holds: interpreter and libraries are in it. A plot lies beside the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from facts import facts, save
from options import positive
from shapes import make_llama, write_text

WAYS = ("layer", "block")


def peak(model: Path, text: str, options: dict[str, Any]) -> dict[str, Any]:
    """Prune in a new process: peak bytes, seconds and notes, or the message of a run that was refused."""
    out = model.with_name("pruned")
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "wanda", "prune", str(model), "--out", str(out), "--calibration", text, "--json"]
    run = subprocess.run([*command, *flags], capture_output=True, text=True)
    if run.returncode == 2:
        return {"refused": run.stderr.strip().splitlines()[-1]}
    if run.returncode:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}: {run.stderr.strip()[-2000:]}")
    report = json.loads(run.stdout.splitlines()[-1])
    shutil.rmtree(out)
    totals = report["totals"]
    return {"peak_bytes": totals["peak_memory_bytes"], "seconds": totals["seconds"], "notes": report["notes"]}


def against_blocks(folder: Path, config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The peaks of every number of blocks, both ways, and how far they lie apart."""
    text = write_text(folder / "text.txt", config["samples"] * config["seqlen"])
    options = {"samples": config["samples"], "seqlen": config["seqlen"], "dtype": dtype}
    peaks: dict[str, dict[str, int]] = {way: {} for way in WAYS}
    for count in config["counts"]:
        model = make_llama(folder / "dense", config["shape"] | {"num_hidden_layers": count})
        for way in WAYS:
            peaks[way][str(count)] = peak(model, text, options | {"propagate": way})["peak_bytes"]
            log(f"{count} blocks, {way}: {peaks[way][str(count)] / 1e6:.0f} MB")
        shutil.rmtree(model)
    return {
        "peak_bytes": peaks,
        "largest_over_smallest": {way: round(max(p.values()) / min(p.values()), 4) for way, p in peaks.items()},
    }


def large(folder: Path, config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The peaks of the large shape, both ways and under every cap."""
    text = write_text(folder / "text.txt", config["samples"] * config["seqlen"])
    options = {"samples": config["samples"], "seqlen": config["seqlen"], "dtype": dtype}
    log(f"making {config['blocks']} blocks")
    model = make_llama(folder / "dense", config["shape"] | {"num_hidden_layers": config["blocks"]})
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    runs = {way: options | {"propagate": way} for way in WAYS}
    runs |= {f"--memory {cap}": options | {"memory": cap} for cap in config["caps"]}
    rows = {}
    for name, flags in runs.items():
        rows[name] = peak(model, text, flags)
        log(f"{name}: {json.dumps(rows[name])}")
    return {
        "blocks": config["blocks"],
        "bytes_on_disk": size,
        "below_limit": {way: rows[way]["peak_bytes"] < config["limit_bytes"] for way in WAYS},
        "runs": rows,
    }


def draw(file: Path, found: dict[str, Any], config: dict[str, Any]) -> None:
    """Peak against the number of blocks, beside the bytes of the checkpoint's blocks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for way, peaks in found["peak_bytes"].items():
        axes.plot([int(count) for count in peaks], [value / 1e6 for value in peaks.values()], "o-", label=way)
    shape = config["shape"]
    width = shape["hidden_size"]
    block = 2 * (4 * width**2 + 3 * width * shape["intermediate_size"])  # as many key-value heads as heads
    axes.plot(
        config["counts"], [count * block / 1e6 for count in config["counts"]], "k--", label="weights of the blocks"
    )
    axes.set(xlabel="blocks", ylabel="peak resident MB", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(file, dpi=100, metadata={"Software": None})


def log(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    here = Path(__file__)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here.with_suffix(".toml"))
    parser.add_argument("--only", choices=("blocks", "large"))
    parser.add_argument("--blocks", type=positive, help="of the large shape, instead of the config's; 32 are all")
    parser.add_argument("--samples", type=positive, help="calibration sequences, instead of the config's")
    parser.add_argument("--out", type=Path, default=here.parent / "results" / "memory.json")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.blocks is not None and arguments.only == "blocks":
        parser.error("--blocks is of the large shape, which --only blocks leaves out; give one of the two")
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    if arguments.blocks is not None:
        config["large"]["blocks"] = arguments.blocks
    if arguments.samples is not None:
        config["blocks"]["samples"] = config["large"]["samples"] = arguments.samples
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    measures = {"blocks": against_blocks, "large": large}
    for part in (arguments.only,) if arguments.only else measures:
        found = facts()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found |= measures[part](Path(folder), config[part], config["dtype"])
        result[part] = found | {"config": config[part] | {"dtype": config["dtype"]}}
        save(arguments.out, result)
    if "blocks" in result:
        draw(arguments.out.with_suffix(".png"), result["blocks"], result["blocks"]["config"])


if __name__ == "__main__":
    main()
