"""The lessons. This folder is the registry: a module here that has a LESSON is a lesson, nothing else to edit."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from lessons.lesson import Lesson


@functools.cache
def all_lessons() -> dict[str, Lesson]:
    """Every lesson by slug, in the order of the menu."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        lesson = getattr(importlib.import_module(f"{__name__}.{module.name}"), "LESSON", None)
        if isinstance(lesson, Lesson):
            found.append(lesson)
    return {lesson.slug: lesson for lesson in sorted(found, key=lambda lesson: lesson.order)}


def lesson(slug: str) -> Lesson:
    """The lesson called `slug`; KeyError with what there is otherwise."""
    try:
        return all_lessons()[slug]
    except KeyError:
        raise KeyError(f"there is no lesson called {slug!r}; there are {', '.join(all_lessons())}") from None
