"""Explore: any tensor of a recording, as HoloViews elements on Bokeh."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np

from app.arrays import Arrays, Tensor


def explore(what: Arrays | Tensor, key: str = "") -> Any:
    """A tensor as a HoloViews object: a curve along its only axis, or an image of its last two axes.

    The other axes become sliders. Of a whole recording, `key` says which tensor, else it is the first that the lesson
    shows.
    """
    tensor = what if isinstance(what, Tensor) else what[key] if key else what.pictured()[0]
    if "bokeh" not in hv.Store.renderers or hv.Store.current_backend != "bokeh" or not hv.extension._loaded:
        hv.extension("bokeh", logo=False)
    axes = [hv.Dimension(axis, label=axis) for axis in tensor.axes]
    value = hv.Dimension("value", label=tensor.symbol or tensor.key, unit=tensor.unit or None)
    if tensor.ndim == 0:
        return hv.Text(0, 0, f"{tensor.key} = {float(tensor)}")
    places = tuple(np.arange(size) for size in tensor.shape)
    values = np.asarray(tensor, np.float32)
    if tensor.ndim == 1:
        return hv.Curve((places[0], values), axes, value)
    data = hv.Dataset((*reversed(places), values), [*reversed(axes)], value)
    return data.to(hv.Image, [tensor.axes[-1], tensor.axes[-2]], dynamic=True)
