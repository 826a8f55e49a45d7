"""One run on several processes: the masks of one process, whichever ranks see what, and no hang when one is lost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from architectures import saved
from models import LINES, tiny_llama, tiny_tokenizer
from ranks import Server
from wanda.checkpoint.folder import partial_folder
from wanda.errors import ConfigurationError
from wanda.parallel import Ranks

LLAMA = "--samples 10 --seqlen 32 --batch 1"
ROUTED = "--samples 4 --seqlen 3 --batch 1 --expert-tokens 1"  # a rank of four sees few of the experts
RUNS = {  # name: model, options, and what is run before
    "llama-block": ("llama", f"{LLAMA} --propagate block"),
    "llama-layer": ("llama", f"{LLAMA} --propagate layer"),
    "mixtral-block": ("mixtral", f"{ROUTED} --propagate block"),
    "mixtral-layer": ("mixtral", f"{ROUTED} --propagate layer"),
    "everyone": ("mixtral", f"{ROUTED} --experts all"),
    "short": ("llama", "--samples 3 --seqlen 32 --batch 2"),  # two micro-batches: some ranks of four have none
    "owl": ("llama", f"{LLAMA} --method owl"),
    "magnitude": ("llama", "--method magnitude"),
    "sparsegpt-block": ("llama", f"{LLAMA} --method sparsegpt --propagate block"),
    "sparsegpt-layer": ("llama", f"{LLAMA} --method sparsegpt --propagate layer"),
    "sparsegpt-experts": ("mixtral", f"{ROUTED} --method sparsegpt"),
    "sparsegpt-groups": (
        "mixtral",
        f"{ROUTED} --method sparsegpt --propagate block",  # 20 kB: one Gram matrix at once
        "import wanda.plan as p; p.available_memory = lambda device: 20000 << 20; p.EXPERTS_SHARE = 1 << 20",
    ),
    "none": ("llama", f"{LLAMA} --propagate none"),
    "none-groups": (
        "mixtral",
        f"{ROUTED} --method sparsegpt --propagate none",
        "import wanda.plan as p; p.available_memory = lambda device: 20000 << 20; p.EXPERTS_SHARE = 1 << 20",
    ),
    "magnitude-owl": ("llama", f"{LLAMA} --method magnitude --allocation owl"),
    "inherit": ("llama", f"{LLAMA} --method wanda --update pcg --inherit 0.5"),
}
FOUR = (  # on 4 too
    *("llama-block", "llama-layer", "mixtral-block", "mixtral-layer", "short", "sparsegpt-layer"),
    "sparsegpt-groups",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a tiny Llama and a tiny Mixtral."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(" ".join(LINES * 40), encoding="utf-8")
    tiny_llama(folder / "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    tiny_tokenizer().save_pretrained(saved("mixtral", folder / "mixtral", num_hidden_layers=2))
    return folder


def job(inputs: Path, out: Path, model: str, options: str, before: str = "pass") -> str:
    arguments = ["prune", str(inputs / model), "--out", str(out), "--dtype", "float32"]
    arguments += ["--calibration", str(inputs / "text.txt"), *options.split()]
    return f"from wanda.cli import main\nimport os, signal\n{before}\nmain({arguments!r})"


@pytest.fixture(scope="module")
def outputs(server: Server, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The RUNS by 1, 2 and 4 processes: number of processes to the folder of their outputs."""
    folders = {}
    for world in (1, 2, 4):
        folders[world] = folder = tmp_path_factory.mktemp(f"world{world}")
        names = FOUR if world == 4 else tuple(RUNS)
        jobs = [job(inputs, folder / name, *RUNS[name]) for name in names]
        codes, texts = server.run(world, folder / "logs", *jobs)
        assert codes == [0] * world, texts
        assert texts[0].count(", peak memory") == len(names)
        assert all(text == "" for text in texts[1:]), "only the first rank tells anything"
    return folders


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def rows(folder: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads((folder / "wanda.json").read_text())["layers"]}


