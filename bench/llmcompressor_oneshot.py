"""One run of llmcompressor's Wanda, timed inside its own process; bench/prune_speed.py starts it in llmcompressor's
virtual environment, where nothing of this project is installed.

    python bench/llmcompressor_oneshot.py MODEL TOKENS.safetensors --batch 1 --dtype bfloat16 --threads 2

Times the call of oneshot alone: the model is in memory, the token ids are a dataset already, nothing is written. Its
last line on standard output is JSON: seconds, the share of zeros in the rows of the blocks' matrices, versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="token_ids [samples, seqlen]")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    arguments = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    ids = load_file(arguments.tokens)["token_ids"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    head = model.get_output_embeddings().weight.detach().clone()
    dataset = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    recipe = WandaPruningModifier(sparsity=arguments.sparsity, targets=["Linear"], ignore=["re:.*lm_head"])
    start = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=dataset,
        recipe=recipe,
        batch_size=arguments.batch,
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        max_seq_length=ids.shape[1],
        pipeline="sequential",
    )
    seconds = time.perf_counter() - start
    if not torch.equal(head, model.get_output_embeddings().weight):
        raise SystemExit("oneshot changed the output head, which wanda leaves dense: the two runs do not compare")
    shares = [
        (module.weight == 0).float().mean(dim=1)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    zeros = torch.cat(shares)
    names = ("llmcompressor", "torch", "transformers", "compressed-tensors")
    found = {
        "seconds": seconds,
        "matrices": len(shares),
        "zeros_of_a_row": {"min": zeros.min().item(), "mean": zeros.mean().item(), "max": zeros.max().item()},
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
