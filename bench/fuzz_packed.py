"""Fuzz the packed format: damage a small packed checkpoint in thousands of ways; each must be refused or work.

    python bench/fuzz_packed.py --files 10000 --out bench/results/fuzz_packed.json

Some are changed at random; others lie: matrices and headers of other types and shapes, absurd dimensions, odd names of
files. Half of the files get new checksums after the damage, so that it is the structure that has to be checked. A file
that is not refused is used: every matrix is multiplied on every kernel path of this machine and expanded; without new
checksums every tensor must be what it was, bit for bit, in its type and shape. The work is done in processes of their
own: one that dies counts as a crash, with its seed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanda.checkpoint.packed import PackedCheckpoint

BATCH = 500  # files a process
COUNTS = [0, 1, 2, 63, 64, 65, 128, 2**31, 2**32, 2**63, 2**64, 10**30, -1, 1.5, "8", None, [], True]
TYPES = ["BF16", "F16", "F32", "F64", "I16", "I64", "U8", "U64", "BOOL", "F4", 3, None, []]
OTHERS = {"BF16": "F16", "F16": "BF16", "F32": "U32", "U32": "F32", "U64": "F64"}  # types of as many bytes
NAMES = ["", ".", "..", "a\0b", "a/b", "/dev/zero", "\ud800", "n" * 300, "absent.safetensors", 7, None, {}]


def make(folder: Path) -> Path:
    """A packed checkpoint of three matrices (bfloat16, float16, float32) and one dense tensor, a few KB."""
    import torch

    from wanda.checkpoint.packed import pack
    from wanda.checkpoint.tensors import write_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype, shape in (
        ("a.weight", torch.bfloat16, (16, 70)),
        ("b.weight", torch.float16, (9, 128)),
        ("c.weight", torch.float32, (12, 65)),
    ):
        weight = torch.randn(shape, generator=generator)
        tensors[name] = torch.where(torch.rand(shape, generator=generator) < 0.7, 0, weight).to(dtype)
    tensors["norm.weight"] = torch.ones(8)
    source = folder / "source"
    source.mkdir(parents=True)
    write_file(source / "model.safetensors", tensors, {"format": "pt"})
    (source / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    pack(str(source), folder / "plain")
    pack(str(source), folder / "compressed", compress=True)
    return folder


def damage(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled, moved or made up."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        kind = chance.randrange(7)
        at = chance.randrange(len(changed) + 1)
        length = chance.choice((1, 2, 4, 8, 64))
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + length] = chance.randbytes(len(changed[at : at + length]))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed[at:at] = chance.randbytes(length)
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            value = chance.choice((0, 1, 0x7F, 0xFF))
            changed[at : at + length] = bytes([value]) * len(changed[at : at + length])
        else:
            start = chance.randrange(len(changed) + 1)
            piece = changed[start : start + length]
            changed[at : at + len(piece)] = piece
    return bytes(changed)


def lie(header: dict[str, Any], chance: random.Random) -> None:
    """Another type, shape or place for one tensor of a safetensors header, mostly of as many bytes."""
    entry = header[chance.choice(sorted(set(header) - {"__metadata__"}))]
    kind = chance.randrange(6)
    if kind == 0:
        entry["dtype"] = chance.choice(TYPES)
    elif kind == 1:
        entry["dtype"] = OTHERS.get(entry["dtype"], "I8")
    elif kind == 2 and entry["shape"]:
        size = entry["shape"][0]
        entry["shape"] = chance.choice(([size, 1], [1, size], [2, size // 2], [size // 2, 2], [1] * 70 + [size]))
    elif kind == 3:
        entry["shape"] = chance.choice(([0, 10**30], [0, 2**62, 2**62], [0, 2**63], [-1, -4], "8", [[]], {}, 5, None))
        if chance.random() < 0.8:
            entry["data_offsets"] = [entry["data_offsets"][0]] * 2
    elif kind == 4:
        entry["shape"] = [*entry["shape"], chance.choice(COUNTS)]
    else:
        entry["data_offsets"][chance.randrange(2)] = chance.choice(COUNTS)


def rewrite_header(file: Path, chance: random.Random) -> dict[str, Any]:
    """`lie` in the header of a file, whose data stays as it is; returns the new header."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    lie(header, chance)
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % 64)
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    return header