def agreement(one: Path, other: Path) -> float:
    """Share of the pruned entries that are zero in both or in neither."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    pruned = [key for key, tensor in ours.items() if (tensor == 0).float().mean() > 0.1]
    assert len(pruned) > 10
    same = sum(int(((ours[key] == 0) == (theirs[key] == 0)).sum()) for key in pruned)
    return same / sum(ours[key].numel() for key in pruned)


@pytest.mark.parametrize("name, world", [*((name, 2) for name in RUNS), *((name, 4) for name in FOUR)])
def test_several_processes_prune_as_one(name: str, world: int, outputs: dict[int, Path]) -> None:
    one, several = outputs[1] / name, outputs[world] / name
    expected, found = rows(one), rows(several)
    assert list(expected) == list(found)  # every matrix once, in the same order
    for matrix, row in expected.items():
        assert found[matrix]["tokens"] == row["tokens"]
        assert found[matrix]["removed"] == row["removed"]
    errors = [[row["relative_error"] or 0.0 for row in table.values()] for table in (expected, found)]
    if (
        "sparsegpt" in name or "inherit" in name
    ):  # one weight on the other side of a tie changes the updates of all that follow
        assert sum(errors[1]) == pytest.approx(sum(errors[0]), rel=0.01)
    else:
        assert errors[1] == pytest.approx(errors[0], rel=0.001)
        assert agreement(one, several) > 0.9999


def test_experts_are_seen_by_some_ranks_only(outputs: dict[int, Path]) -> None:
    """Otherwise the runs with experts would not test what they are for."""
    tokens = [row["tokens"] for name, row in rows(outputs[1] / "mixtral-layer").items() if ".experts." in name]
    assert min(tokens) < 4 <= max(tokens)


def test_sums_are_taken_in_the_order_of_the_ranks(server: Server, tmp_path: Path) -> None:
    code = """
import torch
from wanda import parallel
parallel._PIECE = 1000
draw = lambda rank: torch.randn(37, 71, generator=torch.Generator().manual_seed(rank)) * 10 ** torch.arange(71)
with parallel.Ranks.started() as ranks:
    mine = draw(ranks.rank)
    ranks.sum(mine)
    expected = draw(0) + draw(1) + draw(2)
    assert torch.equal(mine, expected)
    view = draw(ranks.rank).to(torch.bfloat16).T
    ranks.broadcast(view, 2)
    assert torch.equal(view, draw(2).to(torch.bfloat16).T)
    assert ranks.exchange("x" * 3000 * ranks.rank) == ["", "x" * 3000, "x" * 6000]
"""
    codes, texts = server.run(3, tmp_path / "logs", code)
    assert codes == [0, 0, 0], texts


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("samples, batch", [(7, 2), (4, 4), (9, 1)])
def test_samples_are_split_into_whole_micro_batches_in_order(world: int, samples: int, batch: int) -> None:
    tokens = torch.arange(samples)[:, None]
    parts = [Ranks(rank, world).split(tokens, batch) for rank in range(world)]
    assert torch.equal(torch.cat(parts), tokens)
    assert all(int(part[0]) % batch == 0 for part in parts if len(part))
    counts = [-(-len(part) // batch) for part in parts]
    assert max(counts) - min(counts) <= 1


KILL = """
from wanda.block_loop import BlockLoop
solve = BlockLoop._solve
def patched(self, index, *rest):
    if index == 2 and self.ranks.rank == {rank}:
        {what}
    return solve(self, index, *rest)
