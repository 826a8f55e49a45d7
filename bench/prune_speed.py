"""What pruning by Wanda costs beside one bare forward pass, and beside llmcompressor, measured in alternating rounds.

    python bench/prune_speed.py smollm2|llama-1b [--rounds 3] [--calibration SOURCE] [--without-llmcompressor]
                                [--samples N] [--blocks N] [--threads N] [--out bench/results/prune_speed-MODEL.json]

In every round, one after the other:
- bare: the calibration tokens through the blocks, in the micro-batches that wanda takes; blocks and hidden states are
  in memory already, nothing is gathered, no embedding, no head;
- wanda layer, wanda block: the whole call of wanda.prune with each --propagate: tokenising, reading, pruning, writing
  the checkpoint and its model card;
- llmcompressor: the call of oneshot alone, in a process of its own (bench/llmcompressor_oneshot.py), on the same model,
  token ids and type, with every batch size of the config; the model is loaded before, nothing is written.
Every other round runs backwards; ratios are taken within a round. A plot lies beside the result. llmcompressor's
environment is made once, under the cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facts import facts, save, spread, spread_text
from options import positive
from shapes import first_blocks, make_llama, write_text
from wanda.blocks import record
from wanda.checkpoint.source import cache_folder
from wanda.checkpoint.tensors import write_file
from wanda.demo import model_folder
from wanda.memory import reuse_memory
from wanda.pipeline import prune
from wanda.plan import Plan


def main() -> None:
    reuse_memory()  # as the command line does; the bare forward has it too
    here = Path(__file__)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("smollm2", "llama-1b"))
    parser.add_argument("--config", type=Path, default=here.with_suffix(".toml"))
    parser.add_argument("--calibration", help="calibration text (SOURCE) of smollm2; builtin")
    parser.add_argument("--rounds", type=positive, help="instead of the config's number")
    parser.add_argument("--samples", type=positive, help="calibration sequences, instead of the config's number")
    parser.add_argument("--seqlen", type=positive, help="tokens of a sequence, instead of the config's number")
    parser.add_argument("--blocks", type=positive, help="only the first so many blocks of the model")
    parser.add_argument("--threads", type=positive, help="of torch, in all processes; else its own choice")
    parser.add_argument("--without-llmcompressor", action="store_true")
    parser.add_argument("--out", type=Path, help="instead of bench/results/prune_speed-MODEL.json")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.calibration is not None and arguments.model != "smollm2":
        parser.error(f"--calibration is of smollm2; {arguments.model} has random weights and takes random words")
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    config |= config.pop(arguments.model)
    config |= {n: v for n in ("rounds", "samples", "seqlen") if (v := getattr(arguments, n)) is not None}
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or here.parent / "results" / f"prune_speed-{arguments.model}.json"
    python = None if arguments.without_llmcompressor else environment(config["llmcompressor"]["install"])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        model, source = prepare(arguments.model, folder, config, arguments.blocks, arguments.calibration or "builtin")
        result = measure(model, source, config, python, folder)
    save(
        out, {"model": arguments.model, "blocks": arguments.blocks or "all", "calibration": Path(source).name} | result
    )
    draw(out.with_suffix(".png"), arguments.model, result)


def prepare(name: str, folder: Path, config: dict[str, Any], blocks: int | None, calibration: str) -> tuple[Path, str]:
    """The checkpoint and its calibration SOURCE."""
    if name == "smollm2":
        model = model_folder()
        return (model if blocks is None else first_blocks(model, folder / "model", blocks)), calibration
    shape = config["shape"] if blocks is None else config["shape"] | {"num_hidden_layers": blocks}
    log("making the checkpoint")
    model = make_llama(folder / "model", shape)
    return model, write_text(folder / "text.txt", config["samples"] * config["seqlen"])


def measure(model: Path, source: str, config: dict[str, Any], python: Path | None, folder: Path) -> dict[str, Any]:
    """Seconds of everything in every round, and the ratios."""
    options = {name: config[name] for name in ("samples", "seqlen", "dtype", "sparsity", "seed")}
    options |= {"calibration": source, "progress": False}
    found = facts()
    plan = prune(model, out=folder / "out", dry_run=True, **options)
    assert isinstance(plan, Plan)
    ids, notes = plan.calibration_tokens()
    assert ids is not None
    actions: dict[str, Callable[[], float]] = {"bare": bare_forward(plan, ids)}
    for way in ("layer", "block"):
        actions[f"wanda {way}"] = partial(wanda_seconds, model, folder / "out", options | {"propagate": way})
    others: list[dict[str, Any]] = []
    if python is not None:
        write_file(folder / "tokens.safetensors", {"token_ids": ids}, {"format": "pt"})
        for batch in config["llmcompressor"]["batches"]:
            command = llmcompressor_command(python, model, folder / "tokens.safetensors", batch, config)
            actions[f"llmcompressor batch {batch}"] = partial(llmcompressor_seconds, command, config, others)
    log("warming up")
    wanda_seconds(model, folder / "out", options | {"samples": 1, "seqlen": min(64, config["seqlen"])})
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(config["rounds"]):
        for name in list(actions)[:: -1 if number % 2 else 1]:
            taken[name].append(actions[name]())
            log(f"round {number + 1}, {name}: {taken[name][-1]:.2f} s")
    result = found | {
        "tokens": list(ids.shape),
        "micro_batch": plan.batch,
        "notes": notes,
        "config": config,
        "seconds": {name: spread(values) for name, values in taken.items()},
        "rounds": {name: [round(value, 3) for value in values] for name, values in taken.items()},
        "ratios": {name: spread(values) for name, values in ratios(taken).items()},
    }
    if others:
        result["llmcompressor"] = others[-1] | {"seconds": "in seconds above"}
    for name, values in result["ratios"].items():
        print(f"{name:40} {spread_text(values)}")
    return result


def ratios(taken: dict[str, list[float]]) -> dict[str, list[float]]:
    """Round by round: wanda over bare, llmcompressor (its best batch size of that round too) over wanda."""

    def over(above: list[float], below: list[float]) -> list[float]:
        return [a / b for a, b in zip(above, below, strict=True)]

    ours = {name: values for name, values in taken.items() if name.startswith("wanda")}
    theirs = {name: values for name, values in taken.items() if name.startswith("llmcompressor")}
    found = {f"{name} / bare": over(values, taken["bare"]) for name, values in {**ours, **theirs}.items()}
    if theirs:
        theirs["best llmcompressor"] = [min(values) for values in zip(*theirs.values(), strict=True)]
    for name, values in theirs.items():
        found |= {f"{name} / {own}": over(values, own_values) for own, own_values in ours.items()}
    return found


@torch.no_grad()
def bare_forward(plan: Plan, ids: Tensor) -> Callable[[], float]:
    """All blocks in memory, and what enters the first: one pass of all micro-batches through every block, timed."""
    skeleton = plan.skeleton
    skeleton.load_outside()
    recording = record(skeleton.model, skeleton.blocks, [part.to(skeleton.device) for part in ids.split(plan.batch)])
    skeleton.drop_outside()
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index)

    @torch.no_grad()
    def run() -> float:
        hidden = list(recording.hidden)
        start = time.perf_counter()
        for index, block in enumerate(skeleton.blocks.modules):
            for number, calls in enumerate(recording.calls):
                hidden[number] = calls[index].run(block, hidden[number])
        return time.perf_counter() - start

    return run


def wanda_seconds(model: Path, out: Path, options: dict[str, Any]) -> float:
    """The whole call of wanda.prune."""
    start = time.perf_counter()
    prune(model, out=out, **options)
    taken = time.perf_counter() - start
    shutil.rmtree(out)
    return taken


def llmcompressor_command(python: Path, model: Path, tokens: Path, batch: int, config: dict[str, Any]) -> list[str]:
    flags = {"batch": batch, "dtype": config["dtype"], "threads": torch.get_num_threads()}
    flags |= {"sparsity": config["sparsity"]}
    script = Path(__file__).with_name("llmcompressor_oneshot.py")
    return [str(python), str(script), str(model), str(tokens), *(f"--{name}={value}" for name, value in flags.items())]


def llmcompressor_seconds(command: list[str], config: dict[str, Any], others: list[dict[str, Any]]) -> float:
    """Seconds of oneshot in a process of its own; what that process says is kept in `others`.

    Ends the run when it did not prune every row to the share asked for: there would be nothing to compare.
    """
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if run.returncode:
        sys.exit(f"llmcompressor ended with {run.returncode}: {run.stderr.strip()[-2000:]}")
    found = json.loads(run.stdout.splitlines()[-1])
    zeros = found["zeros_of_a_row"]
    if not found["matrices"] or max(abs(zeros[end] - config["sparsity"]) for end in ("min", "max")) > 0.005:
        sys.exit(f"llmcompressor did not prune every row to {config['sparsity']}: {json.dumps(found)}")
    others.append(found)
    return found["seconds"]


def environment(install: list[str]) -> Path:
    """The Python of llmcompressor's virtual environment, made under the cache folder when it is not there, whole."""
    folder = cache_folder() / "bench-llmcompressor"
    ready, python = folder / "ready", folder / "bin" / "python"
    if not ready.exists() or ready.read_text(encoding="utf-8") != "\n".join(install):
        log(f"making {folder} with {', '.join(install)}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for requirement in install:  # in this order: the second one finds torch there
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
            subprocess.run(pip, check=True)
        ready.write_text("\n".join(install), encoding="utf-8")
    return python


def draw(file: Path, model: str, result: dict[str, Any]) -> None:
    """A bar an action: median seconds with their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, rows = list(result["seconds"]), list(result["seconds"].values())
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    middle = [row["median"] for row in rows]
    reach = [[row["median"] - row["min"] for row in rows], [row["max"] - row["median"] for row in rows]]
    axes.barh(names, middle, xerr=reach, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(
        f"{model}, {' x '.join(map(str, result['tokens']))} tokens, {result['threads']} threads", fontsize=10
    )
    figure.savefig(file, dpi=100, metadata={"Software": None})


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
