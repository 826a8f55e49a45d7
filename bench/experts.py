"""A small mixture of experts, trained here, pruned by several methods, and what pruning it costs beside a forward pass.

    python bench/experts.py [train] [quality] [speed] [--steps N] [--samples N] [--rounds N] [--folder DIR] [--out FILE]

train: a byte-level BPE and a Mixtral of the config's shape, from scratch, on the calibration part of `builtin` (the
    language reference that Python carries) and the docstrings of its standard library. The model stays in the cache
    folder, `bench-experts`; the other parts train it when it is not there, and refuse one of another config.
quality: perplexity on the part of `builtin` that neither training nor calibration sees: dense, and pruned by every
    method of the config, unstructured and N:M; `wanda all` is wanda with --experts all.
speed: the whole call of wanda.prune (layer) over one bare forward pass of the same blocks and tokens, in alternating
    rounds, as bench/prune_speed.py takes them; ratios are taken within a round.
Parts that are not named keep what the result file says of them.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import shutil
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from facts import facts, save, spread, spread_text
from kept import kept, note
from options import positive
from prune_speed import bare_forward, wanda_seconds
from wanda.calibration import encode
from wanda.checkpoint.source import cache_folder
from wanda.evaluation.perplexity import perplexity
from wanda.pipeline import prune
from wanda.plan import Plan
from wanda.sources import read

PARTS = ("train", "quality", "speed")


def main() -> None:
    here = Path(__file__)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="what to do; everything when nothing is said")
    parser.add_argument("--config", type=Path, default=here.with_suffix(".toml"))
    parser.add_argument("--steps", type=positive, help="of training, instead of the config's number")
    parser.add_argument("--samples", type=positive, help="calibration sequences, instead of the config's numbers")
    parser.add_argument("--rounds", type=positive, help="of the speed part, instead of the config's number")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "bench-experts", help="of the trained model")
    parser.add_argument("--out", type=Path, default=here.parent / "results" / "experts.json")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.rounds and "speed" not in parts:
        parser.error("--rounds is of the part speed; name that part too, or leave --rounds out")
    if arguments.samples and not {"quality", "speed"} & set(parts):
        parser.error("--samples is of the parts quality and speed; name one of them too, or leave --samples out")
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    config["train"]["steps"] = arguments.steps or config["train"]["steps"]
    config["speed"]["rounds"] = arguments.rounds or config["speed"]["rounds"]
    for part in ("quality", "speed"):
        config[part]["samples"] = arguments.samples or config[part]["samples"]
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    model = arguments.folder / "model"
    if "train" in parts or not kept(model, made_from(config)):
        result["train"] = train(model, config)
    for part, measure in (("quality", quality), ("speed", speed)):
        if part in parts:
            result[part] = measure(model, config)
    save(arguments.out, result)
    arguments.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def made_from(config: dict[str, Any]) -> dict[str, Any]:
    """What of the config the trained model depends on."""
    return {name: config[name] for name in ("shape", "train", "tokenizer", "seqlen", "dtype", "seed")}


def train(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Train the tokenizer and the model into `folder`: what was trained on, and the loss on the way."""
    settings, seqlen = config["train"], config["seqlen"]
    torch.manual_seed(config["seed"])
    reference = read("builtin", "calibration").joined()
    documents = [reference, *docstrings(settings["documents"], config["seed"])]
    tokenizer = byte_pairs(documents, config["tokenizer"]["vocab_size"])
    ids = torch.tensor(encode(tokenizer, "\n\n".join(documents)), dtype=torch.int64)
    shape = config["shape"] | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    options = MixtralConfig(
        **shape, pad_token_id=None, router_aux_loss_coef=settings["balance"], output_router_logits=True
    )
    model = MixtralForCausalLM(options).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    log(f"training {sum(p.numel() for p in model.parameters()):,} weights on {len(ids):,} tokens")
    start, losses = time.perf_counter(), []
    for step, batch in zip(range(settings["steps"]), batches(ids, settings["batch"], seqlen), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 10 == 0:
            log(f"step {step + 1}: loss {sum(losses[-10:]) / 10:.3f}, {time.perf_counter() - start:.0f} s")
    model.config.output_router_logits = False
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(getattr(torch, config["dtype"])).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    note(folder, made_from(config))
    partial.rename(folder)
    return {
        **facts(),
        "config": made_from(config),
        "weights": sum(p.numel() for p in model.parameters()),
        "tokens_of_text": len(ids),
        "seconds": round(time.perf_counter() - start),
        "loss": {step: round(sum(losses[step - 10 : step]) / 10, 3) for step in range(50, len(losses) + 1, 50)},
    }


def docstrings(share: float, seed: int) -> list[str]:
    """Docstrings of the standard library longer than 200 characters, in random order, each once."""
    found: set[str] = set()
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # files that are there to be refused
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) > 200:
                    found.add(text)
    chosen = sorted(found)
    random.Random(seed).shuffle(chosen)
    return chosen[: round(share * len(chosen))]


