"""`leanscope` with one lesson, the tests' own; with their own stage too where LEANSCOPE_TEST_STAGE is set."""

import os
import sys
import types
from pathlib import Path

import lessons
from tests.app.lessons.waves import LESSON

lessons.all_lessons = lambda: {LESSON.slug: LESSON}  # type: ignore[assignment]
if os.environ.get("LEANSCOPE_TEST_STAGE"):
    stage = types.ModuleType("app.stage")
    stage.bundle_file = lambda: Path(__file__).parent / "stage" / "waves.js"  # type: ignore[attr-defined]
    sys.modules["app.stage"] = stage

if __name__ == "__main__":
    if sys.argv[1:2] == ["panel"]:
        from panel.command import main as panel

        sys.argv = sys.argv[1:]
        panel()
    else:
        from app.cli import main

        sys.exit(main(sys.argv[1:]))
