"""The model card of a pruned checkpoint: what it says of the model that went in."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanda.report import Report
from wanda.report.card import model_card


def card(model: str) -> str:
    axes = dict.fromkeys(("score", "pattern", "variant", "group", "sparsity", "update", "allocation", "propagate"))
    return model_card(Report(model, {"method": "wanda", "inherit": None, **axes}, []), "the paper")


@pytest.mark.parametrize(
    ("model", "on_the_hub"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("gpt2", True),
        ("models/llama/tiny", False),  # no id has two slashes
        ("models/llama 2", False),
        ("models/tiny", False),  # an id by its form, but a folder is there
        ("tiny", False),
        ("./models/tiny", False),
        ("/models/tiny", False),
        ("~/tiny", False),
        ("models/tiny/", False),
    ],
)
def test_base_model_is_an_id_of_the_hub_never_a_path(
    model: str, on_the_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("models/llama/tiny", "models/tiny", "tiny"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    front = card(model).split("---")[1].splitlines()
    assert [line for line in front if line.startswith("base_model")] == [f"base_model: {model}"] * on_the_hub
    assert f"from `{model}`" in card(model)
