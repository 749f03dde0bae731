"""The HTML around a page: what a visitor gets before the first script has run, and the pages that say what is wrong.

No script stands in it, only addresses of files: the Content-Security-Policy allows no other.
"""

from __future__ import annotations

import html
import json

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


def page(lesson: Lesson | None, token: str, root: str, up: str) -> str:
    """The page around a component: `token` names its session, `root` its model, `up` is the way to the site's root."""
    title = f"{lesson.title} · Leanscope" if lesson else "Leanscope"
    question = lesson.question if lesson else MOTTO
    scripts = "".join(f'<script defer src="{up}assets/{name}"></script>\n' for name in assets.scripts())
    item = html.escape(json.dumps({"token": token, "root": root}))
    return (
        f"{head(title, question, _icon(up))}"
        f'<link rel="modulepreload" href="{up}assets/{assets.stage()}">\n{scripts}</head>\n'
        f'<body>\n<div id="leanscope" data-item="{item}"></div>\n'
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
