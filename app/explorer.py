"""The page that looks at any tensor of a lesson's run: an image, two lines through one cell, a distribution, numbers.

The plots are HoloViews elements, rendered once (`app/explore.py`); what someone chooses changes their data alone. All
that a pointer does there comes as Bokeh events to the server, so that no script of ours needs `eval`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import holoviews as hv
import numpy as np
import param
from bokeh.document import Document
from bokeh.events import SelectionGeometry, Tap
from bokeh.models import HoverTool

from app import answers, assets, explore, fonts, link
from app.answers import Message
from app.arrays import Arrays, Tensor
from app.page import Page, about, menu, post
from app.runs import Run, Runs, with_available_model
from lessons.lesson import Lesson

log = logging.getLogger(__name__)

TABLE = (24, 16)  # rows and columns of the numbers shown as a table
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
ROLES = ("paper", "panel", "ink", "muted", "line", "query", "key", "recent")
CALLS = 64  # messages that may wait


class ExplorePage(Page):
    """The controls; the plots are roots of their own beside it."""

    explore = param.Dict(default={}, doc="Which lesson this is.")


class Plots:
    """The four plots, made once; `show` gives them other numbers."""

    def __init__(self, doc: Document) -> None:
        renderer = hv.renderer("bokeh")
        zeros, places = np.zeros((2, 2), np.float32), np.arange(2)
        draw = functools.partial(renderer.get_plot, doc=doc)
        self.image = draw(explore.image(zeros, "across", "down", "value"))
        self.across = draw(explore.curve(places, zeros[0], "across", "value"))
        self.down = draw(explore.curve(places, zeros[0], "down", "value"))
        self.counts = draw(explore.histogram(zeros, "value"))
        self.names = {"image": self.image, "counts": self.counts, "across": self.across, "down": self.down}
        for plot in self.names.values():
            plot.state.toolbar.logo = None
            plot.state.sizing_mode = "stretch_width"
            plot.state.title.visible = True
        # Before it is on a document: only then does Bokeh hear of it.
        self.image.state.on_event(Tap, self._tapped)
        self.image.state.on_event(SelectionGeometry, self._boxed)
        self._at = (0, 0)
        self._dark = False
        self._cut: explore.Cut | None = None

    @property
    def roots(self) -> dict[str, Any]:
        return {name: plot.state for name, plot in self.names.items()}

    def show(self, made: explore.Cut, label: str) -> None:
        """Another matrix. `label` names the value."""
        rows, columns = made.values.shape
        self._cut = made
        self._at = (min(self._at[0], rows - 1), min(self._at[1], columns - 1))
        handles, figure = self.image.handles, self.image.state
        handles["source"].data = {
            "image": [made.values], "x": [-0.5], "y": [-0.5], "dw": [columns], "dh": [rows],
        }  # fmt: skip
        mapper = handles["color_mapper"]
        mapper.low, mapper.high, mapper.palette = explore.scale(made.values, dark=self._dark)
        _range(handles["x_range"], -0.5, columns - 0.5)
        _range(handles["y_range"], rows - 0.5, -0.5)
        down = made.down or "row"
        figure.xaxis.axis_label, figure.yaxis.axis_label = made.across, down
        figure.title.text = label
        tips = [(down, "$y{0}"), (made.across, "$x{0}"), ("value", "@image{0.000000}")]
        for tool in figure.toolbar.tools:
            if isinstance(tool, HoverTool):
                tool.tooltips = tips if made.down else tips[1:]
        self.through(*self._at)
        self.count(made.values, "all values shown")

    def through(self, row: int, column: int) -> None:
        """Lines through one cell: along its row and along its column."""
        made = self._cut
        if made is None or not (0 <= row < made.values.shape[0] and 0 <= column < made.values.shape[1]):
            return
        self._at = (row, column)
        across, down = made.values[row], made.values[:, column]
        for plot, values, along, what in (
            (self.across, across, made.across, f"along {made.across}, {made.down} {row}" if made.down else made.across),
            (self.down, down, made.down or "row", f"along {made.down or 'row'}, {made.across} {column}"),
        ):
            x, y = plot.handles["glyph"].x, plot.handles["glyph"].y
            plot.handles["source"].data = {x: np.arange(len(values)), y: values}
            plot.state.title.text = what
            plot.state.xaxis.axis_label, plot.state.yaxis.axis_label = along, "value"
            _range(plot.handles["x_range"], -0.5, max(0.5, len(values) - 0.5))
            _range(plot.handles["y_range"], *_room(values))
            for tool in plot.state.toolbar.tools:
                if isinstance(tool, HoverTool):
                    tool.tooltips = [(along, f"@{{{x}}}"), ("value", f"@{{{y}}}{{0.000000}}")]

    def count(self, values: np.ndarray, what: str) -> None:
        """The distribution of some of the values, in the frame of all."""
        within = self._cut.values if self._cut is not None else None
        counts, edges = explore.distribution(values, within)
        source, glyph = self.counts.handles["source"], self.counts.handles["glyph"]
        counted = {name: counts for name in source.data if name not in ("left", "right")}
        source.data = {**counted, "left": edges[:-1], "right": edges[1:]}
        figure = self.counts.state
        figure.title.text = f"{what}: {values.size:,}"
        figure.xaxis.axis_label, figure.yaxis.axis_label = "value", "how many"
        _range(self.counts.handles["x_range"], float(edges[0]), float(edges[-1]))
        _range(self.counts.handles["y_range"], 0.0, max(1.0, float(counts.max()) * 1.06))
        for tool in figure.toolbar.tools:
            if isinstance(tool, HoverTool):
                tool.tooltips = [("from", "@left{0.0000}"), ("to", "@right{0.0000}"), ("how many", f"@{glyph.top}")]

    def within(self, x0: float, x1: float, y0: float, y1: float) -> None:
        """Count only what a box holds; an empty box counts all."""
        if self._cut is None:
            return
        rows, columns = (slice(max(0, round(min(p))), max(0, round(max(p)) + 1)) for p in ((y0, y1), (x0, x1)))
        part = self._cut.values[rows, columns]
        if part.size:
            self.count(part, "values in the box")
        else:
            self.count(self._cut.values, "all values shown")

    def _tapped(self, event: Any) -> None:
        if isinstance(event.x, int | float) and isinstance(event.y, int | float):
            self.through(round(event.y), round(event.x))

    def _boxed(self, event: Any) -> None:
        shape = event.geometry if isinstance(event.geometry, dict) else {}
        sides = [shape.get(side) for side in ("x0", "x1", "y0", "y1")]
        if event.final and all(isinstance(side, int | float) and abs(side) < 1e9 for side in sides):
            self.within(*sides)  # type: ignore[arg-type]

    def dress(self, colours: Mapping[str, str]) -> None:
        """Colours and fonts of the page around."""
        ink, muted, line = colours["ink"], colours["muted"], colours["line"]
        self._dark = int(colours["panel"][1:3], 16) < 128
        if self._cut is not None:
            self.image.handles["color_mapper"].palette = explore.scale(self._cut.values, dark=self._dark)[2]
        for plot in self.names.values():
            figure = plot.state
            figure.background_fill_color = figure.border_fill_color = colours["panel"]
            figure.outline_line_color = line
            figure.title.text_color, figure.title.text_font, figure.title.text_font_size = ink, "Inter", "14px"
            for axis in (*figure.xaxis, *figure.yaxis):
                axis.axis_label_text_color = axis.major_label_text_color = muted
                axis.axis_label_text_font, axis.major_label_text_font = "Inter", "JetBrains Mono"
                axis.axis_label_text_font_style = "normal"
                axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = line
            figure.grid.grid_line_color = line
        bar = self.image.handles["colorbar"]
        bar.background_fill_color = colours["panel"]
        bar.major_label_text_color, bar.major_label_text_font = muted, "JetBrains Mono"
        self.across.handles["glyph"].line_color = colours["query"]
        self.down.handles["glyph"].line_color = colours["key"]
        self.counts.handles["glyph"].fill_color = self.counts.handles["glyph"].line_color = colours["recent"]


def _range(shown: Any, start: float, end: float) -> None:
    shown.update(start=start, end=end, reset_start=start, reset_end=end)


def _room(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    edge = (high - low) * 0.06 or 0.5
    return low - edge, high + edge


class Explorer:
    """One visitor who explores. What arrives is bounded and checked; it never raises."""

    def __init__(
        self,
        doc: Document,
        lesson: Lesson,
        place: link.Place,
        runs: Runs,
        plots: Plots,
        send: Callable[[list[Message]], Awaitable[None]],
    ) -> None:
        self._doc, self._lesson, self._plots, self._send, self._runs = doc, lesson, plots, send, runs
        self._knobs = with_available_model(place.knobs)[0]
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._calls = 0
        self._task: asyncio.Task[None] | None = None
        self.run: Run | None = None
        self._arrays: Arrays | None = None
        self._status: Message = {}
        self._choice: Mapping[Any, Any] | None = None
        self._colours: dict[str, str] | None = None

    def receive(self, message: Any) -> None:
        """Take one message from the browser, in whatever thread it arrives."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._take, message)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self.run is not None:
            self._runs.leave(self.run, self._wake)
            self.run = None

    def _take(self, message: Any) -> None:
        if not isinstance(message, dict):
            return
        match message.get("type"):
            case "ready" if self._task is None:
                self.run = self._runs.ask(self._lesson, self._knobs, self._wake)
                self._task = self._loop.create_task(self._pump())
            case "choose":
                self._choice = message
            case "colours":
                given = message.get("colours")
                if isinstance(given, dict) and all(COLOUR.fullmatch(str(given.get(role))) for role in ROLES):
                    self._colours = {role: str(given[role]) for role in ROLES}
            case "ping":
                self._calls = min(CALLS, self._calls + 1)
        self._news.set()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.set)

    async def _pump(self) -> None:
        while True:
            self._news.clear()
            try:
                messages = await self._flush()
                if messages:
                    await self._send(messages)
            except Exception:
                log.exception("an explorer could not be told the news")
            await asyncio.sleep(1 / 30)
            await self._news.wait()

    async def _flush(self) -> list[Message]:
        messages: list[Message] = [{"type": "pong"}] if self._calls else []
        self._calls = 0
        if self._colours is not None:
            colours, self._colours = self._colours, None
            self._apply(functools.partial(self._plots.dress, colours))
        run = self.run
        if run is None:
            return messages
        status = {"type": "run", "state": run.state, "steps": run.steps, "total": run.total, "message": run.message}
        if status != self._status:
            self._status = status
            messages.append(status)
        if self._arrays is None and run.recording is not None and run.finished:
            self._arrays = Arrays(run.recording, self._lesson, run.knobs)
            listed = answers.tensors(run.recording)[0]["tensors"]
            shown = [t for t in listed if self._arrays[t["key"]].ndim and self._arrays[t["key"]].size]
            first = next((one.key for one in self._arrays.pictured() if one.ndim), shown[0]["key"] if shown else "")
            messages.append({"type": "tensors", "tensors": [{**t, **self._axes(t["key"])} for t in shown]})
            self._choice = self._choice or {"key": first}
        if self._arrays is not None and self._choice is not None:
            choice, self._choice = self._choice, None
            messages += await self._loop.run_in_executor(None, self._chosen, choice)
        return messages

    def _axes(self, key: str) -> Message:
        """A tensor's axes as a notebook has them: steps are one where every step has a whole frame."""
        one = self._arrays[key]  # type: ignore[index]
        return {"axes": list(one.axes), "shape": list(one.shape)}

    def _chosen(self, choice: Mapping[Any, Any]) -> list[Message]:
        key, held = choice.get("key"), choice.get("held")
        arrays = self._arrays
        if arrays is None or not isinstance(key, str) or key not in arrays or not arrays[key].size:
            return []
        one: Tensor = arrays[key]
        if not one.ndim:
            return []
        fixed = (
            {a: p for a, p in held.items() if a in one.axes and answers.whole(p, 10**6)}
            if isinstance(held, dict)
            else {}
        )
        made = explore.cut(one, str(choice.get("down", "")), str(choice.get("across", "")), fixed)
        self._apply(functools.partial(self._plots.show, made, _label(one, made)))
        rows, columns = TABLE
        return [
            {
                "type": "cut",
                "key": made.key,
                "down": made.down,
                "across": made.across,
                "held": dict(made.held),
                "whole": made.whole,
                "shape": list(made.values.shape),
                "table": np.ascontiguousarray(made.values[:rows, :columns]).reshape(-1),
                "table_shape": list(made.values[:rows, :columns].shape),
            }
        ]

    def _apply(self, change: Callable[[], None]) -> None:
        """Change the plots when it is the document's turn."""
        self._doc.add_next_tick_callback(change)


