"""`wanda run`: generate text with a packed checkpoint."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from wanda.errors import ConfigurationError

TOKENS = 256  # when nothing is said
SEEDS = range(-(2**63), 2**64)  # what torch takes


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate."""

    tokens: int | None = None
    """The most tokens to generate; 256, or what the model's context leaves, when nothing is said."""
    temperature: float = 0.0
    """0 takes the most likely token; above it samples."""
    seed: int | None = None
    """Seed of the sampling; 0 when nothing is said."""
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
    faults = _faults(options)
    if faults:
        raise ConfigurationError(faults)

    import time

    import torch

    from wanda.checkpoint.source import context_length, load_config, load_tokenizer
    from wanda.runtime.loading import computed_dtype, load

    computed_dtype(packed, options.dtype)  # refuses a folder that is not packed, before anything is looked for in it
    context = context_length(load_config(packed, options.trust_remote_code))
    tokenizer = load_tokenizer(packed, options.trust_remote_code)
    if tokenizer.chat_template and not options.raw:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    tokens = _tokens(options.tokens, inputs["input_ids"].shape[1], context)
    start = time.perf_counter()
    model = load(packed, prefer=options.prefer, trust_remote_code=options.trust_remote_code, dtype=options.dtype)
    print(f"loaded in {time.perf_counter() - start:.2f} s", file=sys.stderr)
    torch.manual_seed(options.seed or 0)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    streamer = _streamer(tokenizer)
    model.generate(**inputs, max_new_tokens=tokens, streamer=streamer, **sampling)
    times = streamer.times
    print(file=sys.stdout, flush=True)
    first = times[1] - times[0] if len(times) > 1 else 0.0
    count = len(times) - 1
    line = f"{inputs['input_ids'].shape[1]} prompt tokens, first token after {first:.2f} s"
    if count > 1:
        line += f"; {count} tokens at {(count - 1) / (times[-1] - times[1]):.1f} tokens/s"
    print(line, file=sys.stderr)


def _faults(options: Options) -> list[str]:
    """What is wrong with the options as far as can be told without the model, one sentence each."""
    faults = []
    if options.tokens is not None and options.tokens < 1:
        faults.append(f"--tokens {options.tokens} has to be at least 1")
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        faults.append(f"--temperature {options.temperature} has to be a finite number, 0 or more")
    if options.seed is not None and options.seed not in SEEDS:
        faults.append(f"--seed {options.seed} has to be from -2^63 to 2^64 - 1")
    if options.seed is not None and options.temperature == 0:
        faults.append(
            f"--seed {options.seed} would change nothing without sampling; leave it out, or give a --temperature"
        )
    return faults


def _tokens(asked: int | None, prompt: int, context: int | None) -> int:
    """How many tokens to generate after a prompt of `prompt` tokens: `asked`, else TOKENS or what the context leaves.

    context: tokens that the model sees at once; beyond them a model with learned positions has none to give.
    Raises ConfigurationError for a prompt without tokens, or one that leaves no room for what is asked for.
    """
    if prompt == 0:
        raise ConfigurationError("the prompt has no tokens; say something")
    wanted = TOKENS if asked is None else asked
    if context is None or prompt + wanted <= context:
        return wanted
    left = context - prompt
    if left < 1:
        raise ConfigurationError(
            f"the prompt has {prompt} tokens, which leaves no room in the model's context of {context}; shorten it"
        )
    if asked is not None:
        raise ConfigurationError(
            f"--tokens {asked} after {prompt} prompt tokens is above the model's context of {context} tokens; "
            f"ask for {left} at most"
        )
    print(
        f"wanda: at most {left} tokens, which the model's context of {context} leaves after {prompt} prompt tokens",
        file=sys.stderr,
    )
    return left


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
