"""`wanda run`: generate text with a packed checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from wanda.errors import ConfigurationError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate."""

    tokens: int = 256
    """The most tokens to generate."""
    temperature: float = 0.0
    """0 takes the most likely token; above it samples."""
    seed: int = 0
    """Seed of the sampling."""
    raw: bool = False
    """Continue the prompt as it stands, even when the tokenizer has a chat template."""
    prefer: Literal["speed", "memory"] = "speed"
    """speed: layers that decode no faster packed on this machine are loaded dense; memory: all stay packed."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What to compute in: the type that is stored, or float32, which auto takes on a CPU without bfloat16."""
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False
    """Run modelling code that comes with the model."""


def run_command(packed: Path, prompt: str, *, options: Options | None = None) -> None:
    """Stream the text that a packed model generates, then its speed.

    Parameters
    ----------
    packed
        Folder that `wanda pack` wrote.
    prompt
        What to answer or continue.
    """
    options = options or Options()
    faults = []
    if options.tokens < 1:
        faults.append(f"--tokens {options.tokens} has to be at least 1")
    if options.temperature < 0:
        faults.append(f"--temperature {options.temperature} has to be 0 or more")
    if faults:
        raise ConfigurationError(faults)

    import time

    import torch

    from wanda.checkpoint.source import load_tokenizer
    from wanda.runtime.loading import load

    start = time.perf_counter()
    model = load(packed, prefer=options.prefer, trust_remote_code=options.trust_remote_code, dtype=options.dtype)
    tokenizer = load_tokenizer(packed, options.trust_remote_code)
    print(f"loaded in {time.perf_counter() - start:.2f} s", file=sys.stderr)
    if tokenizer.chat_template and not options.raw:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigurationError("the prompt has no tokens; say something")
    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    streamer = _streamer(tokenizer)
    model.generate(**inputs, max_new_tokens=options.tokens, streamer=streamer, **sampling)
    times = streamer.times
    print(file=sys.stdout, flush=True)
    first = times[1] - times[0] if len(times) > 1 else 0.0
    count = len(times) - 1
    line = f"{inputs['input_ids'].shape[1]} prompt tokens, first token after {first:.2f} s"
    if count > 1:
        line += f"; {count} tokens at {(count - 1) / (times[-1] - times[1]):.1f} tokens/s"
    print(line, file=sys.stderr)


def _streamer(tokenizer: Any) -> Any:
    """transformers' TextStreamer with the time of the prompt and of each token in `times`."""
    import time

    from transformers import TextStreamer

    class Timed(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

    return Timed()
