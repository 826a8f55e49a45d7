"""The training loop: transformers' Trainer with masks, a held-out part, and nothing that can lose a good checkpoint."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from wanda.device import cpu_has_bfloat16
from wanda.errors import ConfigurationError, RunError
from wanda.recovery.masks import Masks, hold_zeros
from wanda.recovery.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    state: the trained parameters by name, float32 on the CPU (full tuning; the peft model holds an adapter itself).
    before, best: held-out cross entropy per token at the start and of what is kept; best_step: its step.
    stopped: why training ended.
    """

    state: dict[str, Tensor]
    history: list[dict[str, float]]
    steps: int
    before: float
    best: float
    best_step: int
    stopped: str


def train_model(
    model: Any, masks: Masks, train: Tensor, held: Tensor, settings: Settings, folder: Path, progress: bool
) -> Outcome:
    """Train the parameters that require a gradient on train [n, seqlen], measuring held [k, seqlen] at regular steps.

    Goes on from the last whole checkpoint in `folder`, where checkpoints are kept. The best one is what is returned.
    Raises RunError when the loss or a weight is not finite; the last good checkpoint stays.
    """
    resumed = last_checkpoint(folder)
    every = math.ceil(settings.steps / settings.evaluations)
    cpu = _on_cpu(settings)
    bfloat16 = cpu_has_bfloat16() if cpu else _accelerator_has_bfloat16()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=accumulation(settings),
        learning_rate=settings.peak_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        **(_checkpointing() if settings.gradient_checkpointing else {}),
        bf16=bfloat16,  # the products; weights, gradients and optimizer stay in float32
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=resumed is None,  # the measurement at the start is in the history already
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, every // 5),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    watch, stop_early = _Watch(settings, progress), _StopEarly(settings.patience)
    trainer = _MaskedTrainer(
        model=model,
        args=arguments,
        train_dataset=_Sequences(train),
        eval_dataset=_Sequences(held),
        callbacks=[_HoldZeros(masks), watch, stop_early],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.gradient_checkpointing and settings.lora:
        model.enable_input_require_grads()
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with watch:
            trainer.train(resume_from_checkpoint=resumed)
    except (OSError, RuntimeError, SafetensorError) as error:
        writing = ("PytorchStreamWriter", "inline_container", "No space")  # torch says it in its own ways
        if not isinstance(error, RuntimeError) or any(part in str(error) for part in writing):
            raise RunError(
                f"a checkpoint cannot be written to {folder}, or read from it ({error}); free some space, or remove "
                "the newest one there where it is damaged, and --resume"
            ) from error
        raise
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    state = {} if settings.lora else trainer.trained_state()
    history = [_plain(row) for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    losses = [row for row in history if "eval_loss" in row]
    best = min(losses, key=lambda row: row["eval_loss"])
    if best["step"] == 0:
        raise RunError(
            f"tuning did not help: the held-out loss was {best['eval_loss']:.4f} before and at least "
            f"{min((row['eval_loss'] for row in losses[1:]), default=math.nan):.4f} afterwards; nothing was written. "
            f"Try a lower --learning-rate, more --steps or another text; start anew with --overwrite"
        )
    return Outcome(
        state=state,
        history=history,
        steps=trainer.state.global_step,
        before=losses[0]["eval_loss"],
        best=best["eval_loss"],
        best_step=int(best["step"]),
        stopped=watch.reason(trainer.state),
    )


def processes(settings: Settings) -> PartialState:
    """The processes that train together: this one alone, or those that `accelerate launch` started."""
    return PartialState(cpu=_on_cpu(settings))


def accumulation(settings: Settings) -> int:
    """Micro-batches of each device in one step; raises ConfigurationError when the devices cannot share --batch."""
    devices = processes(settings).num_processes
    if devices == 1 and not _on_cpu(settings):
        devices = torch.accelerator.device_count()  # one process drives them all
    share = settings.micro_batch * devices
    if settings.batch % share:
        lower = settings.batch // share * share
        raise ConfigurationError(
            f"--batch {settings.batch} cannot be shared out evenly: {devices} devices with --micro-batch "
            f"{settings.micro_batch} take multiples of {share}; take --batch "
            f"{f'{lower} or {lower + share}' if lower else share}, or another number of devices"
        )
    return settings.batch // share


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stopped run, None when there is none; the trainer's state is written last."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            found.append(
                (json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["global_step"], checkpoint)
            )
        except (OSError, ValueError, KeyError):
            continue  # killed while it was written
    return str(max(found)[1]) if found else None


class _MaskedTrainer(Trainer):
    """Trainer that stops at the first number that is not finite, before it can reach a checkpoint."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise self._not_finite(f"the training loss is {float(loss)}")
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for name, parameter in self.model.named_parameters():  # type: ignore[union-attr]
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise self._not_finite(f"{name} has values that are not finite")
        super()._save_checkpoint(model, trial)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # it is set here when a run is resumed that had ended
            super()._run_epoch(*args, **kwargs)

    def trained_state(self) -> dict[str, Tensor]:
        """The parameters by name, whole and on the CPU, also when they are sharded; to be called on all processes."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        names = {name for name, p in self.model.named_parameters(remove_duplicate=False)}  # type: ignore[union-attr]
        return {name: tensor.detach().cpu() for name, tensor in state.items() if name in names}

    def _not_finite(self, what: str) -> RunError:
        kept = last_checkpoint(Path(self.args.output_dir or "."))
        return RunError(
            f"{what} at step {self.state.global_step + 1}; training was stopped. "
            + (f"The last good checkpoint is kept: {kept}. " if kept else "There is no checkpoint before it. ")
            + "Start anew (--overwrite) with a lower --learning-rate"
        )


class _HoldZeros(TrainerCallback):
    """Puts the masks on the parameters and the optimizer once accelerate has prepared (and maybe sharded) them."""

    def __init__(self, masks: Masks):
        self.masks = masks

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        hold_zeros(model.named_parameters(), self.masks.parameters, getattr(optimizer, "optimizer", optimizer))


class _StopEarly(TrainerCallback):
    """Ends training when `patience` measurements in a row were no better than the best before them.

    The history alone decides, not a counter, so that a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # resumed after the last step
            control.should_training_stop = True
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row and row["step"] > 0]
        before, last = losses[: -self.patience], losses[-self.patience :]
        if before and not any(loss < min(before) for loss in last):
            control.should_training_stop = True


class _Watch(TrainerCallback):
    """Progress on standard error (a bar on a terminal, a line a measurement elsewhere), and the time limit."""

    def __init__(self, settings: Settings, shown: bool):
        self.settings, self.shown = settings, shown
        self.start = time.perf_counter()
        self.out_of_time = False
        self.bar: Bar | None = None
        self.detail = ""

    def __enter__(self) -> _Watch:
        self.start = time.perf_counter()
        console = Console(file=sys.stderr)
        if self.shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            self.bar = Bar(*columns, TimeRemainingColumn(), TextColumn("{task.fields[detail]}"), console=console)
            self.bar.start()
            self.task = self.bar.add_task("tuning", total=self.settings.steps, detail="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)
        limit = self.settings.minutes
        if state.global_step < state.max_steps and limit is not None:
            self.out_of_time = _of_first_process(time.perf_counter() - self.start > 60 * limit)
        if state.global_step >= state.max_steps or self.out_of_time:
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not self.shown or not state.is_world_process_zero or not logs:
            return
        for key, name in (("loss", "training loss"), ("eval_loss", "held-out loss")):
            if key in logs:
                self.detail = f"{name} {float(logs[key]):.4f}"
                if self.bar is not None:
                    self.bar.update(self.task, detail=self.detail)
                else:
                    spent = time.perf_counter() - self.start
                    text = f"step {state.global_step}/{self.settings.steps}: {self.detail}; {spent:.0f} s"
                    print(text, file=sys.stderr, flush=True)

    def reason(self, state: Any) -> str:
        """Why the training ended."""
        if self.out_of_time:
            return f"after {self.settings.minutes:g} minutes"
        if state.global_step < self.settings.steps:
            return f"held-out loss no better in {self.settings.patience} measurements"
        return "all steps done"


class _Sequences(torch.utils.data.Dataset):
    """Token ids [n, seqlen] as what a causal language model trains on."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def _on_cpu(settings: Settings) -> bool:
    return settings.device == "cpu" or not torch.accelerator.is_available()


def _of_first_process(decision: bool) -> bool:
    """The first process's decision, on all: those that stop at different steps wait for each other for ever."""
    state = PartialState()
    if state.num_processes == 1:
        return decision
    return bool(broadcast(torch.tensor(int(decision), device=state.device)))


def _checkpointing() -> dict[str, Any]:
    """Trainer's arguments for recomputing activations, under the name that this version of transformers has for it."""
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _accelerator_has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _plain(row: dict[str, Any]) -> dict[str, float]:
    return {k: float(row[k]) for k in ("step", "loss", "eval_loss", "learning_rate", "grad_norm") if k in row}
