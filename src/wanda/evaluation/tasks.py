"""Zero-shot and few-shot tasks through lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The harness builds the prompts and scores the answers; here tasks are chosen, their data is found (on the hub, or in a
local folder by the task files of `local_tasks`), and every fault is named before a model is loaded.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gaierror
from typing import Any

from wanda.errors import ConfigurationError, MissingExtraError

PAPER = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
FEWSHOT_SEED = 1234  # the harness's own default
BOOTSTRAP_ROUNDS = 1000  # for metrics whose standard error has no closed form; accuracies have one
LOCAL_TASKS = Path(__file__).parent / "local_tasks"
_SHARES = re.compile(r"(.*_)?(acc|accuracy|exact_match|em)(_.*)?|pass@\d+")  # metrics that are shares of the records


@dataclass(frozen=True)
class Score:
    """One task's result.

    value, error: of the metric and its standard error (an accuracy goes from 0 to 1, a perplexity anywhere); error is
        None where the harness has none.
    samples: how many records were scored. fewshot: examples before each question; None for a group that mixes numbers.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int
    fewshot: int | None

    def text(self) -> str:
        """The value with its error, for people: shares in percent, all else with four digits; `acc` needs no name."""
        if _SHARES.fullmatch(self.metric) and 0 <= self.value <= 1:  # some tasks give theirs in percent already
            shown = f"{self.value:.2%}" + ("" if self.error is None else f" ± {self.error:.2%}")
        else:
            shown = f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")
        return shown if self.metric == "acc" else f"{self.metric} {shown}"


@dataclass(frozen=True)
class TaskSuite:
    """Tasks whose data has been read, ready for any number of models.

    loaded: what the harness's task manager gave, by the name asked for ("paper" written out).
    """

    loaded: dict[str, Any]

    def run(
        self,
        model: Any,
        tokenizer: Any,
        limit: int | None = None,
        batch_size: int = 8,
        report: Callable[[Score], None] = lambda score: None,
    ) -> list[Score]:
        """Score a causal language model object, task by task; each score also goes to `report` as soon as it is known.

        limit: the first so many records of every task (of every subject of mmlu).
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        scores = []
        with _quiet():
            harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for name, loaded in self.loaded.items():
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(FEWSHOT_SEED)
            with _quiet():
                results = evaluate(
                    harness_model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ROUNDS, log_samples=False
                )
            assert results is not None  # only other ranks than the first get nothing, and there is one
            # A group that says how to sum up its tasks has a row of its own.
            for row in [name] if _metrics(results.get("groups", {}).get(name, {})) else loaded["tasks"]:
                scores.append(_score(row, results, loaded["tasks"]))
                report(scores[-1])
        return scores


def load_tasks(
    names: Sequence[str],
    *,
    fewshot: int | None = None,
    data: Path | None = None,
    include_path: Path | None = None,
) -> TaskSuite:
    """Find the tasks called `names` and read their data.

    names: harness tasks or groups; "paper" stands for the paper's seven.
    data: folder of local sets, which then replace the hub's for the tasks in `local_tasks`.
    include_path: folder of the user's own task files, which go before all others.
    Raises ConfigurationError for an unknown task, a task file or data that cannot be read or had, few-shot examples
    that would come from the scored records, or more of them than there are; MissingExtraError without lm-eval.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("evaluating tasks", "lm-eval", "tasks") from error
    for folder, option in ((data, "--data"), (include_path, "--include-path")):
        if folder is not None and not folder.expanduser().is_dir():
            raise ConfigurationError(f"{option} {folder}: there is no such folder")
    faults = [] if include_path is None else _file_faults(include_path.expanduser())
    if faults:
        raise ConfigurationError(faults)
    wanted = tuple(dict.fromkeys(part for name in names for part in (PAPER if name == "paper" else (name,))))
    with _quiet():
        manager = _manager(wanted, data, include_path)
        unknown = [name for name in wanted if name not in manager.all_tasks]
        if unknown:
            raise ConfigurationError([_unknown(name, manager.all_tasks) for name in unknown])
        loaded = {name: _load(name, manager) for name in wanted}
    _set_fewshot((task for item in loaded.values() for task in item["tasks"].values()), fewshot)
    return TaskSuite(loaded)


def mean_of_paper(scores: Sequence[Score]) -> float | None:
    """The mean accuracy of the paper's seven tasks, as its tables report it; None unless all seven were scored."""
    values = {score.task: score.value for score in scores}
    return sum(values[name] for name in PAPER) / len(PAPER) if all(name in values for name in PAPER) else None


def _manager(wanted: Sequence[str], data: Path | None, include_path: Path | None) -> Any:
    """The harness's index of tasks; its own 14,000 (8 s to read) only when something wanted is not in ours."""
    from lm_eval.tasks import TaskManager

    folders = [LOCAL_TASKS] if data is not None else []
    folders += [include_path.expanduser()] if include_path is not None else []
    metadata = {"data": str(data.expanduser())} if data is not None else {}
    if folders:
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        if all(name in manager.all_tasks for name in wanted):
            return manager
    return TaskManager(include_path=folders or None, metadata=metadata)


