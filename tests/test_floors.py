"""Imports point down: the floors of docs/design.md, read from there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "wanda"


def floors() -> list[list[str]]:
    """From the bottom up: the names on each floor."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("## Floors")[2].partition("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    return [[name for name in re.split(r"[,|\s]+", line) if name] for line in lines][::-1]


def floor_of(module: str, levels: list[list[str]]) -> int | None:
    """The floor of `wanda.a.b`: its longest prefix that the design names."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        name = "/".join(parts[:length])
        for level, names in enumerate(levels):
            if name in names:
                return level
    return None


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, in functions too; not for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("wanda"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(n if (PACKAGE.parent / (n.replace(".", "/") + ".py")).exists() else node.module for n in names)
    return {name for name in found if name and name != "wanda"}


def test_every_module_imports_from_its_own_floor_and_below() -> None:
    levels = floors()
    assert len(levels) > 5
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if module in ("wanda", "wanda.__main__"):
            continue
        own = floor_of(module, levels)
        assert own is not None, f"docs/design.md gives {module} no floor"
        for target in imports(file):
            level = floor_of(target, levels)
            if level is None or level > own:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)