def mutate(folder: Path, chance: random.Random) -> bool:
    """Damage one file of a packed folder; whether types, shapes and checksums in the manifest follow."""
    from wanda.checkpoint.packed import MANIFEST, manifest_checksum
    from wanda.checkpoint.tensors import read_header
    from wanda.errors import RunError

    data, manifest = folder / "packed-00001.safetensors", folder / MANIFEST
    kind = chance.randrange(6)
    if kind == 0:
        manifest.write_bytes(damage(manifest.read_bytes(), chance))
    elif kind == 1:
        data.write_bytes(damage(data.read_bytes(), chance))
    elif kind == 2 and chance.random() < 0.5:
        rewrite_header(data, chance)
    else:  # checksums are right
        import xxhash

        description = json.loads(manifest.read_text())
        entries, _ = read_header(data)
        if kind == 2:
            for key, said in rewrite_header(data, chance).items():
                if key != "__metadata__":
                    description["tensors"][key].update(dtype=said["dtype"], shape=said["shape"])
        elif kind == 3:
            description["files"][chance.randrange(2) :] = [chance.choice(NAMES)]
        elif kind == 4:
            entry = entries[chance.choice(sorted(entries))]
            whole = bytearray(data.read_bytes())
            part = damage(bytes(whole[entry.offset : entry.offset + entry.nbytes]), chance)[: entry.nbytes]
            whole[entry.offset : entry.offset + len(part)] = part
            data.write_bytes(whole)
        else:
            matrix = description["matrices"][chance.choice(sorted(description["matrices"]))]
            place = chance.choice(("dtype", "shape", "survivors"))
            if place == "shape" and chance.random() < 0.8:
                matrix["shape"][chance.randrange(2)] = chance.choice(COUNTS)
                if chance.random() < 0.3:
                    matrix["shape"] = [0, chance.choice(COUNTS)]
            else:
                matrix[place] = chance.choice([*COUNTS, *TYPES])
        try:
            entries, _ = read_header(data)
        except RunError:
            return True
        whole_file = data.read_bytes()
        for key, entry in entries.items():
            piece = whole_file[entry.offset : entry.offset + entry.nbytes]
            description["tensors"][key]["checksum"] = xxhash.xxh3_64_hexdigest(piece)
        description["checksum"] = manifest_checksum(description)
        manifest.write_text(json.dumps(description))
        return True
    return False


def contents(checkpoint: PackedCheckpoint) -> dict[str, tuple[Any, ...]]:
    """Type, shape and bytes of everything in a packed checkpoint."""
    from wanda.checkpoint.tensors import bytes_of

    tensors = {**checkpoint.tensors, **{key: matrix.dense() for key, matrix in checkpoint.matrices.items()}}
    return {key: (tensor.dtype, tensor.shape, bytes(bytes_of(tensor))) for key, tensor in tensors.items()}


def attempt(folder: Path, original: Path | None) -> str:
    """ "refused", naming something, or "worked": every kernel ran over what was accepted, which is what `original`
    holds.

    original: None where the checksums were made anew, so that other contents are no damage.
    """
    import torch

    from wanda.checkpoint.packed import open_packed
    from wanda.errors import WandaError
    from wanda.kernels import packed as kernels
    from wanda.kernels.native import native

    try:
        checkpoint = open_packed(folder)
    except WandaError as error:
        if not str(error):
            raise AssertionError("refused without a word") from error
        return "refused"
    if original is not None and contents(checkpoint) != contents(open_packed(original)):
        raise AssertionError("what was changed has been accepted")
    module = native()
    best = module.best_level() if module is not None else 0
    for matrix in checkpoint.matrices.values():
        for level in range(best + 1):
            kernels.level = lambda level=level: level  # type: ignore[attr-defined]
            for dtype in {matrix.dtype, torch.float32}:
                matrix.dense(dtype=dtype)
                for columns in (1, 5, 33):
                    matrix.multiply(torch.ones(columns, matrix.width, dtype=dtype))
    return "worked"


def run_batch(origin: Path, seeds: range) -> dict[str, int]:
    """Fuzz with each seed; counts of what happened."""
    counts = {"refused": 0, "worked": 0}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in seeds:
            chance = random.Random(seed)
            folder = Path(temporary) / "packed"
            shutil.rmtree(folder, ignore_errors=True)
            original = origin / chance.choice(("plain", "compressed"))
            shutil.copytree(original, folder)
            remade = mutate(folder, chance)
            print(seed, file=sys.stderr, flush=True)
            counts[attempt(folder, None if remade else original)] += 1
    return counts


def main() -> None:
    from options import positive

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=positive, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch:
        origin, first, last = arguments.batch
        print(json.dumps(run_batch(Path(origin), range(int(first), int(last)))))
        return
    total = {"files": arguments.files, "seed": arguments.seed, "refused": 0, "worked": 0, "crashed": 0}
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        origin = make(Path(temporary))
        for first in range(arguments.seed, arguments.seed + arguments.files, BATCH):
            last = min(first + BATCH, arguments.seed + arguments.files)
            command = [sys.executable, __file__, "--batch", str(origin), str(first), str(last)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                total["crashed"] += 1
                failures.append(f"status {done.returncode}: {done.stderr[-2000:]}")
                continue
            for name, count in json.loads(done.stdout).items():
                total[name] += count
            print(f"{last - arguments.seed} files: {total}", file=sys.stderr, flush=True)
    print(json.dumps(total))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(total, indent=1) + "\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
