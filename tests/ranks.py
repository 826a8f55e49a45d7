"""Runs jobs on several processes of this machine, forked from one server after the heavy imports: `python ranks.py`.

A job is Python code that every rank runs, with a port of its own in torchrun's environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

PATIENCE = 300.0  # seconds until all ranks are killed


class Server:
    """The process that forks ranks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, world: int, folder: Path, *jobs: str) -> tuple[list[int], list[str]]:
        """Exit codes of the ranks (negative: killed) and what each printed; a rank stops at the first job that fails.

        folder: where their output goes; must not exist.
        """
        folder.mkdir(parents=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        request = [world, str(folder), list(zip(_ports(len(jobs)), jobs, strict=True))]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return codes, [(folder / f"rank-{rank}.txt").read_text() for rank in range(world)]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _serve() -> None:
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    import wanda.pipeline  # noqa: F401

    for line in sys.stdin:
        world, folder, jobs = json.loads(line)
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(_rank(rank, world, Path(folder), jobs))
            children.append(child)
        print(json.dumps(_wait(children)), flush=True)


def _wait(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[child] for child in children]


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
    _serve()
