"""Zero-shot accuracy of a dense model and of what pruning methods leave of it, from local copies of the task sets.

    python bench/tasks.py --model DIR --data FOLDER --calibration SOURCE --work DIR [--config bench/tasks.toml]
                          [--limit N] [--out bench/results/tasks.json]

Results: a JSON file and a table in Markdown beside it, with standard errors. Finished folders in --work are used again;
those of another model, calibration or config are refused.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kept import kept, note
from options import positive
from wanda import prune
from wanda.checkpoint.source import load_model, load_tokenizer
from wanda.evaluation.tasks import load_tasks, mean_of_paper
from wanda.report import versions


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here / "tasks.toml")
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the local task sets (docs/evaluation.md)")
    parser.add_argument("--calibration", required=True, help="calibration text (SOURCE)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the pruned models")
    parser.add_argument("--limit", type=positive, help="instead of the config's")
    parser.add_argument("--out", type=Path, default=here / "results" / "tasks.json")
    arguments = parser.parse_args()
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    if arguments.limit is not None:
        config["limit"] = arguments.limit
    suite = load_tasks(config["tasks"], data=arguments.data)
    folders = {"dense": arguments.model}
    for name, options in config["methods"].items():
        folders[name] = arguments.work / name
        made_from = {"model": str(arguments.model.resolve()), "calibration": arguments.calibration}
        made_from |= {"options": options | config["prune"]}
        if not kept(folders[name], made_from):
            note(folders[name], made_from)
            prune(arguments.model, out=folders[name], calibration=arguments.calibration, **options, **config["prune"])
    rows: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        start = time.perf_counter()
        model = load_model(folder, config["dtype"], "cpu")
        scores = suite.run(
            model,
            load_tokenizer(folder),
            config["limit"],
            config["batch"],
            partial(print, name, flush=True),
        )
        rows[name] = {
            "scores": [vars(score) for score in scores],
            "mean_of_paper": mean_of_paper(scores),
            "seconds": round(time.perf_counter() - start, 1),
        }
        write(arguments, config, rows)


def write(arguments: argparse.Namespace, config: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """The results so far: JSON, and a table beside it. Folders of the machine are named by their last part only."""
    facts = {
        "model": arguments.model.name,
        "calibration": Path(arguments.calibration).name,
        "config": config,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    first = next(iter(rows.values()))["scores"]
    lines = [
        f"Accuracy ± standard error in percent, the first {config['limit']} records of every task, zero-shot.",
        "",
        f"| model | {' | '.join(score['task'] for score in first)} | mean |",
        f"|---|{'---:|' * (len(first) + 1)}",
    ]
    for name, row in rows.items():
        cells = [f"{100 * s['value']:.1f} ± {100 * s['error']:.1f}" for s in row["scores"]]
        mean = "" if row["mean_of_paper"] is None else f"{100 * row['mean_of_paper']:.1f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} |")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