def byte_pairs(documents: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def batches(ids: Tensor, batch: int, seqlen: int) -> Iterator[Tensor]:
    """Random crops of the text [batch, seqlen], without end."""
    while True:
        starts = torch.randint(0, len(ids) - seqlen, (batch,))
        yield torch.stack([ids[start : start + seqlen] for start in starts])


def rate(step: int, settings: dict[str, Any]) -> float:
    """The learning rate's factor: a linear rise, then a cosine down to a tenth."""
    if step < settings["warmup"]:
        return (step + 1) / settings["warmup"]
    done = (step - settings["warmup"]) / max(1, settings["steps"] - settings["warmup"])
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def quality(model: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Perplexity on the held-out text of the dense model and of every method, pattern by pattern."""
    settings, seqlen = config["quality"], config["seqlen"]
    shared = {"samples": settings["samples"], "seqlen": seqlen, "seed": config["seed"], "dtype": config["dtype"]}
    rows: list[dict[str, Any]] = []
    measured = perplexity(model, seqlen=seqlen, dtype=config["dtype"])
    rows.append({"method": "dense", "pattern": "", "perplexity": measured.perplexity})
    log(f"dense: {measured.perplexity:.3f} on {measured.windows} x {seqlen} tokens of {measured.text}")
    targets = [{"sparsity": s} for s in settings["sparsities"]] + [{"pattern": p} for p in settings["patterns"]]
    with tempfile.TemporaryDirectory() as temporary:
        for target in targets:
            for name in settings["methods"]:
                method, _, experts = name.partition(" ")
                out = Path(temporary) / "out"
                options = shared | target | {"method": method, "experts": experts or "routed"}
                report: Any = prune(model, out=out, overwrite=True, calibration="builtin", progress=False, **options)
                few = [row["name"] for row in report.layers if any("per row" in note for note in row["notes"])]
                rows.append(
                    {
                        "method": name,
                        "pattern": target.get("pattern") or f"{target['sparsity']:.0%}",
                        "perplexity": perplexity(out, seqlen=seqlen, dtype=config["dtype"]).perplexity,
                        "sparsity": report.as_dict()["totals"]["sparsity"],
                        "seconds": report.seconds,
                        "pruned_by_magnitude_for_want_of_tokens": few,
                    }
                )
                log(f"{rows[-1]['pattern']} {name}: {rows[-1]['perplexity']:.3f}")
    text = {"text": measured.text, "windows": measured.windows, "seqlen": seqlen}
    return {**facts(), "config": settings, "held_out": text, "rows": rows}


def speed(model: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one bare forward pass and of pruning, and their ratio round by round."""
    settings = config["speed"]
    options = {"samples": settings["samples"], "seqlen": config["seqlen"], "seed": config["seed"]}
    options |= {"dtype": config["dtype"], "sparsity": settings["sparsity"], "calibration": "builtin"}
    options |= {"progress": False, "propagate": "layer"}
    found = facts()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        plan = prune(model, out=out, dry_run=True, **options)
        assert isinstance(plan, Plan)
        ids, _ = plan.calibration_tokens()
        assert ids is not None
        bare = bare_forward(plan, ids)
        wanda_seconds(model, out, options | {"samples": 2})  # imports and first calls are nobody's
        taken: dict[str, list[float]] = {"bare": [], "wanda": []}
        for number in range(settings["rounds"]):
            for name in list(taken)[:: -1 if number % 2 else 1]:
                taken[name].append(bare() if name == "bare" else wanda_seconds(model, out, options))
                log(f"round {number + 1}, {name}: {taken[name][-1]:.2f} s")
    ratios = [wanda / bare for wanda, bare in zip(taken["wanda"], taken["bare"], strict=True)]
    log(f"wanda / bare: {spread_text(spread(ratios))}")
    return {
        **found,
        "tokens": list(ids.shape),
        "micro_batch": plan.batch,
        "config": settings,
        "seconds": {name: spread(values) for name, values in taken.items()},
        "rounds": {name: [round(value, 3) for value in values] for name, values in taken.items()},
        "ratio": spread(ratios),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    parts = []
    if "train" in result:
        trained = result["train"]
        shape, steps = trained["config"]["shape"], trained["config"]["train"]["steps"]
        parts.append(
            f"A Mixtral of {shape['num_hidden_layers']} layers, width {shape['hidden_size']}, "
            f"{shape['num_local_experts']} experts of which {shape['num_experts_per_tok']} are used "
            f"({trained['weights'] / 1e6:.1f} million weights), trained for {steps} steps "
            f"({trained['seconds'] / 60:.0f} minutes)."
        )
    if "quality" in result:
        held, rows = result["quality"]["held_out"], result["quality"]["rows"]
        patterns = list(dict.fromkeys(row["pattern"] for row in rows if row["pattern"]))
        parts.append(
            f"Perplexity on {held['windows']} x {held['seqlen']} tokens of {held['text']}; calibration: "
            f"{result['quality']['config']['samples']} x {held['seqlen']} tokens of the other part."
        )
        lines = [f"| method | {' | '.join(patterns)} |", f"|---|{'---:|' * len(patterns)}"]
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = {row["pattern"]: f"{row['perplexity']:.2f}" for row in rows if row["method"] == method}
            lines.append(f"| {method} | {' | '.join(mine.get(p, mine.get('', '')) for p in patterns)} |")
        parts.append("\n".join(lines))
    if "speed" in result:
        found = result["speed"]
        bare, wanda = (spread_text(found["seconds"][name]) for name in ("bare", "wanda"))
        rounds = len(found["rounds"]["bare"])
        parts.append(
            f"{' x '.join(map(str, found['tokens']))} tokens, {found['threads']} threads, {found['machine']}, load "
            f"average {found['load_average_at_start'][0]} at the start: bare forward {bare} s, wanda `layer` {wanda} s,"
            f" wanda over bare {spread_text(found['ratio'])} (median, min-max of {rounds} rounds)."
        )
    return "\n\n".join(parts) + "\n"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
