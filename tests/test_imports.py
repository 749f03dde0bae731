"""Imports point one way, app → lessons → engine, and each layer keeps to its own libraries."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCREENS = {"bokeh", "holoviews", "jupyter_server", "panel", "tornado"}
FORBIDDEN = {
    "engine": {"app", "lessons", "param", "tests", *SCREENS},
    "lessons": {"app", "tests", "torch", *SCREENS},
    "app": {"tests"},
}
# Run before anything is installed.
BARE = ("app/__init__.py", "app/browser.py", "app/install.py", "app/system.py")


def imported(source: str) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def modules(layer: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("module", [m for layer in FORBIDDEN for m in modules(layer)])
def test_direction(module: str):
    wrong = imported((ROOT / module).read_text(encoding="utf-8")) & FORBIDDEN[module.partition("/")[0]]
    assert not wrong, f"{module} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", BARE)
def test_set_up_needs_the_standard_library_alone(module: str):
    import sys

    assert imported((ROOT / module).read_text(encoding="utf-8")) <= {*sys.stdlib_module_names, "app"}


def test_the_reader_sees_every_kind_of_import():
    source = "import torch.nn as nn\ndef f():\n    from panel.io import x\n    from . import y\n"
    assert imported(source) == {"torch", "panel"}
