"""One server of the real lessons for all tests of their pages."""

from collections.abc import Iterator

import pytest

from engine import smollm2
from tests.support import REAL, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`leanscope serve` with this machine's model and a cache of recordings of its own."""
    cache = tmp_path_factory.mktemp("lessons")
    if smollm2.folder().is_dir():
        (cache / smollm2.folder().name).symlink_to(smollm2.folder())
    with serving("--no-warm", cache=cache, program=REAL) as running:
        yield running
