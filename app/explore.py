"""Explore: any tensor of a recording as HoloViews elements on Bokeh, with axes, zoom and values under the pointer.

In a notebook `explore` gives the elements. The page (`app/explorer.py`) renders the same ones once, and then only puts
other numbers into their sources: a HoloViews update costs 7 ms of server time for each picture, a source 0.2 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import colorcet
import holoviews as hv
import numpy as np
from bokeh.model import Model
from bokeh.models.ui import UIElement
from panel.io.notebook import patch_inline_stylesheets
from panel.viewable import Viewable

from app.arrays import Arrays, Tensor

LINEAR, DIVERGING = colorcet.palette["CET_CBL2"], colorcet.palette["CET_CBD1"]  # as the stage has them
SIDE = 1024  # positions of an axis in one picture
BINS = 40


def begin() -> None:
    """Load what a notebook needs to show Bokeh and Panel, from this machine: nothing of ours asks another host."""
    if hv.extension._loaded:
        return
    hv.extension("bokeh", inline=True, logo=False)
    if _inline not in Viewable._preprocessing_hooks:
        Viewable._preprocessing_hooks.append(_inline)


def _inline(shown: Viewable, root: Model) -> None:
    """Panel puts its style sheets into a notebook for its own components, and leaves links to a host for HoloViews'."""
    for model in root.select({"type": UIElement}):
        patch_inline_stylesheets(model)


def explore(what: Arrays | Tensor, key: str = "") -> Any:
    """A tensor as a HoloViews object: a curve along its only axis, or an image of its last two axes.

    The other axes become sliders. Of a whole recording, `key` says which tensor, else it is the first that the lesson
    shows.
    """
    tensor = what if isinstance(what, Tensor) else what[key] if key else what.pictured()[0]
    begin()
    value = hv.Dimension("value", label=tensor.symbol or tensor.key, unit=tensor.unit or None)
    values = np.asarray(tensor, np.float32)
    if tensor.ndim == 0:
        return hv.Text(0, 0, f"{tensor.key} = {float(values):.6g}")
    axes = [hv.Dimension(f"axis {i}", label=axis) for i, axis in enumerate(tensor.axes)]
    places = [np.arange(size) for size in tensor.shape]
    if tensor.ndim == 1:
        return curve(places[0], values, axes[0], value)
    if tensor.ndim == 2:
        return image(values, axes[1], axes[0], value)
    data = hv.Dataset((*reversed(places), values), [*reversed(axes)], value)
    return data.to(hv.Image, [axes[-1].name, axes[-2].name], dynamic=True).opts(**_image_options(values))


def image(values: np.ndarray, across: Any, down: Any, value: Any) -> hv.Image:
    """A matrix, its first row at the top."""
    rows, columns = values.shape
    made = hv.Image((np.arange(columns), np.arange(rows), values), [across, down], value)
    return made.opts(**_image_options(values))


def curve(places: np.ndarray, values: np.ndarray, along: Any, value: Any) -> hv.Curve:
    return hv.Curve((places, values), along, value).opts(tools=["hover"], responsive=True, height=190)


def histogram(values: np.ndarray, value: str) -> hv.Histogram:
    """How often each size of value occurs."""
    counts, edges = distribution(values)
    made = hv.Histogram((edges, counts), kdims=[value], vdims=["count"])
    return made.opts(tools=["hover"], responsive=True, height=190)


def distribution(values: np.ndarray, within: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of the finite values; the edges are those of `within` where that is given."""
    finite = values[np.isfinite(values)]
    frame = finite if within is None else within[np.isfinite(within)]
    low, high = (float(frame.min()), float(frame.max())) if frame.size else (0.0, 1.0)
    if not high > low:
        low, high = low - 0.5, low + 0.5
    counts, edges = np.histogram(finite.astype(np.float64), BINS, (low, high))
    return counts, edges


def _image_options(values: np.ndarray) -> dict[str, Any]:
    low, high, palette = scale(values)
    return {
        "tools": ["hover", "tap", "box_select"],
        "colorbar": True,
        "responsive": True,
        "height": 420,
        "invert_yaxis": True,
        "cmap": palette,
        "clim": (low, high),
    }


def scale(values: np.ndarray, *, dark: bool = False) -> tuple[float, float, list[str]]:
    """Where the colours begin and end, and which: two-sided around zero for values on both sides of it.

    What is most stands out from the ground: dark on light, light on dark.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0 < high:
        most = max(-low, high)
        return -most, most, DIVERGING
    return low, high if high > low else low + 1.0, LINEAR if dark else LINEAR[::-1]


@dataclass(frozen=True)
class Cut:
    """Two axes of a tensor, the others held at a position: a matrix; of a tensor with one axis, a single row."""

    key: str
    down: str
    across: str
    held: Mapping[str, int]
    values: np.ndarray  # float32 [down, across], at most SIDE each
    whole: bool


def cut(tensor: Tensor, down: str, across: str, held: Mapping[str, int]) -> Cut:
    """The matrix to look at. Axes that the tensor does not have fall back to its last two, positions to the nearest."""
    axes = list(tensor.axes)
    across = across if across in axes else axes[-1]
    rest = [axis for axis in axes if axis != across]
    down = down if down in rest else rest[-1] if rest else ""
    others = [axis for axis in rest if axis != down]
    sizes = dict(zip(axes, tensor.shape, strict=True))
    held = {axis: max(0, min(held.get(axis, 0), sizes[axis] - 1)) for axis in others}
    part = np.asarray(tensor)[tuple(held[axis] if axis in held else slice(None) for axis in axes)]
    if not down:
        part = part[None]
    elif axes.index(down) > axes.index(across):
        part = part.T
    shown = np.ascontiguousarray(part[:SIDE, :SIDE], np.float32)
    return Cut(tensor.key, down, across, held, shown, part.shape == shown.shape)
