"""Tuning: the zeros hold at every checkpoint, a stopped run goes on, and a bad run costs nothing that was good."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from byhand import prune_by_hand
from models import tiny_llama, tiny_tokenizer
from ranks import Server
from wanda import prune
from wanda.checkpoint.folder import locked
from wanda.checkpoint.packed import pack
from wanda.errors import ConfigurationError, RunError
from wanda.recovery import trainer as training
from wanda.recovery import tune as tuning
from wanda.recovery.merge import merge
from wanda.recovery.tune import tune

SHORT = {"steps": 12, "seqlen": 32, "batch": 4, "micro_batch": 2, "evaluations": 4, "held_out": 4, "device": "cpu"}
FAST = {"learning_rate": 1e-2, "progress": False}


def pruned_keys(folder: Path) -> dict[str, dict]:
    return {f"{row['name']}.weight": row for row in json.loads((folder / "wanda.json").read_text())["layers"]}


@pytest.mark.parametrize("pattern", ["2:4", "0.5 per row"])
def test_full_tuning_keeps_every_zero_and_changes_every_survivor(pruned, text, tmp_path, pattern, tiny):
    folder, out = pruned(pattern=pattern), tmp_path / "out"
    record = tune(folder, out=out, full=True, calibration=text, weight_decay=0.1, **SHORT, **FAST)
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert after[key].dtype == weight.dtype
        if key in pruned_keys(folder):
            assert torch.equal(weight != 0, after[key] != 0)
            assert float((weight != after[key]).float().mean()) > 0.45  # survivors: half of all
    assert record["held_out_loss"]["best"] < record["held_out_loss"]["before"] - 1
    assert record["zeros"] * 2 == record["pruned_matrices_weights"]
    written = json.loads((out / "wanda.json").read_text())
    assert written["layers"] == json.loads((folder / "wanda.json").read_text())["layers"]
    assert written["tune"]["settings"]["calibration"] == text
    assert (out / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert card.startswith("# pruned\n\n## Recovery\n") and "before and after" in card
    assert not (tmp_path / "out.partial").exists()
    # An ordinary checkpoint: it loads, and the held-out loss was its own.
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == sum(t.numel() for t in after.values())


def test_an_interrupted_run_resumes_and_ends_the_same(pruned, text, tmp_path, monkeypatch):
    folder = pruned()
    options = {"full": True, "calibration": text, "gradient_checkpointing": True} | SHORT | FAST
    tune(folder, out=tmp_path / "whole", **options)
    real = training._Watch.on_step_end

    def interrupt(self, args, state, control, **keywords):
        if state.global_step == 8:
            raise KeyboardInterrupt
        real(self, args, state, control, **keywords)

    monkeypatch.setattr(training._Watch, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"stopped.partial keeps the last checkpoint: go on with --resume"):
        tune(folder, out=tmp_path / "stopped", **options)
    monkeypatch.undo()
    assert not (tmp_path / "stopped").exists()
    # What was kept is valid 2:4, in every matrix.
    checkpoints = sorted((tmp_path / "stopped.partial/checkpoints").glob("checkpoint-*/model.safetensors"))
    assert [file.parent.name for file in checkpoints] == ["checkpoint-3", "checkpoint-6"]
    for file in checkpoints:
        for key, weight in load_file(file).items():
            if key in pruned_keys(folder):
                assert int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2
    with pytest.raises(ConfigurationError, match=r"holds an unfinished run of wanda tune; go on .* --resume"):
        tune(folder, out=tmp_path / "stopped", **options)
    with pytest.raises(ConfigurationError, match=r"begun with other settings \(steps\)"):
        tune(folder, out=tmp_path / "stopped", resume=True, **(options | {"steps": 13}))
    tune(folder, out=tmp_path / "stopped", resume=True, **options)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_what_changed_or_broke_since_a_run_was_stopped_is_told(pruned, text, tmp_path, monkeypatch):
    folder = pruned()
    options = {"full": True, "calibration": text, "out": tmp_path / "out"} | SHORT | FAST
    monkeypatch.setattr("wanda.recovery.trainer.train_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune(folder, **options)
    words = Path(text).read_text(encoding="utf-8")
    Path(text).write_text(words.replace("fox", "dog"), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"begun with other settings \(the text\)"):
        tune(folder, resume=True, **options)
    Path(text).write_text(words, encoding="utf-8")
    with (
        locked(tmp_path / "out.partial", tmp_path / "out"),
        pytest.raises(ConfigurationError, match="another run is writing"),
    ):
        tune(folder, resume=True, **options)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, resume=True, **options)
    (tmp_path / "out.partial" / "tune.json").write_text("")
    with pytest.raises(ConfigurationError, match=r"tune.json cannot be read .* start anew with --overwrite"):
        tune(folder, resume=True, **options)


def test_what_another_run_has_written_meanwhile_is_not_replaced(pruned, text, tmp_path, monkeypatch):
    load = tuning.load_model

    def meanwhile(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "wanda.json").write_text("{}")
        return load(*arguments)

    monkeypatch.setattr(tuning, "load_model", meanwhile)
    with pytest.raises(ConfigurationError, match=r"another run has written .*out meanwhile"):
        tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **SHORT, **FAST)
    assert (tmp_path / "out" / "wanda.json").read_text() == "{}"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_full_disk_is_told_and_the_run_goes_on(pruned, text, tmp_path, monkeypatch, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    options = {kind: True, "calibration": text, "out": tmp_path / "out"} | SHORT | FAST
    full = OSError(errno.ENOSPC, "No space left on device")
    place, folder = f"wanda.recovery.{'output' if kind == 'full' else 'tune'}.add_record", pruned()
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.serialize_file", lambda *_, **__: (_ for _ in ()).throw(SafetensorError(full)))
        with pytest.raises(
            RunError, match=r"a checkpoint cannot be written .*No space .*free some space, or .*and --resume"
        ):
            tune(folder, **options)
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *_, **__: (_ for _ in ()).throw(full))
        with pytest.raises(RunError, match=r"cannot be written .*No space left on device.*; free some space"):
            tune(folder, resume=True, **options)
    assert tune(folder, resume=True, **options)["steps"] == 12
    assert (tmp_path / "out" / "wanda.json").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("steps", "evaluations", "measured"), [(19, 10, [0, *range(2, 19, 2), 19]), (3, 5, [0, 1, 2, 3])]
)
def test_measured_no_more_often_than_asked_and_at_the_end(pruned, text, tmp_path, steps, evaluations, measured):
    options = (
        SHORT | FAST | {"steps": steps, "evaluations": evaluations, "batch": 2, "patience": 99, "learning_rate": 1e-3}
    )
    record = tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **options)
    assert [row["step"] for row in record["history"] if "eval_loss" in row] == measured


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(pruned, text, tmp_path, monkeypatch):
    real = training.Trainer.training_step

    def poisoned(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 7 else loss

    monkeypatch.setattr(training.Trainer, "training_step", poisoned)
    with pytest.raises(
        RunError, match=r"training loss is nan at step 8; .* last good checkpoint is kept: .*checkpoint-6"
    ):
        tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **SHORT, **FAST)
    kept = load_file(tmp_path / "out.partial/checkpoints/checkpoint-6/model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_never_reaches_a_checkpoint(pruned, text, tmp_path, monkeypatch):
    class Poison(training._HoldZeros):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 4:
                next(model.parameters()).data[0] = torch.inf

    monkeypatch.setattr(training, "_HoldZeros", Poison)
    monkeypatch.setattr(training._MaskedTrainer, "training_step", training.Trainer.training_step)
    with pytest.raises(RunError, match=r"embed_tokens.weight has values that are not finite .*kept: .*checkpoint-3"):
        tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **SHORT, **FAST)


def test_early_stop_and_the_best_checkpoint_is_what_is_written(pruned, text, tmp_path, monkeypatch):
    """Held-out loss falls, then rises: training stops, and the lowest one's weights are written."""
    losses = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0])
    kept = {}
    real = training.Trainer.evaluation_loop

    def scripted(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        kept[self.state.global_step] = {k: v.clone() for k, v in self.model.state_dict().items()}
        return output

    monkeypatch.setattr(training.Trainer, "evaluation_loop", scripted)
    options = SHORT | {"evaluations": 12, "patience": 2}
    record = tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **options, **FAST)
    assert (record["steps"], record["held_out_loss"]["best_step"]) == (4, 2)
    assert record["stopped"] == "held-out loss no better in 2 measurements"
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[key], kept[2][key]) for key in written)


