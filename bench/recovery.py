"""What tuning gives back to a pruned model, and what each way of merging an adapter costs.

    python bench/recovery.py --model DIR --train SOURCE --text FILE --work DIR [--config bench/recovery.toml]
                             [--minutes M] [--steps N] [--windows W] [--out bench/results/recovery.json]

For every pattern of the config: the model is pruned, a plain and a sparse-aware adapter and all surviving weights are
trained on --train for the same number of steps, and perplexity on --text is measured for the pruned model, the adapter
unmerged, merged without and under the masks, the sparse-aware one merged, and full tuning. Finished folders in --work
are used again; those of another model, text or config are refused. Results: a JSON file, a table in Markdown and the
learning curves beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kept import kept, note
from options import positive
from wanda import prune
from wanda.checkpoint.source import load_model
from wanda.evaluation.perplexity import perplexity
from wanda.recovery.lora import load_adapter
from wanda.recovery.masks import read_masks
from wanda.recovery.merge import merge
from wanda.recovery.tune import tune
from wanda.report import versions


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here / "recovery.toml")
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--train", required=True, help="training and calibration text (SOURCE)")
    parser.add_argument("--text", required=True, help="text for perplexity (SOURCE), the WikiText-2 test set as a file")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--minutes", type=float, help="instead of the config's")
    parser.add_argument("--steps", type=positive, help="instead of the config's")
    parser.add_argument("--windows", type=positive, help="measure the first so many windows only")
    parser.add_argument("--out", type=Path, default=here / "results" / "recovery.json")
    arguments = parser.parse_args()
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"--minutes {arguments.minutes} leaves no time to tune; give more than 0")
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    for name in ("minutes", "steps"):
        if getattr(arguments, name) is not None:
            config["tune"][name] = getattr(arguments, name)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measured(arguments, config):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(arguments.out, rows, config, arguments)


def measured(arguments: argparse.Namespace, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per model: what it is, its perplexity, the share of zeros in the pruned matrices, what tuning reported."""
    options = {"seqlen": config["perplexity"]["seqlen"], "windows": arguments.windows, "device": "cpu"}

    def row(pattern: str, name: str, folder: Path, adapter: Path | None = None, tuning: Any = None) -> dict[str, Any]:
        model = load_model(folder, "float32", "cpu")
        # The share is taken over the matrices that were pruned, whatever has become of them.
        names = read_masks(load_model(pruned, "float32", "cpu"), pruned).parameters if pattern else {}
        weights = dict(model.named_parameters())
        zeros = sum(int((weights[name] == 0).sum()) for name in names)
        count = sum(weights[name].numel() for name in names)
        measured_model = model if adapter is None else load_adapter(model, adapter)
        found = perplexity(measured_model, arguments.text, tokenizer=tokenizer(folder), **options)
        return {
            "pattern": pattern,
            "model": name,
            "perplexity": round(found.perplexity, 4),
            "zeros": zeros,
            "weights": count,
            "tuning": tuning
            and {key: tuning[key] for key in ("steps", "seconds", "held_out_loss", "stopped", "history")},
        }

    yield row("", "dense", arguments.model)
    for pattern in config["patterns"]:
        work = arguments.work / pattern.replace(":", "-")
        pruned = work / "pruned"
        target = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
        made_from = {"model": str(arguments.model.resolve()), "calibration": arguments.train}
        made_from |= {"prune": target | config["prune"]}
        if not kept(pruned, made_from):
            note(pruned, made_from)
            prune(arguments.model, out=pruned, calibration=arguments.train, **target, **config["prune"])
        yield row(pattern, "pruned", pruned)
        for name, sparse_aware in (("adapter", False), ("sparse-aware adapter", True)):
            adapter = work / name.replace(" ", "-")
            lora = config["lora"] | {"lora": True, "sparse_aware": sparse_aware}
            tuning, adapted = tuned(pruned, made_from, adapter, arguments, config["tune"] | lora)
            if not sparse_aware:
                yield row(pattern, "adapter unmerged (dense in effect)", pruned, adapter, tuning)
                dense_again = merged(pruned, adapter, adapted, work, False)
                yield row(pattern, "adapter merged without the masks (dense again)", dense_again)
            title = "sparse-aware adapter merged under the masks" if sparse_aware else "adapter merged under the masks"
            masked = merged(pruned, adapter, adapted, work, True)
            yield row(pattern, title, masked, tuning=tuning if sparse_aware else None)
        full = config["tune"] | config["full"] | {"full": True}
        tuning, _ = tuned(pruned, made_from, work / "full", arguments, full)
        yield row(pattern, "full tuning", work / "full", tuning=tuning)
        for name in ("adapter", "sparse-aware-adapter", "full"):
            curve = arguments.out.with_name(f"{arguments.out.stem}-{pattern.replace(':', '-')}-{name}.png")
            shutil.copyfile(work / name / "learning-curve.png", curve)


def tokenizer(folder: Path) -> Any:
    from wanda.checkpoint.source import load_tokenizer

    return load_tokenizer(folder)


def tuned(
    pruned: Path, pruned_from: dict[str, Any], out: Path, arguments: argparse.Namespace, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tune `pruned` into `out`, unless it is there: what tuning reported, and what `out` was made from."""
    made_from = {"pruned": pruned_from, "train": arguments.train, "tune": options}
    if not kept(out, made_from):
        note(out, made_from)
        tune(pruned, out=out, calibration=arguments.train, resume=True, **options)
    return json.loads((out / "wanda.json").read_text(encoding="utf-8"))["tune"], made_from


def merged(pruned: Path, adapter: Path, adapter_from: dict[str, Any], work: Path, mask: bool) -> Path:
    out = work / f"{adapter.name}-{'masked' if mask else 'unmasked'}"
    made_from = {"adapter": adapter_from, "mask": mask}
    if not kept(out, made_from):
        note(out, made_from)
        merge(pruned, adapter, out=out, mask=mask)
    return out


def write(out: Path, rows: list[dict[str, Any]], config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The results so far: JSON, and a table beside it. Folders of the machine are named by their last part only."""
    facts = {
        "model": arguments.model.name,
        "train": Path(arguments.train).name,
        "text": Path(arguments.text).name,
        "windows": arguments.windows,
        "config": config,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"Perplexity: {facts['text']}, {config['perplexity']['seqlen']} tokens a window; trained on {facts['train']}.",
        "",
        "| pattern | model | perplexity | zeros in the pruned matrices | steps | minutes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = f"{row['zeros'] / row['weights']:.4%}" if row["weights"] else ""
        tuning = row["tuning"] or {}
        minutes = f"{tuning['seconds'] / 60:.1f}" if tuning else ""
        cells = [row["pattern"], row["model"], f"{row['perplexity']:.2f}", share, str(tuning.get("steps", "")), minutes]
        lines.append(f"| {' | '.join(cells)} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
