"""Runs jobs on several processes of this machine: `python ranks.py WORLD FOLDER < jobs.json`.

A job is Python code that every rank runs, with a port of its own in torchrun's environment. The ranks are forked
after the heavy imports; what rank r prints lies in FOLDER/rank-r.txt, the exit codes are printed as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path


def run(world: int, folder: Path, *jobs: str) -> tuple[list[int], list[str]]:
    """Exit codes of the ranks (negative: killed), and what each printed; a rank stops at the first job that fails."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, __file__, str(world), str(folder)],
        input=json.dumps([[port, job] for port, job in zip(_ports(len(jobs)), jobs, strict=True)]),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    return json.loads(done.stdout), [(folder / f"rank-{rank}.txt").read_text() for rank in range(world)]


def _ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _fork(world: int, folder: Path, jobs: list[tuple[int, str]]) -> list[int]:
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    import wanda.pipeline  # noqa: F401

    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os._exit(_rank(rank, world, folder, jobs))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _rank(rank: int, world: int, folder: Path, jobs: list[tuple[int, str]]) -> int:
    output = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    code = 0
    for port, job in jobs:
        os.environ["MASTER_PORT"] = str(port)
        try:
            exec(job, {})
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 70
        if code:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    print(json.dumps(_fork(int(sys.argv[1]), Path(sys.argv[2]), json.load(sys.stdin))))
