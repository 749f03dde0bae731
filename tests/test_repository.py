"""What no file of the repository may hold: a package registry's address, or a path of somebody's own machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# In pieces, so that this file does not hold them itself.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("files", "pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("registry", "npmjs", "org"),
    )
]
OWN_PATHS = re.compile(rb"(?<![\w.~*{}$/-])/(?:" + b"|".join([b"home", b"root", b"Users", b"work"]) + rb")/[\w.]")


def files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no telling which files belong to it")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_registry():
    found = [
        (str(path.relative_to(ROOT)), host)
        for path in files()
        for host in REGISTRIES
        if host.encode() in path.read_bytes()
    ]
    assert not found


def test_no_file_holds_a_path_of_one_machine():
    found = [
        (str(path.relative_to(ROOT)), match.group().decode())
        for path in files()
        for match in OWN_PATHS.finditer(path.read_bytes())
        if path.suffix not in {".safetensors", ".png", ".woff2"}
    ]
    assert not found


@pytest.mark.parametrize("text", ["open('/ho" "me/ann/x')", "cd /ro" "ot/.cache", "see /wo" "rk/main"])  # fmt: skip
def test_such_a_path_is_recognised(text: str):
    assert OWN_PATHS.search(text.encode())


@pytest.mark.parametrize("text", ["~/wo" "rk/x", "lib/ro" "ot/y", "https://a.b/ho" "me/"])  # fmt: skip
def test_others_are_left_alone(text: str):
    assert not OWN_PATHS.search(text.encode())