@pytest.mark.parametrize("when", ["between measurements", "after training"])
@pytest.mark.parametrize(
    ("patience", "losses"),
    [
        (1, {0: 9.0, 3: 5.0, 6: 4.0, 9: 6.0, 12: 3.0}),  # resumed at the best checkpoint
        (2, {0: 9.0, 3: 5.0, 6: 6.0, 9: 7.0, 12: 3.0}),  # resumed with a measurement counted already
        (3, {0: 9.0, 3: 5.0, 6: 4.0, 9: 6.0, 12: 3.0}),  # goes through
    ],
)
def test_a_resumed_run_stops_early_where_an_uninterrupted_one_does(
    pruned, text, tmp_path, monkeypatch, patience, losses, when
):
    real = training.Trainer.evaluation_loop

    def scripted(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.metrics["eval_loss"] = losses[self.state.global_step]
        return output

    monkeypatch.setattr(training.Trainer, "evaluation_loop", scripted)
    options = {"full": True, "calibration": text, "patience": patience} | SHORT | FAST
    whole = tune(folder := pruned(), out=tmp_path / "whole", **options)
    assert whole["steps"] == (12 if patience == 3 else 9)
    step = training._Watch.on_step_end

    def interrupt(self, args=None, state=None, control=None, **keywords):
        if state is None or state.global_step == 7:
            raise KeyboardInterrupt
        step(self, args, state, control, **keywords)

    with monkeypatch.context() as stopping:
        if when == "between measurements":
            stopping.setattr(training._Watch, "on_step_end", interrupt)
        else:
            stopping.setattr(training._MaskedTrainer, "trained_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(folder, out=tmp_path / "stopped", **options)
    resumed = tune(folder, out=tmp_path / "stopped", resume=True, **options)
    for key in ("steps", "stopped", "held_out_loss", "history"):
        assert resumed[key] == whole[key], key
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_tuning_that_does_not_help_writes_nothing(pruned, text, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    real = training.Trainer.evaluation_loop

    def scripted(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    monkeypatch.setattr(training.Trainer, "evaluation_loop", scripted)
    with pytest.raises(
        RunError, match=r"did not help: the held-out loss was 1.0000 before and at least 2.0000 afterwards"
    ):
        tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **SHORT, **FAST)
    assert not (tmp_path / "out").exists()


def test_the_time_limit_stops_in_order(pruned, text, tmp_path):
    record = tune(pruned(), out=tmp_path / "out", full=True, calibration=text, minutes=1e-9, warmup=0, **SHORT, **FAST)
    assert record["steps"] == 1 and record["stopped"].startswith("after")


def test_several_processes_stop_together_when_time_is_up(pruned, text, tmp_path):
    """The second process's clock is an hour ahead, the first one's is not: all take the first one's decision."""
    arguments = ["tune", pruned(), "--out", tmp_path / "out", "--full", "--calibration", text, "--minutes", 10]
    arguments += [arg for name, value in SHORT.items() for arg in (f"--{name.replace('_', '-')}", value)]
    job = f"""
import os, signal, time
signal.alarm(60)  # a process that waits for the other in vain is killed
os.environ["LOCAL_RANK"] = os.environ["RANK"]
import wanda.recovery.trainer as training
from wanda.cli import main
real = training._Watch.on_train_begin
def begin(self, *args, **keywords):
    real(self, *args, **keywords)
    self.start -= 3600 * int(os.environ["RANK"])
training._Watch.on_train_begin = begin
try:
    main({[str(argument) for argument in arguments]!r})
finally:
    import torch.distributed
    torch.distributed.destroy_process_group()
"""
    server = Server()
    try:
        codes, texts = server.run(2, tmp_path / "logs", job)
    finally:
        server.close()
    assert codes == [0, 0], texts
    record = json.loads((tmp_path / "out/wanda.json").read_text())["tune"]
    assert (record["steps"], record["stopped"]) == (SHORT["steps"], "all steps done")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "pruned", tmp_path / "out"))
    assert all(torch.equal(before[key] != 0, after[key] != 0) for key in pruned_keys(tmp_path / "pruned"))


def test_bfloat16_weights_are_trained_in_float32_and_stored_as_they_were(text, tmp_path):
    folder = prune_by_hand(
        tiny_llama(tmp_path / "dense", dtype=torch.bfloat16, tie_word_embeddings=True), tmp_path / "p"
    )
    tune(folder, out=tmp_path / "out", full=True, calibration=text, **SHORT, progress=False)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(after[key].dtype == torch.bfloat16 for key in after)
    assert all(torch.equal(before[key] != 0, after[key] != 0) for key in pruned_keys(folder))


def test_all_faults_at_once_before_anything_is_loaded(pruned, text, tmp_path):
    folder = pruned()
    with pytest.raises(ConfigurationError) as caught:
        tune(
            folder,
            out=folder,
            lora=True,
            full=True,
            steps=0,
            batch=3,
            micro_batch=2,
            dropout=1.0,
            calibration="nosuch",
            seed=-1,
        )
    faults = "\n".join(caught.value.faults)
    for part in (
        "one of --lora",
        "--steps 0",
        "--seed -1",
        "no multiple of --micro-batch",
        "--dropout",
        "nosuch",
        "is the input",
    ):
        assert part in faults
    with pytest.raises(ConfigurationError, match=r"above the model's context of 128"):
        tune(folder, out=tmp_path / "out", full=True, seqlen=129, calibration=text)
    with pytest.raises(ConfigurationError, match=r"training text .* is too short"):
        tune(folder, out=tmp_path / "out", full=True, seqlen=128, calibration=_short(tmp_path))
    assert not (tmp_path / "out.partial").exists()


def test_options_of_the_adapter_are_refused_where_there_is_none(pruned, text, tmp_path):
    options = {"rank": 64, "alpha": 3, "dropout": 0.9, "target": "all", "sparse_aware": True}
    with pytest.raises(ConfigurationError) as caught:
        tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **options)
    (fault,) = caught.value.faults
    for part in ("--rank 64", "--alpha 3", "--dropout 0.9", "--target all", "--sparse-aware", "nothing with --full"):
        assert part in fault


