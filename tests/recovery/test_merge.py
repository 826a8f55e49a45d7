"""Adapters: saved as ordinary ones, merged under the masks, and exactly what was trained when trained through them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from byhand import is_pruned, prune_by_hand
from wanda.checkpoint.source import load_model
from wanda.errors import ConfigurationError
from wanda.recovery.lora import adapted_layers, add_adapter, merged_weights
from wanda.recovery.masks import read_masks
from wanda.recovery.merge import merge
from wanda.recovery.settings import Settings
from wanda.recovery.tune import tune

pytest.importorskip("peft")
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

OPTIONS = {
    "steps": 8,
    "seqlen": 32,
    "batch": 4,
    "evaluations": 2,
    "held_out": 4,
    "device": "cpu",
    "learning_rate": 1e-2,
    "progress": False,
}


@pytest.mark.parametrize("target", ["qv", "all"])
def test_tuned_adapter_merges_by_the_formula(pruned, text, tmp_path, target):
    folder = pruned()
    record = tune(
        folder, out=tmp_path / "adapter", lora=True, target=target, rank=4, alpha=6, calibration=text, **OPTIONS
    )
    assert record["held_out_loss"]["best"] < record["held_out_loss"]["before"]
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 4
    merged = merge(folder, tmp_path / "adapter", out=tmp_path / "masked")
    loose = merge(folder, tmp_path / "adapter", out=tmp_path / "loose", mask=False)
    before, masked, unmasked = (
        load_file(f / "model.safetensors") for f in (folder, tmp_path / "masked", tmp_path / "loose")
    )
    adapted = 0
    for key, weight in before.items():
        a = adapter.get(f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight")
        if a is None:
            assert torch.equal(masked[key], weight) and torch.equal(unmasked[key], weight)
            continue
        adapted += 1
        update = adapter[f"base_model.model.{key.removesuffix('.weight')}.lora_B.weight"] @ a * (6 / 4)
        torch.testing.assert_close(unmasked[key], weight + update)
        torch.testing.assert_close(masked[key], (weight + update) * (weight != 0))
        assert torch.equal(masked[key] != 0, weight != 0) and not bool((unmasked[key] == 0).all())
    assert adapted == merged["merged_matrices"] == (28 if target == "all" else 8)
    assert merged["zeros"] == record["zeros"] and loose["zeros"] < merged["zeros"]
    reports = {name: json.loads((tmp_path / name / "wanda.json").read_text()) for name in ("masked", "loose")}
    assert len(reports["masked"]["layers"]) == 28 and len(reports["loose"]["layers"]) == 28 - adapted
    assert "dense again" in (tmp_path / "loose/README.md").read_text()


def test_an_adapter_trained_through_the_masks_loses_nothing_by_merging(pruned, text, tmp_path):
    folder = pruned()
    options = OPTIONS | {"dropout": 0.0}
    tune(folder, out=tmp_path / "adapter", lora=True, sparse_aware=True, target="all", calibration=text, **options)
    record = merge(folder, tmp_path / "adapter", out=tmp_path / "merged")
    assert record["sparse_aware"] and record["zeros"] * 2 == record["pruned_matrices_weights"]
    model = load_model(folder, "float32", "cpu")
    masks = read_masks(model, folder)
    settings = Settings(lora=True, sparse_aware=True, target="all", dropout=0.0)
    tuned = add_adapter(model, masks, settings).eval()
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    tuned.load_state_dict(
        {key.replace(".weight", ".default.weight"): tensor for key, tensor in saved.items()}, strict=False
    )
    ids = torch.arange(40)[None] % 300
    with torch.no_grad():
        trained = tuned(ids).logits
        merged = load_model(tmp_path / "merged", "float32", "cpu")(ids).logits
        pruned_only = load_model(folder, "float32", "cpu")(ids).logits
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert float((merged - pruned_only).abs().max()) > 0.1


def test_through_the_mask_gradients_are_those_of_the_masked_product(pruned):
    """d loss / d B and d loss / d A of y = x (W + M * (B A) s)^T, written out."""
    folder = pruned()
    model = load_model(folder, "float32", "cpu")
    masks = read_masks(model, folder)
    tuned = add_adapter(model, masks, Settings(lora=True, sparse_aware=True, rank=2, alpha=4, dropout=0.0))
    name, layer = next(adapted_layers(tuned))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    mask = masks.parameters[f"{name}.weight"]
    x = torch.randn(5, mask.shape[1])
    y = layer(x)
    weight = layer.get_base_layer().weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(y, x @ (weight + mask * (b @ a) * 2.0).T)
    y.square().sum().backward()
    by_weight = (2 * y).T @ x * mask * 2.0  # d loss / d (B A)
    torch.testing.assert_close(b.grad, by_weight @ a.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.grad, b.T @ by_weight, rtol=1e-4, atol=1e-4)
    assert set(merged_weights(tuned, masks.parameters)) <= {k for k in masks.parameters if is_pruned(k)}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head.weight"),
        (LoraConfig(target_modules=["q_proj"], bias="lora_only"), "q_proj.*bias"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "token"),
        (LoraConfig(target_modules=["embed_tokens"]), "lora_embedding_A"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "magnitude"),
        (LoraConfig(target_modules=["lm_head"]), "lm_head.weight, for which .*bias has no tensor of its own"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "kind IA3"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "kind PROMPT_TUNING"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of peft, on adapters that are odd on purpose
def test_what_merging_would_lose_is_refused(tmp_path, config, part):
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, attention_bias=True, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "dense")
    folder = prune_by_hand(tmp_path / "dense", tmp_path / "bias")
    get_peft_model(LlamaForCausalLM.from_pretrained(folder), config).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    with pytest.raises(ConfigurationError, match=rf"{part}.*merge it with the tool that made it"):
        merge(folder, tmp_path / "adapter", out=tmp_path / "out", mask=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_adapters_that_do_not_fit_are_refused(pruned, text, tmp_path):
    folder = pruned()
    tune(folder, out=tmp_path / "adapter", lora=True, calibration=text, **OPTIONS)
    with pytest.raises(ConfigurationError, match=r"has no adapter_config.json, so it is not an adapter"):
        merge(folder, folder, out=tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"is the input itself"):
        merge(folder, tmp_path / "adapter", out=folder)
    other = shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(ConfigurationError, match=r"other does not fit the model"):
        merge(folder, other, out=tmp_path / "out")
    (other / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ConfigurationError, match=r"other does not fit the model .*missing adapter keys"):
        merge(folder, other, out=tmp_path / "out")
    tensors = load_file(other / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[key]))
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=r"is not plain LoRA .*magnitude.*; merge it with the tool"):
        merge(folder, other, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
