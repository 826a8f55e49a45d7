"""The model card that lands beside a pruned checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path

from wanda.report import Report


def model_card(report: Report, paper: str) -> str:
    """README.md of a pruned model: base model, method and paper, recipe, calibration, sparsity per block, command.

    paper: the method in one line, with its paper.
    """
    recipe = report.recipe
    blocks: dict[int, list[dict]] = {}
    for row in report.layers:
        blocks.setdefault(row["block"], []).append(row)
    lines = [
        "---",
        *([f"base_model: {report.model}"] if _is_hub_id(report.model) else []),
        "tags:",
        "- pruned",
        "- sparse",
        "---",
        f"# {report.model.rstrip('/').rpartition('/')[2]}, {report.sparsity:.1%} sparse",
        "",
        f"{report.removed:,} of the {report.weights:,} weights of its blocks were removed without retraining",
        f"from `{report.model}`. It loads with `{report.loaded_by}` like any other checkpoint.",
        "",
        f"- Method: `{recipe['method']}`: {paper}",
        f"- Axes: score `{recipe['score']}`, {_competes(recipe)}, update `{recipe['update']}`, "
        f"allocation `{recipe['allocation']}`, propagate `{recipe['propagate']}`"
        + (f", inherit `{recipe['inherit']}`" if recipe["inherit"] else ""),
        f"- Calibration: {_calibration(report)}",
        f"- Share of zeros in the whole model: {report.removed / max(1, report.model_weights):.1%}",
        f"- Left dense in the blocks: {len(report.left_dense)} parameters"
        + (
            f" ({', '.join(sorted(report.left_dense)[:4])}{', ...' if len(report.left_dense) > 4 else ''})"
            if report.left_dense
            else ""
        ),
        "",
        "| block | matrices | sparsity | mean relative output error |",
        "|---:|---:|---:|---:|",
    ]
    for index, rows in sorted(blocks.items()):
        weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
        errors = [row["relative_error"] for row in rows if row["relative_error"] is not None]
        error = f"{sum(errors) / len(errors):.4f}" if errors else "not measured"
        lines.append(f"| {index} | {len(rows)} | {sum(r['removed'] for r in rows) / weights:.4f} | {error} |")
    notes = report.all_notes()
    if notes:
        lines += ["", "Notes:", *[f"- {note}" for note in notes]]
    if report.command:
        lines += ["", "Made by", "", "```", report.command, "```"]
    lines += ["", "The whole recipe and the report per layer are in `wanda.json`.", ""]
    return "\n".join(lines)


def _is_hub_id(model: str) -> bool:
    """Whether a model's name can only be one of the hub: such as it allows, and of nothing on this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return not Path(model).exists()


def _competes(recipe: dict) -> str:
    if recipe["pattern"]:
        return f"pattern `{recipe['pattern']}`"
    return "the variant's rows" if recipe["variant"] else f"group `{recipe['group']}`, sparsity `{recipe['sparsity']}`"


def _calibration(report: Report) -> str:
    used = report.calibration
    if not used.get("used"):
        return "none needed"
    if "image" in used:
        size = " x ".join(map(str, used["image"]))
        return f"{used['samples']} images ({size}) of `{used['source']}`, seed {used['seed']}"
    return f"{used['samples']} sequences of {used['seqlen']} tokens of `{used['source']}`, seed {used['seed']}"


def command_line(arguments: list[str]) -> str:
    """The command of a run as it can be pasted into a shell."""
    return shlex.join(["wanda", *arguments])
