"""Perplexity against a plain loop over tokens, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from models import tiny_config, tiny_llama, tiny_tokenizer
from wanda.errors import ConfigurationError, RunError
from wanda.evaluation import perplexity as module
from wanda.evaluation.perplexity import cut, perplexity, window_losses


def random_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_losses(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """-log p of every next token, one at a time, in float64."""
    rows = logits.double().tolist()
    losses = []
    for row, token in zip(rows[:-1], ids[1:], strict=True):
        largest = max(row)
        losses.append(largest + math.log(sum(math.exp(x - largest) for x in row)) - row[token])
    return losses


def divergence(dense: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean of sum p log(p / q) over the positions that predict."""
    p, q = (x[:-1].double().softmax(dim=-1) for x in (dense, logits))
    return float((p * (p / q).log()).sum(dim=-1).mean())


@torch.no_grad()
def test_equals_a_loop_over_windows_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = random_model(1), random_model(2)
    ids = torch.randint(0, 300, (3 * 24 + 7,))
    windows = [ids[i * 24 : (i + 1) * 24] for i in range(3)]
    logits = [model(window[None]).logits[0] for window in windows]
    others = [dense(window[None]).logits[0] for window in windows]
    losses = [token_losses(x, w.tolist()) for x, w in zip(logits, windows, strict=True)]
    expected = math.exp(sum(sum(part) / 23 for part in losses) / 3)
    for batch in (None, 1, 2, 5):
        got = perplexity(model, ids, seqlen=24, against=dense, batch=batch)
        assert got.perplexity == pytest.approx(expected, rel=1e-5)
        assert got.kl == pytest.approx(sum(map(divergence, others, logits)) / 3, rel=1e-4)
        assert (got.windows, got.seqlen, got.tokens, got.dtype) == (3, 24, 3 * 23, "float32")
        monkeypatch.setattr(module, "_LOGITS", 300 * 5)  # 5 positions at a time from now on
    first = perplexity(model, ids, seqlen=24, windows=1)
    assert first.perplexity == pytest.approx(math.exp(sum(losses[0]) / 23), rel=1e-5) and first.kl is None
    assert perplexity(model, ids, seqlen=24, against=model).kl == pytest.approx(0, abs=1e-7)


@settings(max_examples=30)
@given(batch=st.integers(1, 3), seqlen=st.integers(2, 9), seed=st.integers(0, 9999))
def test_losses_from_hidden_states_and_head_equal_those_from_logits(batch: int, seqlen: int, seed: int) -> None:
    torch.manual_seed(seed)
    head, dense_head = torch.nn.Linear(5, 11), torch.nn.Linear(4, 11)
    states, dense = torch.randn(batch, seqlen, 5), torch.randn(batch, seqlen, 4)
    ids = torch.randint(0, 11, (batch, seqlen))
    with torch.no_grad():
        from_logits = window_losses(head(states), ids, None, dense_head(dense))
        from_states = window_losses(states, ids, head, dense, dense_head)
        expected = torch.nn.functional.cross_entropy(
            head(states)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).reshape(batch, -1)
    torch.testing.assert_close(from_logits, from_states, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(from_logits[0], expected.mean(dim=1).double(), rtol=1e-5, atol=1e-6)
    assert from_logits[1] is not None and bool((from_logits[1] > -1e-6).all())


def test_uniform_predictions_have_the_vocabulary_as_perplexity() -> None:
    model = random_model(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, torch.arange(64), seqlen=16).perplexity == pytest.approx(300, rel=1e-5)


def test_model_by_name_on_a_text_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    source = str(tmp_path / "t.txt")
    named = perplexity(tiny, source, dtype="float32", windows=3)
    model = LlamaForCausalLM.from_pretrained(tiny)
    given_module = perplexity(model, source, tokenizer=tiny_tokenizer(), windows=3, seqlen=128)
    assert named.seqlen == 128 and named.perplexity == given_module.perplexity  # the context is 128
    with pytest.raises(ConfigurationError, match="needs a tokenizer"):
        perplexity(model, source)


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    model, ids = random_model(0), torch.zeros(64, dtype=torch.int64)
    for options, message in (
        ({"seqlen": 129}, "above the model's context of 128"),
        ({"seqlen": 1}, "predicts nothing"),
        ({"seqlen": 65}, "64 tokens, a window 65; give more text or a smaller --seqlen"),
        ({"seqlen": 8, "windows": 0}, "--windows 0"),
        ({"seqlen": 8, "batch": 0}, "--batch 0"),
        ({"seqlen": 8, "against": tiny_llama(tmp_path / "other", vocab_size=400)}, "vocabulary of 400 tokens"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            perplexity(model, ids, **options)
    with pytest.raises(ConfigurationError, match="32 tokens a window, seqlen is 16"):
        perplexity(model, ids.reshape(2, 32), seqlen=16)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(RunError, match=r"not finite.*float32"):
        perplexity(model, ids, seqlen=8)


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    assert cut(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(torch.arange(11), 4, windows=1).tolist() == [[0, 1, 2, 3]]
    assert cut(torch.arange(12).reshape(3, 4), 4, windows=2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
