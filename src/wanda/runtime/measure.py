"""Measuring how fast and how large models are: alternating runs, medians with spread, resident memory."""

from __future__ import annotations

import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanda.checkpoint.packed import is_packed
from wanda.checkpoint.source import weight_files
from wanda.errors import RunError
from wanda.kernels.native import native, pool


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of these values."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """`median (low-high)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def alternate(actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every action once unmeasured, then all in turn `rounds` times; an action returns the seconds it counts."""
    for action in actions.values():
        action()
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            taken[name].append(action())
    return taken


def ratios(slow: list[float], fast: list[float]) -> Spread:
    """How many times faster `fast` was, round by round."""
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])


@torch.no_grad()
def decode_seconds(model: Any, prompt: int, tokens: int) -> float:
    """Seconds a token: `tokens` single steps with a key-value cache after a prompt of `prompt` random tokens."""
    ids = _ids(model, prompt)
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # by version
    step = model(input_ids=ids, use_cache=True)
    start = time.perf_counter()
    for _ in range(tokens):
        ids = step.logits[:, -1:].argmax(dim=-1)
        step = model(input_ids=ids, use_cache=True, **{named: step[named]})
    return (time.perf_counter() - start) / tokens


@torch.no_grad()
def prefill_seconds(model: Any, tokens: int) -> float:
    """Seconds for the decoder over a prompt of `tokens` random tokens, with the logits of the last one only."""
    ids = _ids(model, tokens)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def _ids(model: Any, tokens: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def read_bandwidth(nbytes: int = 1 << 30, rounds: int = 5) -> float:
    """Bytes a second that all threads together read from memory beyond all caches; the best of some rounds.

    Raises RunError without the compiled extension.
    """
    module = native()
    if module is None:
        raise RunError("the bandwidth is measured by the C extension, which is not compiled here")
    buffer = torch.ones(nbytes // 8, dtype=torch.int64)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        module.read_memory(buffer.data_ptr(), buffer.numel(), torch.get_num_threads(), pool())
        seconds.append(time.perf_counter() - start)
    return nbytes / min(seconds)


def folder_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that a checkpoint is loaded from, packed or not.

    Raises ConfigurationError for an ordinary folder whose weight files are not all there.
    """
    files = folder.glob("*.safetensors") if is_packed(folder) else weight_files(folder)
    return sum(file.stat().st_size for file in files)


_FRESH = """
import sys, time
from pathlib import Path
import torch, transformers
from wanda.checkpoint.source import load_config, load_model
from wanda.runtime.loading import load
from wanda.memory import resident_memory
from wanda.runtime.measure import touch
torch.set_num_threads(int(sys.argv[3]))
transformers.utils.logging.disable_progress_bar()
trust = sys.argv[5] == "True"
config = load_config(Path(sys.argv[2]), trust)  # imports are not loading: they come before
transformers.AutoModelForCausalLM, transformers.GenerationConfig, getattr(transformers, config.architectures[0], None)
before = resident_memory()
start = time.perf_counter()
if sys.argv[1] == "packed":
    model = load(sys.argv[2], prefer=sys.argv[4], trust_remote_code=trust, dtype=sys.argv[6])
else:
    model = load_model(Path(sys.argv[2]), sys.argv[6], "cpu", trust)
opened = time.perf_counter() - start
if sys.argv[1] == "dense":  # a packed model's bytes were all read for its checksums
    touch(model)
ready = time.perf_counter() - start
with torch.no_grad():
    model(input_ids=torch.zeros(1, 1, dtype=torch.long))
print(opened, ready, resident_memory() - before)
"""


@dataclass(frozen=True)
class Fresh:
    """Loading in a process of its own: seconds until load returned, until every byte of the weights was read once (a
    packed model's are when load returns), and the resident bytes that loading and one forward pass added."""

    opened: float
    ready: float
    resident: int


def fresh(
    folder: Path, packed: bool, prefer: str = "speed", trust_remote_code: bool = False, dtype: str = "auto"
) -> Fresh:
    """Load a packed or a dense model in a new process; RunError when that fails. Linux only."""
    options = ["packed" if packed else "dense", folder, torch.get_num_threads(), prefer, trust_remote_code, dtype]
    command = [sys.executable, "-c", _FRESH, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{folder} could not be loaded in a process of its own: {done.stderr.strip()[-500:]}")
    opened, ready, resident = done.stdout.split()[-3:]
    return Fresh(float(opened), float(ready), int(resident))


def touch(model: torch.nn.Module) -> None:
    """Read every byte of the weights once, as fast as memory gives them."""
    from wanda.runtime.loading import weights_of

    module = native()
    for tensor in weights_of([model]):
        if module is not None and tensor.data_ptr() % 8 == 0:
            module.read_memory(tensor.data_ptr(), tensor.nbytes // 8, torch.get_num_threads(), pool())
        else:
            tensor.view(-1).view(torch.uint8).max()
