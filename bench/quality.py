"""Perplexity of SmolLM2-135M-Instruct, dense and pruned in every way of a study of bench/quality.json.

    python bench/quality.py --calibration FILE --text FILE [--study paper|methods|price|seeds] [--windows N]
                            [--packed] [--config bench/quality.json] [--model DIR] [--out DIR]

paper: magnitude and Wanda, unstructured and N:M, the variant, one and two passes. methods: the whole family (OWL cannot
vary N:M). price: seconds and memory of every method at 50%, to be run alone on a machine. seeds: the full text, three
calibration samples. Results: bench/results/quality-STUDY (results.json, .csv, .md, plots); a run that was stopped goes
on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from options import positive
from wanda import compare
from wanda.demo import model_folder
from wanda.evaluation.grid import Grid, Setting, options_of
from wanda.report.comparison import print_comparison


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="calibration text (SOURCE)")
    parser.add_argument("--text", required=True, help="text that perplexity is measured on (SOURCE)")
    parser.add_argument("--study", default="paper", help="a study of the config")
    parser.add_argument("--windows", type=positive, help="measure on so many windows instead of the study's number")
    parser.add_argument("--samples", type=positive, help="calibration sequences, instead of the config's number")
    parser.add_argument("--packed", action="store_true", help="measure packed models")
    parser.add_argument("--config", type=Path, default=here / "quality.json")
    parser.add_argument("--model", type=Path, help="another model than the demo's")
    parser.add_argument("--out", type=Path, help="another folder than bench/results/quality-STUDY")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    if arguments.study not in config["studies"]:
        parser.error(f"{arguments.config} has no study {arguments.study}; it has {', '.join(config['studies'])}")
    study = config["studies"][arguments.study]
    samples = config["samples"] if arguments.samples is None else [arguments.samples]
    shared = config["setting"] | {"calibration": arguments.calibration, "text": arguments.text}
    result = compare(
        arguments.model or model_folder(),
        out=arguments.out or here / "results" / f"quality-{arguments.study}",
        grids=[options_of(Grid, grid | {"samples": samples}) for grid in study["grids"]],
        setting=options_of(
            Setting, shared | {"windows": arguments.windows or study["windows"], "packed": arguments.packed}
        ),
        title=arguments.model.name if arguments.model else "SmolLM2-135M-Instruct",
    )
    print_comparison(result)


if __name__ == "__main__":
    main()