def test_a_batch_that_the_devices_cannot_share_is_refused_before_loading(pruned, text, tmp_path, monkeypatch):
    """8 sequences on 3 devices would be 6: neither that nor a silent 9."""
    monkeypatch.setattr(training, "processes", lambda _: SimpleNamespace(num_processes=3, is_main_process=True))
    monkeypatch.setattr("wanda.recovery.tune.load_model", lambda *_: pytest.fail("loaded"))
    options = SHORT | {"batch": 8, "micro_batch": 1}
    with pytest.raises(ConfigurationError, match=r"--batch 8 .* 3 devices .*--micro-batch 1.* 6 or 9"):
        tune(pruned(), out=tmp_path / "out", full=True, calibration=text, **options)
    assert not (tmp_path / "out.partial").exists()


def test_a_packed_model_is_refused_with_the_cure(pruned, tmp_path):
    pack(pruned(), tmp_path / "packed")
    with pytest.raises(ConfigurationError, match=r"packed weights cannot be trained; unpack it: wanda unpack .*packed"):
        tune(tmp_path / "packed", out=tmp_path / "out", full=True, calibration="builtin")


def _short(folder: Path) -> str:
    file = folder / "short.txt"
    file.write_text("the lazy dog", encoding="utf-8")
    return str(file)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_fused_experts_go_back_to_their_names_on_disk_with_the_same_zeros(text, tmp_path):
    torch.manual_seed(0)
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**size, **heads, max_position_embeddings=128, bos_token_id=0, eos_token_id=1)
    dense = saved(MixtralForCausalLM(config).to(torch.bfloat16), tmp_path / "dense")
    prune(dense, out=tmp_path / "pruned", method="magnitude", pattern="2:4", progress=False)
    record = tune(tmp_path / "pruned", out=tmp_path / "out", full=True, calibration=text, **SHORT, **FAST)
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "out")
    assert before.keys() == after.keys() and any(".experts.3." in key for key in before)
    sparse = [key for key, weight in before.items() if int((weight == 0).sum()) * 2 == weight.numel()]
    assert sum(before[key].numel() for key in sparse) == record["pruned_matrices_weights"]
    for key in sparse:
        assert torch.equal(before[key] != 0, after[key] != 0) and not torch.equal(before[key], after[key])


def test_transposed_layers_are_adapted_through_their_masks(text, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)
    dense = saved(GPT2LMHeadModel(config), tmp_path / "dense")
    prune(dense, out=tmp_path / "pruned", method="magnitude", sparsity=0.5, progress=False)
    options = SHORT | FAST | {"lora": True, "sparse_aware": True, "target": "all", "gradient_checkpointing": True}
    record = tune(tmp_path / "pruned", out=tmp_path / "adapter", calibration=text, **options)
    assert record["held_out_loss"]["best"] < record["held_out_loss"]["before"]
    assert merge(tmp_path / "pruned", tmp_path / "adapter", out=tmp_path / "out")["zeros"] == record["zeros"]
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "out")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == 8 and all(torch.equal(before[key] != 0, after[key] != 0) for key in before)
