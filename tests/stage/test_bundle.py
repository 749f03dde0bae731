"""The joiner: order, and a clear refusal of whatever it cannot join."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from app.stage import FOLDER, BundleError, bundle, bundle_file, script, styles
from app.stage.maps import text as maps_text

MODULES = sorted(FOLDER.glob("*.js"))


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.js").write_text(text)
    return folder


def test_modules_come_after_what_they_import(tmp_path):
    folder = write(
        tmp_path,
        page='import { b } from "./b.js";\nimport { a } from "./a.js";\nexport default { a, b };\n',
        b='import {\n  a,\n} from "./a.js";\nexport const b = a + 1;\n',
        a="export const a = 1;\n",
    )
    text = bundle(folder, css="")
    assert text.index("const a = 1") < text.index("const b = a + 1") < text.index("export default { a, b }")
    assert text.count("const a = 1") == 1
    assert "import" not in text


@pytest.mark.parametrize(
    ("page", "other", "message"),
    [
        ('import { a } from "./a.js";\nconst twice = 1;\n', "export const a = 1;\nconst twice = 2;\n", "declare twice"),
        ('import { no } from "./a.js";\n', "export const a = 1;\n", "does not export no; it has a"),
        ('import { a } from "./b.js";\n', "", "there is no b.js"),
        ('import { a as b } from "./a.js";\n', "export const a = 1;\n", "renames"),
        ('import a from "./a.js";\n', "export const a = 1;\n", "is not of the form"),
        ('import { x } from "https://example.org/x.js";\n', "", "is not of the form"),
        ('import { a } from "./a.js";\n', "export const a = 1;\nexport default a;\n", "only page.js"),
        ('import { a } from "./a.js";\n', "export const a = 1;\nexport { a as b };\n", "no export of a function"),
        ('import { a } from "./a.js";\n', "export const { a, b } = {};\n", "does not export a|several names"),
        ('import { a } from "./a.js";\n', 'import { p } from "./page.js";\nexport const a = 1;\n', "circle"),
    ],
)
def test_what_cannot_be_joined_is_refused_with_the_reason(tmp_path, page, other, message):
    write(tmp_path, page=page, a=other)
    with pytest.raises(BundleError, match=message):
        bundle(tmp_path, css="")


def test_the_stage_itself_joins_and_the_pages_hold_every_module():
    text = bundle()
    assert text.rstrip().endswith("export default { render };")
    held = text + script()  # served, and from files
    for path in MODULES:
        assert f"// {path.name}\n" in held or path.name == "standin.js", f"{path.name} is used by nobody"


def test_styles_travel_in_the_bundle():
    assert "--query" in styles()
    assert "--query" in bundle()
    assert "@import" not in styles()
    assert not re.search(r"url\(", styles()), "a style sheet must not fetch anything"


def test_nothing_is_ever_set_as_html():
    for path in MODULES:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", path.read_text()), path


def test_modules_are_short():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_the_file_is_written_once_and_again_when_a_module_changes(tmp_path):
    write(tmp_path, page="export default 1;\n")
    first = bundle_file(tmp_path)
    before = first.stat().st_mtime_ns
    assert bundle_file(tmp_path) == first
    assert first.stat().st_mtime_ns == before
    write(tmp_path, page="export default 2;\n")
    assert bundle_file(tmp_path) != first
    assert "export default 2" in bundle_file(tmp_path).read_text()


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    write(tmp_path, page="export default 1;\n")
    (tmp_path / ".build").write_text("in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert bundle_file(tmp_path).is_relative_to(tmp_path / "elsewhere")


def test_the_colour_tables_are_those_of_their_sources():
    assert (FOLDER / "maps.js").read_text() == maps_text()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not needed to run Leanscope, only to parse here")
def test_every_module_and_the_bundle_parse(tmp_path):
    (tmp_path / "bundle.mjs").write_text(bundle())
    copies = [tmp_path / "bundle.mjs"]
    for path in MODULES:
        copies.append(tmp_path / f"{path.stem}.mjs")
        copies[-1].write_text(path.read_text())
    for path in copies:
        done = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