def _file_faults(folder: Path) -> list[str]:
    """The task files of one's own that cannot be read, which the harness would leave out without a word."""
    import yaml

    faults = []
    for file in sorted(folder.glob("**/*.yaml")):
        try:
            node = yaml.compose(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            faults.append(f"{file} cannot be read as a task file ({reason}); mend it, or take it away")
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        included = [value for key, value in pairs if key.value == "include"]
        for name in included[0].value if included and isinstance(included[0].value, list) else included:
            if not (file.parent / name.value).is_file():
                faults.append(
                    f"{file} includes {name.value}, which is not there; mend it, or take it out of the folder"
                )
    return faults


def _load(name: str, manager: Any) -> Any:
    """The task or group called `name` with its data; whatever its file, its code or its data raises is one message."""
    try:
        return manager.load([name])
    except ConfigurationError as error:
        raise ConfigurationError(f"task {name}: {error}") from error
    except Exception as error:
        entry = manager.task_index[name]
        if not _is_miss(error):
            reason = str(error).strip().partition("\n")[0]
            raise ConfigurationError(
                f"task {name}: {entry.yaml_path or 'one of its task files'} cannot be made ready "
                f"({type(error).__name__}: {reason}); mend the file, or give what it asks for"
            ) from error
        source = (entry.cfg or {}).get("dataset_path") or "its data set"
        local = sorted(file.stem for file in LOCAL_TASKS.glob("*.yaml"))
        cure = (
            "or give the folder of local copies with --data (see docs/evaluation.md)"
            if name in local
            else f"or describe local files in a task file of your own (--include-path); --data has {', '.join(local)}"
        )
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise ConfigurationError(
            f"task {name}: {source} is neither in this machine's cache nor to be had from huggingface.co ({reason}); "
            f"connect to the network, {cure}"
        ) from error


def _is_miss(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that the hub cannot be reached or does not have a data set."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    misses = (ConnectionError, TimeoutError, gaierror, DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError)
    while error is not None:
        if isinstance(error, misses):
            return True
        if isinstance(error, ValueError) and "Couldn't find cache" in str(error):  # datasets, without a network
            return True
        error = error.__cause__ or error.__context__
    return False


def _set_fewshot(tasks: Iterable[Any], fewshot: int | None) -> None:
    """Examples have to come from records that are not scored, be there, and a task may fix their number."""
    faults = [] if fewshot is None or fewshot >= 0 else [f"--fewshot {fewshot}: there cannot be fewer than none"]
    short: dict[int, list[str]] = {}  # by how many examples there are: the tasks that have fewer than asked for
    for task in tasks:
        own = task.get_config("num_fewshot")
        if fewshot and own == 0:
            faults.append(f"task {task.task_name} is defined without examples; leave --fewshot away for it")
        elif fewshot and not (task.config.fewshot_split or task.config.training_split or task.fewshot_cfg.samples):
            faults.append(
                f"task {task.task_name} has no records beside the scored ones to take {fewshot} examples from; "
                "leave --fewshot away, or use the hub's data (no --data), which has a training part"
            )
        else:
            count = (own or 0) if fewshot is None else fewshot
            if count > 0 and (there := _examples(task)) < count:
                short.setdefault(there, []).append(task.task_name.rpartition("::")[2])
            task.set_config("num_fewshot", count)
    for there, names in short.items():
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        faults.append(
            f"{some} {'has' if len(names) == 1 else 'have'} {there} examples to give, fewer than asked for; "
            f"take --fewshot {there} at most"
        )
    if faults:
        raise ConfigurationError(faults)


def _examples(task: Any) -> int:
    """How many examples a question of the task can get; where they are scored records, it is not one itself."""
    records = len(task.fewshot_docs())
    return records - (task.config.fewshot_split is not None and task.config.fewshot_split == task.config.test_split)


def _score(name: str, results: Any, tasks: Mapping[str, Any]) -> Score:
    """The task's accuracy, as the paper reports it (not the length-normalised one), else its first metric."""
    row = results["groups" if name in results.get("groups", {}) else "results"][name]
    metrics = _metrics(row)
    chosen = next((key for key in metrics if key.startswith("acc,")), metrics[0])
    metric, _, filtered = chosen.partition(",")
    error = row.get(f"{metric}_stderr,{filtered}")
    counts = results["n-samples"]
    samples = sum(count["effective"] for task, count in counts.items() if task == name or name not in counts)
    fewshot = {task.get_config("num_fewshot") for task in ([tasks[name]] if name in tasks else tasks.values())}
    return Score(
        name,
        metric,
        float(row[chosen]),
        float(error) if isinstance(error, (int, float)) else None,
        samples,
        fewshot.pop() if len(fewshot) == 1 else None,
    )


def _metrics(row: Mapping[str, Any]) -> list[str]:
    """The keys of a row of results that are metrics: `name,filter`."""
    return [key for key in row if "," in key and "_stderr" not in key]


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, ["paper", *known], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists the harness's own"
    return f"unknown task {name!r}: {hint}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's log to errors, and its progress bars to terminals."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        logger.setLevel(before)
