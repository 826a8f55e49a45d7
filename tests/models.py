"""Tiny models and a tiny tokenizer, built offline in a moment; shared by all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LINES = (
    "the quick brown fox jumps over the lazy dog and the dog sleeps on",
    "a statement is executed once for every item of the sequence",
    "weights that are small and inputs that are quiet may go",
)
VOCABULARY = 300


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens: any text can be encoded, and every token is at least one byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of four blocks of width 32; keywords change the config."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return LlamaConfig(**(options | changes))


def tiny_llama(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB", **changes: Any
) -> Path:
    """Save a tiny Llama with a tokenizer into `folder` and return it; keywords change the config.

    The weights are larger than an untrained model's, so that layers and positions differ clearly in their activations.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else 0.2))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder
