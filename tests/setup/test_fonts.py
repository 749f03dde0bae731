"""The font files: small, whole, made once, and never in the way when they can't be made."""

from pathlib import Path

import pytest
from fontTools.ttLib import TTFont

import engine.smollm2
from app import fonts

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.xdist_group("fonts")  # built once, not once a worker


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert fonts.folder() is None
        made = fonts.build()
        assert fonts.folder() == made
        return made


@pytest.mark.slow
def test_together_they_are_small(built: Path):
    files = list(built.glob("*.woff2"))
    assert {file.stem for file in files} == {face.name for face in fonts.FACES}
    assert all(file.read_bytes()[:4] == b"wOF2" for file in files)
    assert sum(file.stat().st_size for file in files) < 250_000


@pytest.mark.slow
def test_weights_and_sizes_are_still_variable(built: Path):
    axes = {
        name: {axis.axisTag for axis in TTFont(built / f"{name}.woff2")["fvar"].axes}
        for name in ("inter", "source-serif-4", "jetbrains-mono")
    }
    assert axes == {"inter": {"wght"}, "source-serif-4": {"wght", "opsz"}, "jetbrains-mono": {"wght"}}


@pytest.mark.slow
def test_every_character_of_the_lessons_is_drawn(built: Path):
    drawn = set().union(*(TTFont(built / f"{face.name}.woff2").getBestCmap() for face in fonts.FACES))
    used = {ord(c) for file in (ROOT / "lessons").rglob("*.py") for c in file.read_text(encoding="utf-8")} - {ord("\n")}
    assert "".join(map(chr, sorted(used - drawn))) == ""


@pytest.mark.slow
def test_the_licences_lie_beside_them(built: Path):
    for face in fonts.FACES:
        assert "SIL Open Font License" in (built / f"{face.name}.LICENSE.txt").read_text()


def test_a_half_built_folder_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path))
    target = fonts._target()
    target.mkdir()
    for face in fonts.FACES[:-1]:
        (target / f"{face.name}.woff2").write_bytes(b"")
    assert fonts.folder() is None


def test_what_was_built_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(fonts, "_pack", lambda face, into: (into / f"{face.name}.woff2").write_bytes(b"new"))
    made = fonts.build()
    assert {file.name for file in tmp_path.iterdir()} == {made.name}
    monkeypatch.setattr(fonts, "_pack", pytest.fail)
    assert fonts.build() == made


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path / "file" / "cache"))
    assert fonts.folder() is None
    assert fonts.main() == 1
    told = capsys.readouterr().err
    assert f"The fonts can't be kept in {tmp_path / 'file' / 'cache'}" in told
    assert "system's fonts" in told


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(fonts, "FACES", (fonts.FACES[0]._replace(package="fontpkg_none"),))
    with pytest.raises(fonts.FontsError, match="need the package fontpkg_none"):
        fonts.build()
    assert list(tmp_path.iterdir()) == []


def test_fonts_and_models_lie_in_one_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LEANSCOPE_CACHE", raising=False)
    for named in ({}, {"XDG_CACHE_HOME": str(tmp_path)}, {"LEANSCOPE_CACHE": "~/x"}):
        for name, value in named.items():
            monkeypatch.setenv(name, value)
        assert fonts.cache_folder() == engine.smollm2.cache_folder()
