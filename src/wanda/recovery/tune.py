"""`tune`: train a pruned checkpoint on, by transformers' Trainer, and write what came out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from wanda.calibration import local_files
from wanda.checkpoint.folder import (
    RESULT,
    TUNE_IDENTITY,
    empty_folder,
    filled,
    followed,
    locked,
    output_faults,
    partial_folder,
    put_back,
    replace_file,
    replace_folder,
)
from wanda.checkpoint.packed import is_packed
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.source import check_folder, load_config, load_model, load_tokenizer, sequence_length
from wanda.checkpoint.tensors import bytes_of, sync_files
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
    folder, out = Path(folder), followed(Path(out))
    _refuse(folder, out, settings, resume, overwrite)
    from wanda.recovery.trainer import accumulation, processes, train_model  # needs accelerate, just asked for

    accumulation(settings)  # its fault before anything is loaded
    config = load_config(folder, settings.trust_remote_code)
    seqlen = sequence_length(config, settings.seqlen, usual=1024)
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    train, held, notes = sequences(
        settings.calibration,
        tokenizer,
        steps=settings.steps,
        batch=settings.batch,
        held_out=settings.held_out,
        seqlen=seqlen,
        seed=settings.seed,
    )
    source = Checkpoint.open(folder)
    model = load_model(folder, "float32", "cpu", settings.trust_remote_code)
    masks = read_masks(model, folder)
    identity = {
        "settings": settings.as_dict(),
        "input": source.fingerprint(),
        "text": hashlib.sha256(b"".join(bytes_of(part.contiguous()) for part in (train, held))).hexdigest(),
    }
    main, partial = processes(settings).is_main_process, partial_folder(out)
    with contextlib.ExitStack() as stack:
        with processes(settings).main_process_first():
            if main:
                stack.enter_context(locked(partial, out))
                if filled(out) and not overwrite:  # since it was looked at
                    raise ConfigurationError(f"another run has written {out} meanwhile; choose another --out")
                _begin(partial, out, identity, resume)
        tuned = add_adapter(model, masks, settings) if settings.lora else model.requires_grad_(True)
        start = time.perf_counter()
        try:
            outcome = train_model(tuned, masks, train, held, settings, partial / _CHECKPOINTS, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{partial} keeps the last checkpoint: go on with --resume") from None
        if not main:
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
        result = partial / RESULT
        try:
            put_back(result, out)  # of a run that was killed while it replaced it
            shutil.rmtree(result, ignore_errors=True)
            if settings.lora:
                tuned.save_pretrained(str(result), safe_serialization=True, save_embedding_layers=False)
                (result / "README.md").unlink(missing_ok=True)  # peft's template with nothing filled in
                tokenizer.save_pretrained(str(result))
                add_record(result, {"tune": record}, card_text(record))
            else:
                changed = outcome.state
                write_checkpoint(result, source, model, changed, masks.parameters, {"tune": record}, card_text(record))
            curve = result / "learning-curve.png"
            if not learning_curve(curve, outcome.history, f"{record['kind']} tuning of {folder.name}"):
                print(
                    "no learning curve was drawn: pip install 'wanda-prune[plots]'; its numbers are in wanda.json",
                    file=sys.stderr,
                )
            sync_files(result)
            replace_folder(result, out)
            shutil.rmtree(partial, ignore_errors=True)  # OUT is whole, and a network disk keeps the open lock
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RunError(f"{out} cannot be written ({reason}); free some space and --resume") from error
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
    faults += output_faults(out, [folder, *local_files(settings.calibration)], overwrite, resume, "tune")
    if faults:
        raise ConfigurationError(faults)
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("tuning", "accelerate", "tune") from error
    if settings.lora:
        require_peft()


def _begin(partial: Path, out: Path, identity: dict[str, Any], resume: bool) -> None:
    """Make the folder ready in which the result is built: what a stopped run of the same identity left, or nothing."""
    file = partial / TUNE_IDENTITY
    if resume and file.exists():
        try:
            then = json.loads(file.read_text(encoding="utf-8"))
            changed = [k for k, v in identity["settings"].items() if then["settings"].get(k) != v]
            changed += ["the input"] if then["input"] != identity["input"] else []
            if not changed and then["text"] != identity["text"]:  # of which the settings choose a part
                changed = ["the text"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{file} cannot be read ({error!r}); start anew with --overwrite") from error
        if changed:
            raise ConfigurationError(
                f"{partial} was begun with other settings ({', '.join(changed)}); resume with the same, choose another "
                "--out, or start anew with --overwrite"
            )
        return
    empty_folder(partial, out)
    try:
        replace_file(file, json.dumps(identity, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{partial} cannot be written: {error.strerror}; choose another --out") from error
