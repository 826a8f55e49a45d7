"""The public API, and its documentation: what is exported, that it has docstrings, that examples in docs run."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import wanda
from classifiers import image_folder, saved_classifier
from models import tiny_llama

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_exported_names() -> None:
    assert sorted(wanda.__all__) == sorted(
        ["Recipe", "WandaError", "__version__", "calibration", "compare", "load", "perplexity", "prune", "prune_model"]
    )
    for name in wanda.__all__:
        assert getattr(wanda, name) is not None


def modules() -> list[str]:
    """All modules of the package but the entry point and compiled ones."""
    found = pkgutil.walk_packages([str(ROOT / "src" / "wanda")], "wanda.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    return [
        n
        for n in names
        if (ROOT / "src" / (n.replace(".", "/") + ".py")).exists() or importlib.import_module(n).__doc__
    ]


@pytest.mark.parametrize("name", modules())
def test_public_things_have_docstrings(name: str) -> None:
    if "local_tasks" in name:
        pytest.importorskip("lm_eval")
    module = importlib.import_module(name)
    assert module.__doc__ or not (module.__file__ or "").endswith(".py"), f"{name} has no docstring"
    for thing_name, thing in vars(module).items():
        mine = getattr(thing, "__module__", None) == name
        if thing_name.startswith("_") or not mine or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        assert inspect.getdoc(thing), f"{name}.{thing_name} has no docstring"


def blocks(language: str) -> list[tuple[str, str]]:
    """Code blocks of a language in the docs, with where they stand."""
    found = []
    for file in DOCS:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", file.read_text(encoding="utf-8"), re.S | re.M):
            found.append(
                (f"{file.name}:{file.read_text(encoding='utf-8')[: match.start()].count(chr(10)) + 1}", match[1])
            )
    return found


def inputs(code: str, folder: Path) -> None:
    """The models and images that examples name."""
    tiny_llama(folder / "MODEL")
    if "CLASSIFIER" in code:
        saved_classifier("ViT", folder / "CLASSIFIER")
        image_folder(folder / "IMAGES")


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=lambda value: value if ":" in value[:40] else "")
def test_python_examples_run(place: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs(code, tmp_path)
    monkeypatch.chdir(tmp_path)
    if "METHODS.register" in code:
        file = tmp_path / "wanda" / "methods" / "mine.py"  # as the page says to save it; a process of its own loads it
        file.parent.mkdir(parents=True)
        file.write_text(code)
        command = [sys.executable, "-m", "wanda", "methods"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert "mine" in shown
        return
    if '"PACKED"' in code:
        from wanda.checkpoint.packed import pack

        wanda.prune("MODEL", out="SPARSE", method="magnitude", progress=False)
        pack(Path("SPARSE"), Path("PACKED"))
    exec(compile(code, place, "exec"), {"__name__": "example"})


@pytest.mark.parametrize(("place", "code"), blocks("sh"), ids=lambda value: value if ":" in value[:40] else "")
def test_shell_examples_run(place: str, code: str, tmp_path: Path) -> None:
    inputs(code, tmp_path)
    for line in code.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        if command:
            assert command[0] == "wanda", f"{place}: {line}"
            result = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
            assert result.returncode == 0, f"{place}: {line}\n{result.stderr}"


def test_every_command_in_the_docs_exists() -> None:
    """Commands and flags that the docs show in any block are ones that the program has."""
    from wanda.cli import COMMANDS

    helps = {
        name: subprocess.run([sys.executable, "-m", "wanda", name, "--help"], capture_output=True, text=True).stdout
        for name in COMMANDS
    }
    for file in DOCS:
        for line in re.findall(
            r"^(?:    |\$ )?((?:torchrun .*-m )?wanda [a-z]+ .*)$", file.read_text(encoding="utf-8"), re.M
        ):
            name = line.partition("wanda ")[2].split()[0]
            if name not in COMMANDS:
                continue
            for flag in re.findall(r" (--[a-z][a-z-]+)", line.partition("wanda ")[2]):
                assert flag in helps[name], f"{file.name}: {line}: wanda {name} has no {flag}"
