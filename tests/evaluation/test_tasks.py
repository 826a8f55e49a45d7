"""The task files for local data ask a model exactly what the harness's own tasks ask, and score it alike."""

from __future__ import annotations

import bz2
import csv
import io
import json
import random
import zipfile
from pathlib import Path

import pytest

from wanda.errors import ConfigurationError

pytest.importorskip("lm_eval")

import datasets
from lm_eval.tasks import TaskManager

from wanda.checkpoint.source import load_model, load_tokenizer
from wanda.evaluation.local_tasks.local import capitalised
from wanda.evaluation.tasks import LOCAL_TASKS, PAPER, Score, load_tasks, mean_of_paper

# Records as the hub has them, and (in `local_copies`) the same ones as the local files have them. Spaces, digits as
# choices, brackets and capitals are where prompts usually come to differ.
BOOLQ = [
    {"passage": "Water -- It is\nwet. \nQuestion: what?", "question": "is water wet", "label": 1, "idx": 0},
    {"passage": "Fire is dry.", "question": "is fire wet", "label": 0, "idx": 1},
]
RTE = [
    {"sentence1": 'A "cat" sat.', "sentence2": "Something sat.", "label": 0, "idx": 0},
    {"sentence1": "A dog ran.", "sentence2": "A cat ran.", "label": 1, "idx": 1},
]
HELLASWAG = [
    {
        "ind": 1,
        "activity_label": "Roof removal",
        "ctx_a": "A man is on a roof.",
        "ctx_b": "he and Bob",
        "ctx": "A man is on a roof. he and Bob",
        "label": "3",
        "endings": [" sings.", "rips tiles [substeps] off.", "is  holding a cube.", "starts pulling [title] Up."],
        "source_id": "x",
        "split": "val",
        "split_type": "indomain",
    },
    {
        "ind": 2,
        "activity_label": "Food",
        "ctx_a": "[header] How to cook [title] Wash it. [step] Use water",
        "ctx_b": "",
        "ctx": "[header] How to cook [title] Wash it. [step] Use water",
        "label": "0",
        "endings": ["Dry it.", "Eat it. [title] Again", "3", "Sell it."],
        "source_id": "y",
        "split": "val",
        "split_type": "zeroshot",
    },
]
WINOGRANDE = [
    {"sentence": "Ann beat Bea so _ was glad.", "option1": "Ann", "option2": "Bea", "answer": "1"},
    {"sentence": "The cup fell off the table as _  was tilted.", "option1": "cup", "option2": "table", "answer": "2"},
]
ARC = [
    {"question": "How many?", "choices": {"text": ["1", "2", "3"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    {
        "question": 'Which one\'s "it"?',
        "choices": {"text": ["a'b", "c", "d", "e"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
]
OPENBOOKQA = [
    {
        "question_stem": "Fog is around",
        "choices": {"text": ["a marsh", "a desert", '"it"', "x"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    }
]
MMLU = {
    "dev": [
        {
            "question": f"Question, number {i}?\nMore ",
            "subject": "college_physics",
            "choices": [f"{i}", "b, c", 'd"e', "f"],
            "answer": i % 4,
        }
        for i in range(5)
    ],
    "test": [
        {"question": " What?", "subject": "college_physics", "choices": ["1", "2", "3", "4"], "answer": 2},
        {"question": "Why?", "subject": "college_physics", "choices": ["a", "b", "c", "d"], "answer": 0},
    ],
}
HUB = {
    "boolq": {"validation": BOOLQ, "train": BOOLQ},
    "rte": {"validation": RTE, "train": RTE},
    "hellaswag": {"validation": HELLASWAG, "train": HELLASWAG},
    "winogrande": {"validation": WINOGRANDE, "train": WINOGRANDE},
    "arc_easy": {"test": ARC, "validation": ARC, "train": ARC},
    "arc_challenge": {"test": ARC, "validation": ARC, "train": ARC},
    "openbookqa": {"test": OPENBOOKQA, "validation": OPENBOOKQA, "train": OPENBOOKQA},
    "mmlu_college_physics": MMLU,
}


def jsonl(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def local_copies(tmp_path: Path) -> Path:
    """The records above in the local files' formats."""
    jsonl(
        tmp_path / "boolq/boolq_dev.jsonl",
        [
            {
                "query": f"Passage: {r['passage']}\nQuestion: {r['question']}?",
                "choices": ["no", "yes"],
                "gold": r["label"],
            }
            for r in BOOLQ
        ],
    )
    (tmp_path / "rte").mkdir()
    rows = ["\t".join(str(r[key]) for key in RTE[0]) for r in RTE]
    (tmp_path / "rte/rte_dev.tsv").write_text("\n".join(["\t".join(RTE[0]), *rows]) + "\n", encoding="utf-8")
    jsonl(tmp_path / "hellaswag/hellaswag_val_1000.jsonl", [{**r, "label": int(r["label"])} for r in HELLASWAG])
    jsonl(tmp_path / "winogrande/winogrande_dev.jsonl", [{"qID": "q", **r} for r in WINOGRANDE])
    plain = [
        {
            "question": r["question"],
            "choices": r["choices"]["text"],
            "gold": r["choices"]["label"].index(r["answerKey"]),
        }
        for r in ARC
    ]
    jsonl(tmp_path / "arc-easy/arc_easy_test.jsonl", plain)
    jsonl(tmp_path / "arc-challenge/arc_challenge_test.jsonl", plain)
    jsonl(
        tmp_path / "openbookqa/openbookqa_test.jsonl",
        [{"query": r["question_stem"], "choices": r["choices"]["text"], "gold": 0} for r in OPENBOOKQA],
    )
    (tmp_path / "mmlu").mkdir()
    with zipfile.ZipFile(tmp_path / "mmlu/mmlu_dev_test.zip", "w") as archive:
        for entry in LOCAL_TASKS.joinpath("mmlu.yaml").read_text(encoding="utf-8").splitlines():
            subject = entry.partition("{subject: ")[2].rstrip("}")
            for split, records in MMLU.items() if subject else ():
                table = io.StringIO(newline="")
                writer = csv.writer(table)
                writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                writer.writerows([r["question"], *r["choices"], r["answer"]] for r in records)
                archive.writestr(f"{split}/{subject}_{split}.csv", table.getvalue())
    return tmp_path


@pytest.fixture(scope="module")
def harness() -> TaskManager:
    """The harness's own tasks (of which only the folders in question are indexed, for speed)."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = ["super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa", "mmlu/default"]
    return TaskManager(include_path=[root / folder for folder in folders], include_defaults=False)


def requests(task, fewshot: int):
    """Everything a task asks, and what it makes of fixed answers."""
    task.set_config("num_fewshot", fewshot)
    task.set_fewshot_seed(1)
    task.build_all_requests()
    asked = [(instance.doc_id, instance.idx, instance.request_type, instance.args) for instance in task.instances]
    scored = []
    generator = random.Random(0)
    for index, doc in enumerate(task.eval_docs):
        count = sum(instance.doc_id == index for instance in task.instances)
        scored.append(task.process_results(doc, [(-generator.random() * 9, False) for _ in range(count)]))
    aggregation = {name: function.__name__ for name, function in task.aggregation().items()}
    return asked, scored, aggregation, task.higher_is_better()


@pytest.mark.parametrize("name", sorted(HUB))
def test_same_requests_and_scores_as_the_harness(name, harness, local_copies, monkeypatch):
    hub = datasets.DatasetDict({split: datasets.Dataset.from_list(records) for split, records in HUB[name].items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    theirs = harness.load([name])["tasks"][name]
    monkeypatch.undo()
    ours = load_tasks(["mmlu" if name.startswith("mmlu") else name], data=local_copies).loaded
    ours = {key.rpartition("::")[2]: task for loaded in ours.values() for key, task in loaded["tasks"].items()}[name]
    for fewshot in (0, 5) if name.startswith("mmlu") else (0,):
        assert requests(ours, fewshot) == requests(theirs, fewshot)
    asked, *_ = requests(ours, 0)
    assert len(asked) >= 4


def test_the_cleaned_full_hellaswag_asks_the_same(local_copies):
    """Six lines a record, cleaned, the unfinished sentence in lower case: as the originals once the capital is back."""
    originals = load_tasks(["hellaswag"], data=local_copies).loaded["hellaswag"]["tasks"]["hellaswag"]
    lines = []
    for doc in originals.eval_docs:
        lines += [doc["query"].replace("He and bob", "he and Bob"), str(doc["gold"]), *doc["choices"]]
    (local_copies / "hellaswag/hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(lines).encode() + b"\n"))
    full = load_tasks(["hellaswag_full"], data=local_copies).loaded["hellaswag_full"]["tasks"]["hellaswag_full"]
    assert requests(full, 0) == requests(originals, 0)
    assert capitalised("Food: Wash it. Use water") == "Food: Wash it. Use water"


def test_paper_is_seven_tasks_and_their_mean(local_copies):
    assert tuple(load_tasks(["paper", "rte"], data=local_copies).loaded) == PAPER
    scores = [Score(name, "acc", value / 10, None, 1, 0) for value, name in enumerate(PAPER)]
    assert mean_of_paper(scores) == pytest.approx((0 + 1 + 2 + 3 + 4 + 5 + 6) / 70)
    assert mean_of_paper(scores[1:]) is None


@pytest.mark.parametrize(
    ("metric", "value", "error", "text"),
    [
        ("acc", 0.5, 0.05, "50.00% ± 5.00%"),
        ("acc", 1.0, None, "100.00%"),
        ("acc_norm", 0.25, 0.05, "acc_norm 25.00% ± 5.00%"),
        ("prompt_level_strict_acc", 0.25, None, "prompt_level_strict_acc 25.00%"),
        ("exact_match", 0.125, 0.0125, "exact_match 12.50% ± 1.25%"),
        ("exact_match", 12.5, None, "exact_match 12.5"),
        ("word_perplexity", 23.45678, None, "word_perplexity 23.46"),
        ("perplexity", 123456.0, 789.0, "perplexity 1.235e+05 ± 7.9e+02"),
        ("bits_per_byte", 0.91239, None, "bits_per_byte 0.9124"),
        ("mcc", -0.25, 0.0125, "mcc -0.25 ± 0.013"),
    ],
)
def test_only_shares_are_percentages(metric, value, error, text):
    assert Score("task", metric, value, error, 1, 0).text() == text


def test_faults_are_named_before_a_model_is_loaded(local_copies, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"few|no records beside the scored ones"):
        load_tasks(["boolq"], data=local_copies, fewshot=2)
    with pytest.raises(ConfigurationError, match="fewer than none"):
        load_tasks(["boolq"], data=local_copies, fewshot=-1)
    (local_copies / "boolq/boolq_dev.jsonl").write_text('{"query": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"task boolq: .*boolq_dev.jsonl, line 1 is not as docs"):
        load_tasks(["boolq"], data=local_copies)
    (local_copies / "boolq/boolq_dev.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"task boolq: there is no file .*boolq/boolq_dev.jsonl"):
        load_tasks(["boolq"], data=local_copies)
    with pytest.raises(ConfigurationError, match=r"--data .*: there is no such folder"):
        load_tasks(["boolq"], data=local_copies / "absent")
    with pytest.raises(ConfigurationError, match=r"--include-path .*: there is no such folder"):
        load_tasks(["boolq"], include_path=local_copies / "absent")


def test_damaged_local_files_are_named_with_reason_and_cure(local_copies):
    """Whatever is wrong with a local file, the message names it, and no network."""
    rte, zipped = local_copies / "rte/rte_dev.tsv", local_copies / "mmlu/mmlu_dev_test.zip"
    header = "sentence1\tsentence2\tlabel\tidx\n"
    whole = zipped.read_bytes()
    middle = bytearray(whole)
    middle[60:70] = b"\xff" * 10  # inside the first member
    faults = [
        ("rte", rte, b"sentence1\tsentence2\nA\tB\n", "has no column label"),
        ("rte", rte, header.encode() + b"A\tB\t2\t0\n", "line 2 is not as docs/evaluation.md describes it"),
        ("rte", rte, header.encode() + b"A\tB\n", "line 2 is not as docs/evaluation.md describes it"),
        ("rte", rte, header.encode(), "holds no records"),
        ("mmlu", zipped, whole[:100], "cannot be read"),
        ("mmlu", zipped, bytes(middle), "cannot be read"),
        ("mmlu", zipped, _zip("dev/abstract_algebra_dev.csv", "question,answer\nWhy?,0\n"), "line 2 is not as docs"),
        ("mmlu", zipped, _zip("dev/abstract_algebra_dev.csv", _mmlu_row(4)), "line 2 is not as docs"),
        (
            "hellaswag_full",
            local_copies / "hellaswag/hellaswag_val_full.txt.bz2",
            bz2.compress(b"a\nx\n" * 3),
            "line 1",
        ),
    ]
    for task, file, content, reason in faults:
        file.write_bytes(content)
        with pytest.raises(ConfigurationError) as caught:
            load_tasks([task], data=local_copies)
        message = str(caught.value)
        assert message.startswith(f"task {task}: {file}") and reason in message and "huggingface" not in message


def test_a_line_separator_inside_a_sentence_ends_no_line(local_copies):
    file = local_copies / "rte/rte_dev.tsv"
    file.write_bytes("sentence1\tsentence2\tlabel\tidx\r\nA\u2028cat\x0b.\tB\x85.\t1\t0\r\n".encode())
    (doc,) = load_tasks(["rte"], data=local_copies).loaded["rte"]["tasks"]["rte"].eval_docs
    assert (doc["sentence1"], doc["sentence2"], doc["label"], doc["idx"]) == ("A\u2028cat\x0b.", "B\x85.", 1, "0")


def test_faults_of_own_task_files_name_the_file_and_no_network(tmp_path, local_copies):
    own = tmp_path / "own"
    jsonl(own / "records.jsonl", [{"q": "a", "label": 0}])
    file = own / "mine.yaml"
    for change, reason in (
        (("multiple_choice", "multiple_guess"), "Got invalid output_type 'multiple_guess'"),
        (("records.jsonl", "absent.jsonl"), "absent.jsonl"),
        (("doc_to_target: label", "doc_to_target: !function absent.f"), "absent"),
    ):
        file.write_text(own_task("mine", own).replace(*change), encoding="utf-8")
        with pytest.raises(ConfigurationError) as caught:
            load_tasks(["mine"], data=local_copies, include_path=own)
        message = str(caught.value)
        assert message.startswith(f"task mine: {file} ") and reason in message and "huggingface" not in message
    for text, reason in (("task: [mine\n", "line 2"), ("include: absent_template\ntask: mine\n", "absent_template")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigurationError) as caught:
            load_tasks(["rte"], data=local_copies, include_path=own)  # mine.yaml may be meant to be rte
        assert str(file) in str(caught.value) and reason in str(caught.value) and "unknown" not in str(caught.value)


def test_more_examples_than_there_are_is_one_fault_before_a_model_is_loaded(local_copies, tmp_path):
    load_tasks(["mmlu"], data=local_copies, fewshot=5)
    with pytest.raises(ConfigurationError, match=r"mmlu_abstract_algebra.* and 54 more have 5 examples .* 5 at most"):
        load_tasks(["mmlu"], data=local_copies, fewshot=6)
    own = tmp_path / "own"
    jsonl(own / "records.jsonl", [{"q": f"{i}", "label": i % 2} for i in range(3)])
    (own / "mine.yaml").write_text(own_task("mine", own) + "fewshot_split: test\n", encoding="utf-8")
    suite = load_tasks(["mine"], data=local_copies, include_path=own, fewshot=2)
    assert len(requests(suite.loaded["mine"]["tasks"]["mine"], 2)[0]) == 6
    with pytest.raises(ConfigurationError, match=r"mine has 2 examples .* 2 at most"):  # the asked one is none
        load_tasks(["mine"], data=local_copies, include_path=own, fewshot=3)


def _zip(name: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


def _mmlu_row(answer: int) -> str:
    return f"question,choice0,choice1,choice2,choice3,answer\nWhy?,a,b,c,d,{answer}\n"


def own_task(name: str, folder: Path) -> str:
    """A task file of one's own, which reads records.jsonl of the same folder."""
    return f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "records.jsonl"}}}, cache_dir: {folder / "cache"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "number {{{{q}}}} is"
doc_to_target: label
doc_to_choice: ["same", "same"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_unknown_and_unreachable_tasks(monkeypatch, harness):
    monkeypatch.setattr("wanda.evaluation.tasks._manager", lambda *_: harness)
    with pytest.raises(ConfigurationError, match=r"unknown task 'bolq': did you mean boolq"):
        load_tasks(["bolq"])

    def offline(**_):
        raise ConnectionError("Couldn't reach the hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigurationError, match=r"task boolq: aps/super_glue is neither .*huggingface.co .*--data"):
        load_tasks(["boolq"])


def test_own_task_files_and_a_tiny_model(tmp_path, local_copies, tiny):
    """A task file of one's own is found and scored; accuracy and error by the textbook formulas."""
    jsonl(tmp_path / "own/records.jsonl", [{"q": f"{i}", "label": i % 2} for i in range(6)])
    (tmp_path / "own/parity.yaml").write_text(own_task("parity", tmp_path / "own"), encoding="utf-8")
    seen = []
    suite = load_tasks(["parity"], data=local_copies, include_path=tmp_path / "own")
    scores = suite.run(load_model(tiny, "float32", "cpu"), load_tokenizer(tiny), limit=5, report=seen.append)
    assert seen == scores
    (score,) = scores
    # Equal choices tie and the first wins: right for labels 0, which are 3 of the first 5.
    assert (score.task, score.metric, score.samples, score.value) == ("parity", "acc", 5, pytest.approx(0.6))
    assert score.fewshot == 0
    assert score.error == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
