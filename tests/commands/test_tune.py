"""The command line of `wanda tune` and `wanda merge`."""

from __future__ import annotations

import json

import pytest

from byhand import prune_by_hand
from wanda.cli import main

pytest.importorskip("peft")


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_tune_and_merge_from_the_command_line(tiny, tmp_path, capsys):
    folder = prune_by_hand(tiny, tmp_path / "pruned")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    options = ["--calibration", text, "--steps", 4, "--seqlen", 32, "--batch", 2, "--evaluations", 2, "--device", "cpu"]
    tuning = ["tune", folder, "--out", tmp_path / "adapter", "--lora", "--sparse-aware", "--learning-rate", 0.01]
    assert exit_code(*tuning, *options, "--json") == 0
    out, log = capsys.readouterr()
    record = json.loads(out)
    assert record["sparse_aware"] and record["steps"] == 4 and "step 4/4: held-out loss" in log
    assert exit_code("merge", folder, tmp_path / "adapter", "--out", tmp_path / "merged") == 0
    assert "50.00% of the pruned matrices' weights are zero" in capsys.readouterr().out
    assert exit_code("tune", folder, "--out", tmp_path / "full", "--full", *options, "--warmup", 0) == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out and "15,360 of 30,720 weights of the pruned matrices are zero, as before" in out


def test_bad_requests_are_one_message_and_exit_2(tiny, tmp_path, capsys):
    folder = prune_by_hand(tiny, tmp_path / "pruned")
    assert exit_code("tune", folder, "--out", tmp_path / "out") == 2
    assert "choose one of --lora" in capsys.readouterr().err
    assert exit_code("tune", tmp_path / "absent", "--out", tmp_path / "out", "--full") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert exit_code("merge", folder, tmp_path / "absent", "--out", tmp_path / "out") == 2
    assert "has no adapter_config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
