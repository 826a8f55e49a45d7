"""Price of choosing the masks of a block beside the block's own forward pass, on SmolLM2-135M-Instruct.

    python bench/masks.py [--samples 32] [--seqlen 1024] [--rounds 5] [--block 15] [--model DIR]
                          [--out bench/results/masks.json]

In every round the block's forward pass over all calibration tokens, then the masks of its seven matrices in every
pattern, from Wanda's scores with the block's own input norms. The scores are not in the price, which is in per cent of
the forward pass just before.
"""

from __future__ import annotations

import argparse
import time
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from facts import facts, save, spread, spread_text
from options import positive
from wanda.blocks import find_blocks, record
from wanda.checkpoint.source import load_model
from wanda.demo import model_folder
from wanda.patterns import NM, Pattern, Unstructured
from wanda.plan import BATCH_TOKENS

HALF = Fraction(1, 2)
PATTERNS: dict[str, Pattern] = {
    "50% of each row": Unstructured(HALF),
    "50% of the matrix": Unstructured(HALF, "layer"),
    "50% of each column": Unstructured(HALF, "column"),
    "50% of 128 columns of a row": Unstructured(HALF, 128),
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
}


def input_norms(block: nn.Module, forward: list) -> dict[nn.Linear, Tensor]:
    """The L2 norm of every input feature of the block's linear layers over what `forward` runs: [in] each."""
    squares: dict[nn.Linear, Tensor] = {}

    def hook(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        squares[layer] = squares.get(layer, 0) + inputs[0].float().flatten(0, -2).square().sum(dim=0)

    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
    for run in forward:
        run()
    for handle in hooks:
        handle.remove()
    return {layer: total.sqrt() for layer, total in squares.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=positive, default=32)
    parser.add_argument("--seqlen", type=positive, default=1024)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--model", type=Path, help="another model than the demo's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "masks.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result = facts()
    model = load_model(arguments.model or model_folder(), "auto", "cpu", False)
    blocks = find_blocks(model)
    if not 0 <= arguments.block < len(blocks):
        parser.error(f"--block {arguments.block} is none of the model's; they are 0 to {len(blocks) - 1}")
    block = blocks.modules[arguments.block]
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (arguments.samples, arguments.seqlen))
    recording = record(model, blocks, ids.split(max(1, BATCH_TOKENS // arguments.seqlen)))
    calls = [batch[arguments.block] for batch in recording.calls]
    hidden = [recording.hidden[index] for index in range(len(calls))]
    forward = [
        lambda call=call, states=states: call.run(block, states) for call, states in zip(calls, hidden, strict=True)
    ]
    norms = input_norms(block, forward)
    scores = [layer.weight.float().abs() * norm for layer, norm in norms.items()]
    shares: dict[str, list[float]] = {name: [] for name in PATTERNS}
    passes = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        for run in forward:
            run()
        passes.append(time.perf_counter() - start)
        for name, pattern in PATTERNS.items():
            start = time.perf_counter()
            for score in scores:
                pattern.mask(score)
            shares[name].append(100 * (time.perf_counter() - start) / passes[-1])
    result |= {
        "block": arguments.block,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": [arguments.samples, arguments.seqlen],
        "weights": sum(score.numel() for score in scores),
        "forward_seconds": spread(passes),
        "percent_of_the_forward_pass": {name: spread(values) for name, values in shares.items()},
    }
    save(arguments.out, result)
    table = Table(title=f"{len(scores)} masks, forward pass {spread_text(result['forward_seconds'])} s")
    table.add_column("pattern")
    table.add_column("% of the forward pass", justify="right")
    for name, values in result["percent_of_the_forward_pass"].items():
        table.add_row(name, spread_text(values))
    Console().print(table)


if __name__ == "__main__":
    main()