def _label(one: Tensor, made: explore.Cut) -> str:
    held = ", ".join(f"{axis} {at}" for axis, at in made.held.items())
    return f"{one.key}{f' at {held}' if held else ''}"


def fill(doc: Document, lesson: Lesson, token: str, runs: Runs) -> None:
    """Put the explorer of a lesson's run on `doc`: the controls first, then the plots by name."""
    doc.config.notify_connection_status = False
    doc.config.reconnect_session = False
    places = {"fonts": "../fonts/" if fonts.folder() is not None else "", "home": "../"}
    stage = f"../assets/{assets.stage()}"
    place, problems = link.decode(lesson, token)
    told = {name: about(lesson)[name] for name in ("slug", "title", "question", "part", "order")}
    told |= {"lessons": menu("{}"), "back": f"../lesson/{lesson.slug}{f'?s={token}' if token and not problems else ''}"}
    shown = ExplorePage(stage, explore=told, start={"notices": problems}, places=places)
    shown.server_doc(doc, f"Explore: {lesson.title} · Leanscope", location=False)
    root = doc.roots[0]
    plots = Plots(doc)
    for name, figure in plots.roots.items():
        figure.name = name
        doc.add_root(figure)
    explorer = Explorer(doc, lesson, place, runs, plots, functools.partial(post, doc, root))
    shown.session = explorer
    doc.on_session_destroyed(lambda context: explorer.close())
