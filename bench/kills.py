"""A real run killed by SIGKILL at random moments and resumed: does it end in the bytes of the run that was not killed?

    python bench/kills.py [--propagate block|layer] [--kills 20] [--out bench/results/kills.json]

Each attempt is a process of its own, killed at a moment drawn evenly from the time of an undisturbed run (a moment
after its end is drawn again, one between the last rename and the end of the tidy-up is not), then resumed in a new
process to its end. All weights and their index are compared byte for byte. Exit code 1 when any differs. The result
holds both ways side by side; a run replaces its own way only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from facts import facts, save, spread
from options import positive
from shapes import make_llama, write_text
from wanda.checkpoint.writer import partial_folder
from wanda.pipeline import prune

_MAKING = ("journal.jsonl", "lock", "replaced")  # removed from DIR after the rename (docs/design.md, Faults, step 4)
_PRELOADED = ["wanda.pipeline", "transformers.models.llama.modeling_llama"]  # imports are not what is to be killed


def work(source: Path, out: Path, threads: int, options: Mapping[str, Any]) -> None:
    """A run, or the rest of one; what the killed process does."""
    torch.set_num_threads(threads)
    prune(source, out=out, resume=True, progress=False, **options)


class Runs:
    """Runs of one recipe on one checkpoint, each in a process of its own."""

    def __init__(self, source: Path, options: Mapping[str, Any]):
        self.source, self.options = source, options
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOADED)

    def start(self, out: Path) -> ForkServerProcess:
        arguments = (self.source, out, torch.get_num_threads(), self.options)
        process = self.context.Process(target=work, args=arguments)
        process.start()
        return process

    def finish(self, out: Path) -> float:
        """Run, or resume, to the end; returns seconds."""
        start = time.perf_counter()
        process = self.start(out)
        process.join()
        if process.exitcode:
            sys.exit(f"the run into {out} ended with exit code {process.exitcode}; its message is above")
        return time.perf_counter() - start


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the weights and their index."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors*"))}


def left(out: Path) -> list[str]:
    """What only the making of `out` needed and is still in it: the run was killed between rename and end."""
    return [name for name in _MAKING if (out / name).exists()]


def state(out: Path, blocks: int) -> dict[str, Any]:
    """How far a killed run had come: blocks journaled, whether it was in the middle of writing a file, and what it had
    not tidied up after the rename, when all `blocks` are done whether or not the journal is still there."""
    if out.exists():
        return {"begun": True, "blocks": blocks, "in_a_write": False, "renamed_but_left": left(out)}
    folder = partial_folder(out)
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {
        "begun": bool(whole),
        "blocks": sum("block" in line for line in whole),
        "in_a_write": any(folder.glob("*.tmp")),
        "renamed_but_left": [],
    }


def main() -> None:
    here = Path(__file__)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here.with_suffix(".toml"))
    parser.add_argument("--propagate", choices=("block", "layer"), help="one way only")
    parser.add_argument("--kills", type=positive, help="in each way, instead of the config's number")
    parser.add_argument("--out", type=Path, default=here.parent / "results" / "kills.json")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; the system's temporary folder")
    arguments = parser.parse_args()
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    config["kills"] = arguments.kills or config["kills"]
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for propagate in (arguments.propagate,) if arguments.propagate else ("block", "layer"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            result[propagate] = measure(Path(folder), propagate, config)
        save(arguments.out, result)
    sys.exit(any(not row["identical"] for way in result.values() for row in way["kills"]))


def measure(folder: Path, propagate: str, config: dict[str, Any]) -> dict[str, Any]:
    """The result of one way."""
    found = facts()
    source = make_llama(folder / "dense", config["shape"])
    text = write_text(folder / "text.txt", config["samples"] * config["seqlen"])
    named = {name: config[name] for name in ("samples", "seqlen", "dtype")}
    runs = Runs(source, named | {"calibration": text, "propagate": propagate})
    runs.finish(folder / "warm")  # the server starts
    whole = runs.finish(folder / "whole")
    expected = digests(folder / "whole")
    draw = random.Random(config["seed"])
    rows: list[dict[str, Any]] = []
    ended = 0
    while len(rows) < config["kills"]:
        out = folder / "out"
        after = draw.uniform(0, whole)
        process = runs.start(out)
        process.join(timeout=after)
        process.kill()
        process.join()
        if process.exitcode and process.exitcode > 0:
            sys.exit(f"a run ended with exit code {process.exitcode}; its message is above")
        if out.exists() and not left(out):  # it was faster than the undisturbed run: nothing is left to resume
            ended += 1
        else:
            row = {"after_seconds": round(after, 3), **state(out, config["shape"]["num_hidden_layers"])}
            row["resumed_seconds"] = round(runs.finish(out), 3)
            row["identical"] = digests(out) == expected and not partial_folder(out).exists() and not left(out)
            rows.append(row)
            print(f"{propagate} {len(rows)}/{config['kills']}: {json.dumps(row)}", flush=True)
        shutil.rmtree(out)
    return {
        **found,
        "config": config,
        "undisturbed_seconds": round(whole, 3),
        "moments_drawn_again": ended,
        "identical": sum(row["identical"] for row in rows),
        "blocks_done_when_killed": spread([row["blocks"] for row in rows]),
        "killed_in_a_write": sum(row["in_a_write"] for row in rows),
        "killed_in_the_tidy_up": sum(bool(row["renamed_but_left"]) for row in rows),
        "kills": rows,
    }


if __name__ == "__main__":
    main()
