"""One layer at a time, packed against torch's dense product: the measurements behind src/wanda/runtime/choice.py.

    OMP_NUM_THREADS=1 python bench/layer_choice.py --out bench/results/layer_choice.json

Packed values are stored in one type and multiplied in another one or the same; torch's dense matrix is in the second.
Every kernel path runs in a process of its own (WANDA_KERNELS), against torch as it is ("own") and against torch held to
the instructions of that path ("same"), which is what a machine without the others has. "beyond" goes from one copy of
the matrix to the next, so that none lies in a cache, as when a whole model decodes; "cached" takes the same one again.
Ratios are torch's time over ours, round by round in one process: above 1 packed is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from options import positive
from wanda.kernels.native import LEVELS, native

TYPES = (  # stored, computed in
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
)
SHAPES = ((576, 576), (1536, 576), (2048, 5632))
BEYOND = 160 << 20  # bytes of copies that are gone through
HELD = {  # environment that holds torch's libraries to a path's instructions
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}


def measure(rounds: int) -> list[dict[str, Any]]:
    """All shapes, types and sparsities on this process's path."""
    import torch
    from torch.nn import functional

    from wanda.kernels.packed import PackedMatrix
    from wanda.runtime.measure import Spread, alternate, ratios

    rows = []
    for stored, computed in TYPES:
        dtype: torch.dtype = getattr(torch, computed)
        for sparsity in (0.5, 0.7):
            for out, width in SHAPES:
                torch.manual_seed(0)
                weight = torch.where(torch.rand(out, width) < sparsity, 0, torch.randn(out, width))
                packed = PackedMatrix.pack(weight.to(getattr(torch, stored)))
                dense = packed.dense().to(dtype)
                copies = max(1, BEYOND // dense.nbytes)
                denses = [dense.clone() for _ in range(copies)]
                packs = [
                    PackedMatrix(out, width, packed.mask.clone(), packed.offsets.clone(), packed.values.clone())
                    for _ in range(copies)
                ]
                for tokens, where in ((1, "beyond"), (1, "cached"), (128, "cached")):
                    x = torch.randn(tokens, width).to(dtype)
                    turns = {0: 0, 1: 0}
                    repeats = max(1, 4_000_000 // dense.numel()) if tokens == 1 else 1

                    def dense_turn() -> float:
                        start = time.perf_counter()
                        for _ in range(repeats):  # noqa: B023
                            if where == "beyond":  # noqa: B023
                                turns[0] = (turns[0] + 1) % copies  # noqa: B023
                            functional.linear(x, denses[turns[0]])  # noqa: B023
                        return (time.perf_counter() - start) / repeats  # noqa: B023

                    def packed_turn() -> float:
                        start = time.perf_counter()
                        for _ in range(repeats):  # noqa: B023
                            if where == "beyond":  # noqa: B023
                                turns[1] = (turns[1] + 1) % copies  # noqa: B023
                            packs[turns[1]].multiply(x)  # noqa: B023
                        return (time.perf_counter() - start) / repeats  # noqa: B023

                    with torch.no_grad():
                        taken = alternate({"torch": dense_turn, "packed": packed_turn}, rounds)
                    ratio = ratios(taken["torch"], taken["packed"])
                    rows.append(
                        {
                            "dtype": stored,
                            "computed": computed,
                            "sparsity": sparsity,
                            "shape": [out, width],
                            "tokens": tokens,
                            "where": where,
                            **{f"{k}_us": round(Spread.of(v).median * 1e6, 1) for k, v in taken.items()},
                            "ratio": [round(n, 3) for n in (ratio.median, ratio.low, ratio.high)],
                        }
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--paths", nargs="*", help="kernel paths; all that this machine has")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.rounds)))
        return
    module = native()
    if module is None:
        parser.error("the C kernels are not compiled here")
    there = LEVELS[: module.best_level() + 1]
    if unknown := [path for path in arguments.paths or [] if path not in there]:
        parser.error(f"this machine has no kernel path {', '.join(unknown)}; it has {', '.join(there)}")
    rows = []
    for path in arguments.paths or there:
        for torch_is, held in (("own", {}), ("same", HELD[path])) if HELD[path] else (("own", {}),):
            command = [sys.executable, __file__, "--measure", "--rounds", str(arguments.rounds)]
            environment = {**os.environ, **held, "WANDA_KERNELS": path}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            for row in json.loads(done.stdout):
                rows.append({"path": path, "torch": torch_is, **row})
            print(f"{path} against torch's {torch_is} instructions", file=sys.stderr, flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
