"""constraints.txt: everything that gets installed is pinned, as pyproject.toml allows it, for each Python from 3.11."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]
LINES = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]
CUDA = ("nvidia-", "cuda-", "triton")  # PyTorch pins these itself


def pins(python: str) -> dict[str, str]:
    """Name to version on that Python."""
    here = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2])}
    return {
        canonicalize_name(line.name): str(line.specifier).removeprefix("==")
        for line in LINES
        if line.marker is None or line.marker.evaluate(here)
    }


def brought(requirements: list[Requirement]) -> set[str]:
    """The names of all installed distributions that these requirements lead to."""
    seen: set[tuple[str, str]] = set()
    todo = [(r, "") for r in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for asked in ("", *requirement.extras):
            if (name, asked) in seen:
                continue
            seen.add((name, asked))
            try:
                needs = distribution(name).requires or []
            except PackageNotFoundError:
                continue
            todo += [(Requirement(need), asked) for need in needs]
    return {name for name, _ in seen}


@pytest.mark.parametrize("python", ["3.11.0", "3.11.7", "3.12.3", "3.13.5", "3.14.0"])
def test_every_declared_dependency_has_one_pin_that_fits(python: str):
    have = pins(python)
    for requirement in DECLARED:
        assert requirement.specifier.contains(have[canonicalize_name(requirement.name)]), requirement


def test_everything_that_they_bring_is_pinned():
    import platform

    loose = {name for name in brought(DECLARED) if not name.startswith(CUDA)} - set(pins(platform.python_version()))
    assert not loose


def test_every_pin_is_exact():
    assert [str(line) for line in LINES if not str(line.specifier).startswith("==") or "+" in str(line)] == []


def test_the_oldest_python_that_we_promise_gets_versions_that_run_on_it():
    for name, version in pins("3.11.0").items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        asks = SpecifierSet(installed.metadata.get("Requires-Python") or "")
        assert installed.version != version or asks.contains("3.11.0"), f"{name} {version} asks for Python {asks}"