BlockLoop._solve = patched
"""


@pytest.mark.parametrize("victim, resumed", [(1, 1), (0, 2)])
def test_a_killed_rank_ends_the_others_and_the_run_resumes(
    victim: int, resumed: int, server: Server, inputs: Path, outputs: dict[int, Path], tmp_path: Path
) -> None:
    name, out = "llama-layer", tmp_path / "out"
    kill = KILL.format(rank=victim, what="os.kill(os.getpid(), signal.SIGKILL)")
    codes, texts = server.run(2, tmp_path / "logs", job(inputs, out, *RUNS[name], kill))
    assert codes[victim] == -9 and codes[1 - victim] == 1, texts
    assert f"rank {1 - victim} of 2 lost another rank" in texts[1 - victim]
    assert "--resume" in texts[1 - victim] and "Traceback" not in texts[1 - victim]
    assert not out.exists() and partial_folder(out).exists()
    model, options = RUNS[name]
    codes, texts = server.run(resumed, tmp_path / "again", job(inputs, out, model, f"{options} --resume"))
    assert codes == [0] * resumed, texts
    assert agreement(outputs[1] / name, out) > 0.9999
    if resumed == 2:  # as if nothing had happened
        assert digests(out) == digests(outputs[2] / name)


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}


def test_an_error_on_one_rank_is_told_on_all(server: Server, inputs: Path, tmp_path: Path) -> None:
    fault = "from wanda.errors import RunError; raise RunError('the disk of this rank is odd')"
    run = RUNS["llama-block"]
    codes, texts = server.run(3, tmp_path / "a", job(inputs, tmp_path / "out", *run, KILL.format(rank=1, what=fault)))
    assert codes == [1, 1, 1], texts
    assert all("the disk of this rank is odd" in text for text in texts)
    assert "rank 0 of 3 ended with rank 1" in texts[0] and "2 finished blocks are kept" in texts[0]
    stop = KILL.format(rank=1, what="os.kill(os.getpid(), signal.SIGTERM)")
    codes, texts = server.run(2, tmp_path / "b", job(inputs, tmp_path / "other", *run, stop))
    assert codes == [1, 1], texts
    assert "rank 1 of 2 was told to stop (SIGTERM)" in texts[1] and "lost another rank" in texts[0]


def test_a_finished_block_that_cannot_be_read_ends_all_ranks(server: Server, inputs: Path, tmp_path: Path) -> None:
    """Only the first rank reads it, the others wait for what is in it."""
    model, options = RUNS["llama-block"]
    fault = "from wanda.errors import RunError; raise RunError('stopped')"
    server.run(2, tmp_path / "a", job(inputs, tmp_path / "out", model, options, KILL.format(rank=1, what=fault)))
    broken = """
from wanda.checkpoint.skeleton import Skeleton
from wanda.errors import RunError
load = Skeleton.load_block
def patched(self, index, entries=None):
    if entries is not None and index == 1:
        raise RunError("the finished block is odd")
    return load(self, index, entries)
Skeleton.load_block = patched
"""
    options += " --resume"
    codes, texts = server.run(2, tmp_path / "b", job(inputs, tmp_path / "out", model, options, broken))
    assert codes == [1, 1], texts
    assert all("the finished block is odd" in text for text in texts)
    codes, texts = server.run(2, tmp_path / "c", job(inputs, tmp_path / "out", model, options))
    assert codes == [0, 0], texts
    codes, texts = server.run(2, tmp_path / "d", job(inputs, tmp_path / "out", model, options))
    assert codes == [0, 0] and "of this run already: nothing was done" in texts[0] and texts[1] == "", texts


def test_ranks_that_were_not_given_the_same_are_refused(server: Server, inputs: Path, tmp_path: Path) -> None:
    other = "whole = main\nmain = lambda a: whole([*a, '--dtype', ('float32', 'bfloat16')[int(os.environ['RANK'])]])"
    text = job(inputs, tmp_path / "out", "llama", LLAMA, other).replace("'--dtype', 'float32', ", "")
    codes, texts = server.run(2, tmp_path / "logs", text)
    assert codes == [2, 2], texts
    assert all("rank 1 of 2 differs from the first: give all ranks the same --dtype" in text for text in texts)
    assert not partial_folder(tmp_path / "out").exists()


def test_a_rank_that_does_not_answer_is_not_waited_for_forever(server: Server, tmp_path: Path) -> None:
    code = """
import time
from datetime import timedelta
from wanda.errors import RunError
from wanda.parallel import Ranks
try:
    with Ranks.started(timedelta(seconds=2)) as ranks:
        ranks.exchange(None)
        time.sleep(5 * ranks.rank)
        ranks.exchange(None)
except RunError as error:
    assert "--resume" in str(error)
    raise SystemExit(1)
"""
    codes, texts = server.run(2, tmp_path / "logs", code)
    assert codes == [1, 1], texts


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"MASTER_ADDR.*torchrun"), Ranks.started():
        pass


def test_torchrun_just_works(inputs: Path, outputs: dict[int, Path], tmp_path: Path) -> None:
    model, options = RUNS["llama-layer"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wanda"]
    command += ["prune", str(inputs / model), "--out", str(tmp_path / "out"), "--dtype", "float32", *options.split()]
    command += ["--calibration", str(inputs / "text.txt")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(outputs[2] / "llama-layer")
