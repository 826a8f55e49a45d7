"""Every architecture: blocks are found, and replaying them with their recorded arguments is bit-exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from architectures import DENSE, EXPERTS, saved, tiny
from models import VOCABULARY
from wanda.blocks import find_blocks, record, refuse_changed_arguments
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.skeleton import Skeleton
from wanda.errors import ConfigurationError, RunError


def ids(samples: int = 4, seqlen: int = 16) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(1))


def last_block_output(model: nn.Module, block: nn.Module, tokens: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", DENSE + EXPERTS)
def test_blocks_loaded_one_by_one_replay_the_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint.open(tmp_path), torch.float32, torch.device("cpu"))
    tokens = ids()
    with torch.no_grad():
        skeleton.load_outside()
        recording = record(skeleton.model, skeleton.blocks, [tokens])
        hidden = recording.hidden[0]
        for index, block in enumerate(skeleton.blocks.modules):
            skeleton.load_block(index)
            hidden = refuse_changed_arguments(recording.calls[0][index], block, hidden, f"block {index}")
            skeleton.drop_block(index)
    assert len(skeleton.blocks) == 4
    assert all(parameter.is_meta for block in skeleton.blocks.modules for parameter in block.parameters())
    expected = last_block_output(model, model.get_submodule(skeleton.blocks.name)[-1], tokens)
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss", "modernbert-decoder"])
def test_the_first_blocks_arguments_would_be_wrong_for_all_blocks(kind: str) -> None:
    """Why every block's own arguments are recorded: block 0's give other activations in these models."""
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2} if kind == "gemma3_text" else {}
    model = tiny(kind, **mixed)
    blocks, tokens = find_blocks(model), ids(seqlen=32)
    with torch.no_grad():
        recording = record(model, blocks, [tokens])
        hidden = recording.hidden[0]
        for block in blocks.modules:
            hidden = recording.calls[0][0].run(block, hidden)
    assert not torch.equal(hidden, last_block_output(model, blocks.modules[-1], tokens))


def test_micro_batches_share_equal_arguments() -> None:
    model = tiny("gemma2")
    with torch.no_grad():
        recording = record(model, find_blocks(model), list(ids().split(1)))
    masks = [calls[0].kwargs["attention_mask"] for calls in recording.calls]
    assert all(mask is masks[0] for mask in masks)


class Leaky(nn.Module):
    """Wraps a block and hands more than hidden states on, through an argument that it changes in place."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, notes: list[int]) -> Tensor:
        notes.append(1)
        return hidden


def test_a_block_that_changes_an_argument_is_refused_by_name() -> None:
    from wanda.blocks import Call

    call = Call((["note"],), {}, 0)
    with pytest.raises(RunError, match=r"model\.layers\.3 cannot be walked.*changes its argument"):
        refuse_changed_arguments(call, Leaky(nn.Identity()), torch.zeros(1, 2, 3), "model.layers.3")


def test_a_model_that_hands_activations_from_block_to_block_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny("llama")
    decoder = model.get_decoder()
    inner = type(decoder.layers[0]).forward

    class Sideways(type(decoder.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states, extra=None, **kwargs):  # type: ignore[no-untyped-def]
            return inner(self, hidden_states, **kwargs)

    for layer in decoder.layers:
        layer.__class__ = Sideways

    def forward(input_ids=None, use_cache=False, **kwargs):  # type: ignore[no-untyped-def]
        hidden = decoder.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        angles = decoder.rotary_emb(hidden, places)
        for layer in decoder.layers:
            hidden = layer(hidden, extra=hidden.mean(), position_embeddings=angles, attention_mask=None)
        return decoder.norm(hidden)

    decoder.forward = forward
    with torch.no_grad(), pytest.raises(RunError, match="cannot be walked block by block: its block 1 gets extra"):
        record(model, find_blocks(model), [ids()])


def test_shared_blocks_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    layers = model.get_decoder().layers
    layers[2].mlp = layers[0].mlp
    with pytest.raises(ConfigurationError, match="blocks 0 and 2 share mlp"):
        find_blocks(model)


def test_a_model_without_blocks_is_refused() -> None:
    model = tiny("llama")
    model.config.num_hidden_layers = 77
    with pytest.raises(ConfigurationError, match="no list of 77 blocks"):
        find_blocks(model)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    skeleton = Skeleton(Checkpoint.open(folder), torch.float32, torch.device("cpu"))
    with pytest.raises(RunError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        skeleton.load_block(2)
