"""`tune`: train a pruned checkpoint on, by transformers' Trainer, and write what came out."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from wanda.checkpoint.packed import is_packed
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.source import check_folder, load_config, load_model, load_tokenizer, sequence_length
from wanda.checkpoint.tensors import sync_folder
from wanda.checkpoint.writer import TUNE_IDENTITY, output_faults, partial_folder, replace_folder
from wanda.errors import ConfigurationError, MissingExtraError, RunError
from wanda.recovery.lora import add_adapter, require_peft
from wanda.recovery.masks import read_masks
from wanda.recovery.output import add_record, learning_curve, write_checkpoint
from wanda.recovery.settings import Settings
from wanda.recovery.text import sequences

_CHECKPOINTS = "checkpoints"


def tune(
    folder: str | Path,
    *,
    out: str | Path,
    settings: Settings | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Train a pruned checkpoint on; its zeros stay. Returns the record that also goes to `out`/wanda.json under "tune".

    folder: a pruned checkpoint. out: the folder to write, whole or absent; with lora an adapter, with full a model.
    resume: go on with a run that was stopped, from its last checkpoint. overwrite: replace a non-empty `out`.
    settings, or options: the fields of Settings, which are the command line's flags.
    Raises ConfigurationError before anything is trained or written; RunError for a fault on the way (a loss that is
    not finite), leaving the last good checkpoint in `out`.partial.
    """
    settings = settings or Settings(**options)
    folder, out = Path(folder), Path(out).absolute()
    _refuse(folder, out, settings, resume, overwrite)
    from wanda.recovery.trainer import accumulation, processes, train_model  # needs accelerate, just asked for

    accumulation(settings)  # its fault before anything is loaded
    config = load_config(folder, settings.trust_remote_code)
    seqlen = sequence_length(config, settings.seqlen, usual=1024)
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    train, held, notes = sequences(
        settings.calibration,
        tokenizer,
        wanted=settings.steps * settings.batch,
        held_out=settings.held_out,
        seqlen=seqlen,
        seed=settings.seed,
    )
    source = Checkpoint.open(folder)
    model = load_model(folder, "float32", "cpu", settings.trust_remote_code)
    masks = read_masks(model, folder)
    identity = {"settings": settings.as_dict(), "input": source.fingerprint()}
    with processes(settings).main_process_first():
        partial = _open_partial(out, identity, resume, processes(settings).is_main_process)
    tuned = add_adapter(model, masks, settings) if settings.lora else model.requires_grad_(True)
    start = time.perf_counter()
    try:
        outcome = train_model(tuned, masks, train, held, settings, partial / _CHECKPOINTS, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{partial} keeps the last checkpoint: go on with --resume") from None
    if not processes(settings).is_main_process:
        return {}
    record = {
        "kind": "lora" if settings.lora else "full",
        "sparse_aware": settings.sparse_aware,
        "model": str(folder),
        "settings": settings.as_dict(),
        "learning_rate": settings.peak_rate,
        "seqlen": seqlen,
        "steps": outcome.steps,
        "training_sequences": len(train),
        "held_out_sequences": len(held),
        "held_out_loss": {"before": outcome.before, "best": outcome.best, "best_step": outcome.best_step},
        "zeros": masks.zeros,
        "pruned_matrices_weights": masks.weights,
        "stopped": outcome.stopped,
        "seconds": round(time.perf_counter() - start, 1),
        "command": command,
        "notes": [*masks.notes, *notes],
        "history": outcome.history,
    }
    result = partial / "result"
    shutil.rmtree(result, ignore_errors=True)
    if settings.lora:
        tuned.save_pretrained(str(result), safe_serialization=True, save_embedding_layers=False)
        (result / "README.md").unlink(missing_ok=True)  # peft's template with nothing filled in
        tokenizer.save_pretrained(str(result))
        add_record(result, {"tune": record}, card_text(record))
    else:
        write_checkpoint(result, source, model, outcome.state, masks.parameters, {"tune": record}, card_text(record))
    if not learning_curve(result / "learning-curve.png", outcome.history, f"{record['kind']} tuning of {folder.name}"):
        print(
            "no learning curve was drawn: pip install 'wanda-prune[plots]'; its numbers are in wanda.json",
            file=sys.stderr,
        )
    sync_folder(result)
    replace_folder(result, out)
    shutil.rmtree(partial)
    return record


def card_text(record: dict[str, Any]) -> str:
    """The model card's paragraph about a tuning run."""
    settings, loss = record["settings"], record["held_out_loss"]
    if record["kind"] == "full":
        how = "All its weights but the removed ones were trained (full fine-tuning under the masks)"
    else:
        through = " through the masks of the pruned weights" if record["sparse_aware"] else ""
        shape = f"rank {settings['rank']}, alpha {settings['alpha']:g}"
        how = f"A LoRA adapter ({shape}) of `{record['model']}` was trained{through}"
    merge = "" if record["kind"] == "full" else " `wanda merge` merges it under the masks, so that the zeros stay."
    return (
        f"{how} for {record['steps']} steps of {settings['batch']} sequences of {record['seqlen']} tokens of "
        f"`{settings['calibration']}`, learning rate {record['learning_rate']:g}. "
        f"Held-out loss {loss['before']:.4f} before, {loss['best']:.4f} after; "
        f"{record['zeros']:,} of {record['pruned_matrices_weights']:,} weights of the pruned matrices are "
        f"zero, before and after.{merge}"
    )


def _refuse(folder: Path, out: Path, settings: Settings, resume: bool, overwrite: bool) -> None:
    """Everything that can be refused without loading the model; raises ConfigurationError with all faults."""
    faults = settings.faults()
    if not folder.is_dir():
        faults.append(f"there is no folder {folder}; tune takes the folder of a pruned checkpoint")
    elif is_packed(folder):
        faults.append(
            f"{folder} is packed, and packed weights cannot be trained; unpack it: wanda unpack {folder} --out DIR"
        )
    else:
        try:
            check_folder(folder)
        except ConfigurationError as error:
            faults += error.faults
    faults += output_faults(out, folder, overwrite, resume, "tune")
    if faults:
        raise ConfigurationError(faults)
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("tuning", "accelerate", "tune") from error
    if settings.lora:
        require_peft()


def _open_partial(out: Path, identity: dict[str, Any], resume: bool, main: bool) -> Path:
    """The folder in which `out` is built: a stopped run's of the same identity, else a new one (main process only)."""
    partial = partial_folder(out)
    file = partial / TUNE_IDENTITY
    if not main:
        return partial
    if resume and file.exists():
        then = json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k, v in identity["settings"].items() if then["settings"].get(k) != v]
        changed += ["the input"] if then["input"] != identity["input"] else []
        if changed:
            raise ConfigurationError(
                f"{partial} was begun with other settings ({', '.join(changed)}); resume with the same, choose another "
                "--out, or start anew with --overwrite"
            )
        return partial
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        file.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{partial} cannot be made: {error.strerror}; choose another --out") from error
    return partial
