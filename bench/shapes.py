"""Checkpoints to measure on: LLaMA shapes with random bfloat16 weights, the first blocks of a real model, plain text.

Speed and memory of pruning do not depend on the values of the weights, so that a shape stands for the real model.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wanda.checkpoint.source import weight_files
from wanda.checkpoint.tensors import Entry, read_header, write_file
from wanda.checkpoint.writer import INDEX

_BLOCK = re.compile(r"\blayers\.(\d+)\.")


def make_llama(folder: Path, shape: dict[str, Any], seed: int = 0) -> Path:
    """A LLaMA checkpoint with random weights, a shard a block, one block in memory at a time.

    shape: fields of LlamaConfig. Its tokenizer knows bytes only: a token is a byte of the text.
    """
    config = LlamaConfig(**({"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None} | shape))
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        found = _BLOCK.search(name)
        shards.setdefault(f"block {found[1]}" if found else "outside", []).append((name, parameter.shape))
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, entries in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _weight(size, generator) for name, size in entries}
        write_file(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_index(folder, weight_map, total)
    config.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:  # a norm's gain
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_text(file: Path, tokens: int, seed: int = 0) -> str:
    """Random words in `file`, enough for so many tokens of a byte tokenizer; the file as a calibration SOURCE."""
    draw = random.Random(seed)
    words, length = [], 0
    while length <= 2 * tokens:
        words.append("".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 9))))
        length += len(words[-1]) + 1
    file.write_text(" ".join(words), encoding="ascii")
    return str(file)


def first_blocks(source: Path, folder: Path, blocks: int) -> Path:
    """A checkpoint of the first so many blocks of `source`, and of all that is not a block."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    kept: dict[str, Tensor | Entry] = {}
    for file in weight_files(source):
        for key, entry in read_header(file)[0].items():
            found = _BLOCK.search(key)
            if not found or int(found[1]) < blocks:
                kept[key] = entry
    write_file(folder / "model.safetensors", kept, {"format": "pt"})
    return folder


def _write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
