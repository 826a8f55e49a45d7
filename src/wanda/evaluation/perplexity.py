"""Perplexity as the field reports it, and how far a model's predictions are from a dense model's.

The text is tokenised once and cut into windows of seqlen tokens, the tail dropped; each window's loss is the mean
cross entropy of its seqlen - 1 predicted tokens, and the perplexity is exp of the mean over windows. Losses are
taken in float32, whatever type the model computes in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda.errors import ConfigurationError, RunError

_LOGITS = 1 << 24  # float32 logits held at once while losses are taken: 64 MiB
_BATCH_LOGITS = 1 << 27  # logits of one batch, in the model's type: 256 MiB in bfloat16


@dataclass(frozen=True)
class Perplexity:
    """What was measured, and on what.

    perplexity: exp of the mean loss. seqlen: tokens a window. windows: their number. tokens: those that were predicted,
    windows * (seqlen - 1). seconds: of the forward passes. dtype: the model's. text: label of the text.
    kl: mean KL divergence of the model's next-token distribution from the dense model's, in nats a token; None when no
        dense model was given.
    """

    perplexity: float
    seqlen: int
    windows: int
    tokens: int
    seconds: float
    dtype: str
    text: str
    kl: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


def perplexity(
    model: nn.Module | str | Path,
    text: str | Tensor = "builtin",
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    against: nn.Module | str | Path | None = None,
    batch: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Perplexity:
    """Perplexity of a causal language model, the field's way (arXiv:2306.11695 and its relatives).

    model, against: modules with transformers' interface (`model(input_ids).logits`, any layers inside), or folders
        (packed ones too), hub ids, .gguf files. text: a SOURCE (see `wanda.sources`; the part to measure on), or token
        ids [n] or [windows, seqlen], int64. tokenizer: needed for a SOURCE with a module; else the model's own.
    seqlen: tokens a window; min(2048, the model's context) when None. windows: take only the first so many.
    batch: windows a forward pass; as many as fit 256 MiB of logits when None.
    Raises ConfigurationError for what cannot be had or is too short, RunError when losses are not finite.
    """
    loaded, own_tokenizer = _model(model, dtype, device, trust_remote_code)
    dense = None if against is None else _model(against, dtype, device, trust_remote_code)[0]
    if seqlen is None and isinstance(text, Tensor) and text.dim() == 2:
        seqlen = text.shape[1]
    length = window_length(loaded.config, seqlen)
    if isinstance(text, Tensor):
        ids, label = cut(text, length, windows), "token ids"
    else:
        ids, label = text_windows(text, tokenizer or own_tokenizer, length, windows)
    return measure(loaded, ids, label, dense=dense, batch=batch)


def window_length(config: Any, seqlen: int | None) -> int:
    """The tokens of a window: `seqlen`, or min(2048, the model's context); ConfigurationError when it cannot be."""
    from wanda.checkpoint.source import sequence_length

    if seqlen is not None and seqlen < 2:
        raise ConfigurationError(f"--seqlen {seqlen} predicts nothing; it has to be at least 2")
    return sequence_length(config, seqlen)


def text_windows(source: str, tokenizer: Any, seqlen: int, windows: int | None = None) -> tuple[Tensor, str]:
    """A SOURCE as token ids [windows, seqlen], int64, and its label; the field's limit on windows kept."""
    from wanda.calibration import encode, evaluation_text

    if tokenizer is None:
        raise ConfigurationError("a text needs a tokenizer: pass tokenizer=, or token ids instead of the text")
    text = evaluation_text(source)
    limits = [limit for limit in (windows, text.windows) if limit is not None]
    try:
        ids = cut(torch.tensor(encode(tokenizer, text.joined()), dtype=torch.int64), seqlen, min(limits, default=None))
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error}") from error
    return ids, text.label


def cut(ids: Tensor, seqlen: int, windows: int | None = None) -> Tensor:
    """Non-overlapping windows of token ids [n]: [windows, seqlen], the tail dropped; ids [windows, seqlen] stay."""
    if windows is not None and windows < 1:
        raise ConfigurationError(f"--windows {windows} has to be at least 1")
    if ids.dim() == 2 and ids.shape[1] != seqlen:
        raise ConfigurationError(
            f"the token ids have {ids.shape[1]} tokens a window, seqlen is {seqlen}; give the same"
        )
    if ids.numel() < seqlen:
        raise ConfigurationError(
            f"the text has {ids.numel()} tokens, a window {seqlen}; give more text or a smaller --seqlen"
        )
    flat = ids.reshape(-1)
    return flat[: flat.numel() // seqlen * seqlen].reshape(-1, seqlen)[:windows]


def measure(
    model: nn.Module, ids: Tensor, label: str, *, dense: nn.Module | None = None, batch: int | None = None
) -> Perplexity:
    """Perplexity of a module on windows of token ids [windows, seqlen]; `dense` adds the KL divergence from it.

    A bar on a terminal shows how far it is.
    """
    count, seqlen = ids.shape
    losses, divergences = [], []
    start = time.perf_counter()
    with _progress(count, label) as advance:
        for loss, kl in passes(model, ids, dense=dense, batch=batch):
            losses.append(loss)
            divergences.append(kl)
            advance(len(loss))
    return Perplexity(
        perplexity=perplexity_of(torch.cat(losses)),
        seqlen=seqlen,
        windows=count,
        tokens=count * (seqlen - 1),
        seconds=time.perf_counter() - start,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        text=label,
        kl=None if dense is None else torch.cat([kl for kl in divergences if kl is not None]).mean().item(),
    )


def passes(
    model: nn.Module, ids: Tensor, *, dense: nn.Module | None = None, batch: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The mean losses of the windows of each forward pass, and the KL divergences from `dense`: float64 [windows].

    ids: token ids [windows, seqlen]; the rest of a text's windows gives the rest of its losses, bit for bit, where it
    starts with a pass.
    """
    if batch is not None and batch < 1:
        raise ConfigurationError(f"--batch {batch} has to be at least 1")
    size = batch or max(1, _BATCH_LOGITS // (ids.shape[1] * vocabulary(model)))
    if dense is not None and vocabulary(dense) != vocabulary(model):
        raise ConfigurationError(
            f"--against has a vocabulary of {vocabulary(dense)} tokens, the model of {vocabulary(model)}; "
            "give the dense model that it was made from"
        )
    for part in ids.split(size) if len(ids) else ():
        with torch.no_grad():
            logits = _logits(model, part)
            reference = None if dense is None else _logits(dense, part)
            found = window_losses(logits, part, None, reference)
            del logits, reference  # they would wait for whoever takes the losses
        yield found


def perplexity_of(losses: Tensor) -> float:
    """exp of the mean of the windows' losses [windows]; raises RunError where they are not finite."""
    mean = losses.mean().item()
    if not math.isfinite(mean):
        raise RunError("the model's losses are not finite: its weights or activations overflow; try --dtype float32")
    return math.exp(mean) if mean < 700 else math.inf


def window_losses(
    states: Tensor,
    ids: Tensor,
    head: Callable[[Tensor], Tensor] | None = None,
    dense_states: Tensor | None = None,
    dense_head: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mean loss of each window, and its mean KL divergence from the dense model: float64 [batch] each, on the CPU.

    states: [batch, seqlen, vocabulary] logits, or [batch, seqlen, d] final hidden states with a head that turns
    [tokens, d] into logits [tokens, vocabulary]; the same for the dense model. ids: int64 [batch, seqlen].
    A slice of positions at a time, so that float32 logits stay below 64 MiB.
    """
    batch, seqlen = ids.shape
    targets = ids[:, 1:].reshape(-1).to(states.device)
    states = states[:, :-1].reshape(batch * (seqlen - 1), -1)
    losses = torch.empty(targets.shape, dtype=torch.float32)
    divergences = None if dense_states is None else torch.empty(targets.shape, dtype=torch.float32)
    if dense_states is not None:
        dense_states = dense_states[:, :-1].reshape(batch * (seqlen - 1), -1)
    width = (head(states[:1]) if head else states).shape[-1]
    step = max(1, _LOGITS // width)
    for first in range(0, len(targets), step):
        part = slice(first, first + step)
        logs = torch.log_softmax((head(states[part]) if head else states[part]).float(), dim=-1)
        losses[part] = -logs.gather(1, targets[part, None])[:, 0].cpu()
        if divergences is not None and dense_states is not None:
            logits = dense_head(dense_states[part]) if dense_head else dense_states[part]
            dense = torch.log_softmax(logits.float().to(logs.device), dim=-1)
            divergences[part] = (dense.exp() * (dense - logs)).sum(dim=-1).cpu()
    mean = lambda values: values.double().reshape(batch, seqlen - 1).mean(dim=1)  # noqa: E731
    return mean(losses), None if divergences is None else mean(divergences)


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model predicts among."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


@contextlib.contextmanager
def _progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A bar over windows on a terminal, nothing elsewhere; gives the function that moves it on."""
    if not sys.stderr.isatty():
        yield lambda windows: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(label), total=total)
        yield lambda windows: bar.advance(task, windows)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits


def _model(model: nn.Module | str | Path, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A module as it is, without a tokenizer; a name loaded, with its own."""
    if isinstance(model, nn.Module):
        return model, None
    from wanda.checkpoint.source import load_tokenizer, resolve
    from wanda.evaluation.models import load

    folder = resolve(model, trust_remote_code, packed=True)
    return load(folder, dtype, device, trust_remote_code), load_tokenizer(folder, trust_remote_code)
