"""The HTML around a page: what a visitor gets before the first script has run, and the pages that say what is wrong.

No script stands in it, only addresses of files: the Content-Security-Policy allows no other.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from app import assets
from lessons.lesson import Lesson

MOTTO = "See how language models are made cheap to run."
STYLE = (
    "html{background:#FAF8F3;color:#1B1F24;color-scheme:light dark}"
    "@media(prefers-color-scheme:dark){html{background:#101317;color:#E8E6E1}}"
    "body{margin:0;font-family:Inter,system-ui,sans-serif}"
    "main.plain{max-width:34rem;margin:18vh auto 0;padding:0 1.5rem;line-height:1.6}"
    "main.plain h1{font:600 1.9rem/1.25 'Source Serif 4',Georgia,serif}main.plain a{color:inherit}"
)


PLOTS = {
    "image": "The tensor as an image",
    "counts": "How its values are spread",
    "across": "Its values along a row",
    "down": "Its values along a column",
}
PLOT_STYLE = (
    "#plots{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:16px;max-width:1380px;margin:0 auto;"
    "box-sizing:border-box;padding:0 28px 40px}#plot-image{grid-row:span 3}"
    ".plot{min-width:0;border-radius:12px;overflow:hidden}"
    "@media(max-width:900px){#plots{grid-template-columns:minmax(0,1fr);padding:0 14px 32px}}"
)


def page(lesson: Lesson | None, token: str, root: str, up: str) -> str:
    """The page around a component: `token` names its session, `root` its model, `up` is the way to the site's root."""
    title = f"{lesson.title} · Leanscope" if lesson else "Leanscope"
    return _around(title, lesson.question if lesson else MOTTO, {"token": token, "root": root}, up)


def explore(lesson: Lesson, token: str, root: str, plots: Mapping[str, str], up: str) -> str:
    """The page around an explorer: its controls, then a place for each plot (id of its model: its name)."""
    known = {model: f"plot-{name}" for model, name in plots.items() if name in PLOTS}
    places = "".join(
        f'<div id="plot-{name}" class="plot" role="group" aria-label="{label}"></div>' for name, label in PLOTS.items()
    )
    below = f'<section id="plots" aria-label="Plots">{places}</section>\n'
    title = f"Explore: {lesson.title} · Leanscope"
    return _around(title, lesson.question, {"token": token, "root": root, "plots": known}, up, below, PLOT_STYLE)


def _around(title: str, question: str, item: Mapping[str, Any], up: str, below: str = "", style: str = "") -> str:
    scripts = "".join(f'<script defer src="{up}assets/{name}"></script>\n' for name in assets.scripts())
    more = f"<style>{style}</style>\n" if style else ""
    return (
        f"{head(title, question, _icon(up))}{more}"
        f'<link rel="modulepreload" href="{up}assets/{assets.stage()}">\n{scripts}</head>\n'
        f'<body>\n<div id="leanscope" data-item="{html.escape(json.dumps(item))}"></div>\n{below}'
        f'<noscript><main class="plain"><h1>{html.escape(question)}</h1>'
        "<p>Leanscope draws its pictures in the browser, and needs JavaScript for that.</p></main></noscript>\n"
        "</body>\n</html>\n"
    )


def message(title: str, line: str, path: str) -> str:
    """A page that says why there is nothing at `path`."""
    up = "../" * max(0, path.count("/") - 1) or "./"
    return (
        f'{head(f"{title} Leanscope", line, _icon(up))}</head>\n<body><main class="plain"><h1>{html.escape(title)}</h1>'
        f'<p>{html.escape(line)}</p><p><a href="{up}">All lessons</a></p></main></body>\n</html>\n'
    )


def _icon(up: str) -> str:
    icon = assets.icon()
    return f"{up}assets/{icon}" if icon else "data:,"


def head(title: str, description: str, icon: str, policy: str = "") -> str:
    """A document up to where its own links go. `policy` is the Content-Security-Policy where no server sends one."""
    meta = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n' if policy else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{meta}'
        f"<title>{html.escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="description" content="{html.escape(description)}">\n'
        '<meta name="theme-color" media="(prefers-color-scheme: light)" content="#FAF8F3">\n'
        '<meta name="theme-color" media="(prefers-color-scheme: dark)" content="#101317">\n'
        f'<link rel="icon" href="{icon}">\n<style>{STYLE}</style>\n'
    )
