"""Methods: what each composes, and that a new one is one new file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wanda.methods import METHODS, Method

NEW = '''"""Foo: the pruning of foos (arXiv:0000.00000)."""

from wanda.methods import METHODS, Method


@METHODS.register
class Foo(Method):
    """(wanda, column, pcg, uniform)."""

    score = "wanda"
    group = "column"
    update = "pcg"
'''


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_is_documented_and_short(name: str) -> None:
    method = METHODS.get(name)
    assert isinstance(method, Method) and method.name == name and METHODS.summary(name)
    source = Path(sys.modules[type(method).__module__].__file__ or "").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60


def test_the_published_points_of_the_grid() -> None:
    points = {name: (m.score, m.group, m.update, m.allocation) for name in METHODS.names() if (m := METHODS.get(name))}
    assert points["wanda"] == ("wanda", "row", "none", "uniform")
    assert points["magnitude"] == ("magnitude", "layer", "none", "uniform")
    assert points["sparsegpt"] == ("obs", "block:128", "obs", "uniform")
    assert points["ria"] == ("ria", "layer", "none", "uniform")
    assert points["owl"] == ("wanda", "row", "none", "owl")
    assert METHODS.get("fast").inherit == 0 and METHODS.get("best").inherit > 0


def test_a_method_in_a_folder_on_the_path_shows_up(tmp_path: Path) -> None:
    folder = tmp_path / "wanda" / "methods"
    folder.mkdir(parents=True)
    (folder / "foo.py").write_text(NEW, encoding="utf-8")
    program = (
        "from wanda.methods import METHODS; from wanda.composition import faults;"
        "print(METHODS.names(), METHODS.get('foo').update, METHODS.summary('foo'), faults(method='foo'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'foo'" in done.stdout and "pcg Foo: the pruning of foos (arXiv:0000.00000) []" in done.stdout


def test_a_method_file_that_appears_while_running_shows_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foo.py").write_text(NEW, encoding="utf-8")
    monkeypatch.setattr(METHODS, "path", [*METHODS.path, str(tmp_path)])
    assert "foo" in METHODS.names() and METHODS.summary("foo").startswith("Foo:")
