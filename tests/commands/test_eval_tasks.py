"""`wanda eval --tasks` end to end: a tiny model, dense, pruned and packed, on local task files made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from byhand import prune_by_hand
from wanda.checkpoint.packed import pack
from wanda.cli import main

pytest.importorskip("lm_eval")

WORDS = ("fox", "dog", "item", "weight", "input", "sequence")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `wanda eval ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def jsonl(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's seven sets, six records each, in the local formats."""
    folder = tmp_path_factory.mktemp("data")
    numbers = range(6)
    queries = [f"Passage: the {WORDS[i]} sleeps.\nQuestion: does the {WORDS[-i]} sleep?" for i in numbers]
    jsonl(folder / "boolq/boolq_dev.jsonl", [{"query": queries[i], "gold": i % 2} for i in numbers])
    (folder / "rte").mkdir()
    rows = [f"The {WORDS[i]} is quick.\tThe {WORDS[-i]} is quick.\t{i % 2}\t{i}" for i in numbers]
    (folder / "rte/rte_dev.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel\tidx", *rows]), encoding="utf-8")
    endings = ["jumps.", "sleeps on.", "may go.", "is small."]
    jsonl(
        folder / "hellaswag/hellaswag_val_1000.jsonl",
        [
            {"activity_label": "Day", "ctx_a": f"A {w} ran.", "ctx_b": f"the {w}", "endings": endings, "label": i % 4}
            for i, w in enumerate(WORDS)
        ],
    )
    jsonl(
        folder / "winogrande/winogrande_dev.jsonl",
        [
            {"sentence": "The dog saw the fox, so _ ran.", "option1": w, "option2": "Bea", "answer": str(i % 2 + 1)}
            for i, w in enumerate(WORDS)
        ],
    )
    choices = [{"question": f"What is the {w}?", "choices": endings, "gold": i % 4} for i, w in enumerate(WORDS)]
    jsonl(folder / "arc-easy/arc_easy_test.jsonl", choices)
    jsonl(folder / "arc-challenge/arc_challenge_test.jsonl", choices)
    jsonl(folder / "openbookqa/openbookqa_test.jsonl", [{**c, "query": c["question"]} for c in choices])
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A task file of one's own, which takes examples from a part that is not scored."""
    folder = tmp_path / "own"
    for split in ("train", "test"):
        jsonl(folder / f"{split}.jsonl", [{"q": f"{split} {w}", "label": i % 2} for i, w in enumerate(WORDS)])
    files = ", ".join(f"{split}: {folder / f'{split}.jsonl'}" for split in ("train", "test"))
    (folder / "parity.yaml").write_text(
        f"""task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{{files}}}, cache_dir: {tmp_path / "cache"}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{q}}}} is"
doc_to_target: label
doc_to_choice: ["even", "odd"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
        encoding="utf-8",
    )
    return folder


def test_dense_pruned_and_packed_side_by_side_on_the_papers_seven(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path, data: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    pruned = prune_by_hand(tiny, tmp_path / "pruned")
    pack(str(pruned), tmp_path / "packed")
    models = [tiny, pruned, tmp_path / "packed"]
    code, out, err = run(capsys, *models, "--tasks", "paper", "--data", data)
    assert code == 0, err
    (mean_line,) = [line for line in out.splitlines() if "mean of the paper's seven" in line]
    reports = [json.loads((folder / "wanda.json").read_text())["evaluation"]["tasks"] for folder in models[1:]]
    assert not (tiny / "wanda.json").exists()
    for report in reports:
        assert len(report) == 8 and all(name.endswith("0-shot") for name in report)
        mean = report["mean of the paper's seven, 0-shot"]["value"]
        values = [entry["value"] for name, entry in report.items() if "seven" not in name]
        assert mean == pytest.approx(sum(values) / 7) and f"{mean:.2%}" in mean_line
        assert all(entry["samples"] == 6 for name, entry in report.items() if "seven" not in name)
    # Packed weights are the same weights: the same answers, up to the order of sums.
    assert [entry["value"] for entry in reports[1].values()] == [entry["value"] for entry in reports[0].values()]
    card = (pruned / "README.md").read_text()
    assert "| tasks | mean of the paper's seven, 0-shot | " in card and card.count("| tasks | ") == 8
    code, out, _ = run(capsys, tmp_path / "packed", "--tasks", "paper", "--data", data, "--json")
    (result,) = json.loads(out.splitlines()[-1])["results"]
    assert code == 0 and result["mean_of_paper"] == pytest.approx(mean)
    assert [(score["task"], score["fewshot"]) for score in result["tasks"]][:2] == [("boolq", 0), ("rte", 0)]


def test_a_group_without_a_sum_is_its_tasks_and_a_perplexity_no_percentage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, own: Path
) -> None:
    (own / "pair.yaml").write_text("group: pair\ntask: [parity, reading]\n", encoding="utf-8")
    (own / "reading.yaml").write_text(
        (own / "parity.yaml").read_text(encoding="utf-8").partition("output_type")[0].replace("parity", "reading")
        + """output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("COLUMNS", "200")
    options = [tiny, "--tasks", "pair", "--include-path", own, "--data", own]
    code, out, err = run(capsys, *options, "--json")
    assert code == 0, err
    scores = {score["task"]: score for score in json.loads(out.splitlines()[-1])["results"][0]["tasks"]}
    assert {name: score["metric"] for name, score in scores.items()} == {"parity": "acc", "reading": "word_perplexity"}
    code, out, err = run(capsys, *options)
    rows = {line.split()[1]: line for line in out.splitlines() if "parity" in line or "reading" in line}
    assert code == 0 and f" {scores['parity']['value']:.2%} " in rows["parity"]
    assert f"word_perplexity {scores['reading']['value']:.4g}" in rows["reading"] and "%" not in rows["reading"]


def test_results_of_other_examples_and_limits_stay_side_by_side(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, own: Path
) -> None:
    pruned = prune_by_hand(tiny, tmp_path / "pruned")
    options = [pruned, "--tasks", "parity", "--include-path", own, "--data", own]
    for more in ([], ["--limit", 4], ["--fewshot", 2], ["--fewshot", 2, "--limit", 4], ["--limit", 4]):
        code, _, err = run(capsys, *options, *more)
        assert code == 0, err
    report = json.loads((pruned / "wanda.json").read_text())
    kept = report["evaluation"]["tasks"]
    assert {name: (entry["fewshot"], entry["limit"], entry["samples"]) for name, entry in kept.items()} == {
        "parity, 0-shot": (0, None, 6),
        "parity, 0-shot, limit 4": (0, 4, 4),
        "parity, 2-shot": (2, None, 6),
        "parity, 2-shot, limit 4": (2, 4, 4),
    }
    card = (pruned / "README.md").read_text()
    assert all(f"| tasks | {name} | " in card for name in kept) and card.count("## Evaluation") == 1
    assert len(report["layers"]) == 28


def test_ctrl_c_between_tasks_keeps_those_that_were_scored(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path, data: Path
) -> None:
    import lm_eval.evaluator

    original, asked = lm_eval.evaluator.evaluate, []

    def evaluate(model: Any, loaded: Any, **options: Any) -> Any:
        asked.extend(loaded["tasks"])
        if asked == ["boolq", "rte", "boolq", "rte"]:
            raise KeyboardInterrupt
        return original(model, loaded, **options)

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", evaluate)
    monkeypatch.setenv("COLUMNS", "400")
    pruned = prune_by_hand(tiny, tmp_path / "pruned")
    code, out, err = run(capsys, tiny, pruned, "--tasks", "boolq,rte", "--data", data)
    assert code == 130 and "wanda: stopped" in err
    rows = {line.split()[1]: line.split()[3:-1:2] for line in out.splitlines() if "boolq" in line or "rte" in line}
    kept = json.loads((pruned / "wanda.json").read_text())["evaluation"]["tasks"]
    assert list(kept) == ["boolq, 0-shot"] and f"{kept['boolq, 0-shot']['value']:.2%}" in rows["boolq"]
    assert rows["rte"][-1] == "-" and rows["rte"][0].endswith("%")


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("lm_eval", "tasks", ["eval", "MODEL", "--tasks", "boolq"]),
        ("peft", "tune", ["tune", "MODEL", "--out", "OUT", "--lora", "--calibration", "builtin"]),
        ("accelerate", "tune", ["tune", "MODEL", "--out", "OUT", "--full", "--calibration", "builtin"]),
        ("peft", "tune", ["merge", "MODEL", "ADAPTER", "--out", "OUT"]),
    ],
)
def test_a_missing_extra_fails_with_its_install_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    tmp_path: Path,
    package: str,
    extra: str,
    arguments: list[str],
) -> None:
    pruned = prune_by_hand(tiny, tmp_path / "pruned")
    monkeypatch.setitem(sys.modules, package, None)
    names = {"MODEL": str(pruned), "OUT": str(tmp_path / "out"), "ADAPTER": str(tmp_path / "adapter")}
    with pytest.raises(SystemExit) as stop:
        main([names.get(argument, argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"pip install 'wanda-prune[{extra}]'" in error
    assert f"needs the package {package.replace('_', '-')}" in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
