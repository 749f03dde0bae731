"""Few tokens and few bits: a cache that keeps some of the tokens, whose keys and values are snapped to a grid first.

KIVI (arXiv:2402.02750), section 3.2, for values; keys here take the same way: `group` channels of a token share scale
and minimum. By channel, as KIVI stores keys, tokens would have to leave in chunks, and a window loses one at a time.
Paper -> here: G = group.
Keys are snapped before rotation, since caches that forget turn them anew at the slot where they lie.
Shapes: as in `Cache`. Bits: 1 to 15.
Errors: ValueError for bits outside 1..15, a cache that keeps all tokens (`Quantised` is for these), groups that don't
divide, keys or values that are not finite.
Deviations: the newest token is snapped too. `nbytes` counts codes, scales and minima as packed, and what the inner
cache keeps besides; the values themselves lie there given back to floats.
"""

from __future__ import annotations

from torch import Tensor

from engine.caches import Cache, View
from engine.caches.quantised import PLAIN, shrink, token_bytes
from engine.caches.selected import Selected
from engine.caches.window import Window
from engine.mixers.rope import Rope
from engine.quant import check_bits
from engine.recording import recording_on, site, tap

SNAPPED_KEYS = site("snapped.keys", "the newest keys as a cache of few bits holds them", symbol="K'")


class Snapped(Cache):
    """`inside` decides which tokens stay; `group` channels of a token share a scale (0: a whole head's)."""

    def __init__(self, inside: Window | Selected, *, bits: int, group: int = 0) -> None:
        super().__init__()
        if not isinstance(inside, Window | Selected):
            raise ValueError(f"inside must be a cache that keeps some tokens only, not {type(inside).__name__}")
        if inside.seen:
            raise ValueError(f"inside must be a fresh cache, and it has seen {inside.seen} tokens")
        check_bits(bits, high=PLAIN - 1)
        if group < 0:
            raise ValueError(f"group must be 0 or a number of channels, not {group}")
        self.inside, self.bits, self.group = inside, bits, group
        self.bound, self.at_once, self.watches = inside.bound, inside.at_once, inside.watches
        self._sizes: dict[int, tuple[int, int, int]] = {}  # layer -> heads of all rows, head width, bytes of a float

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        self._sizes[layer] = (k.shape[0] * k.shape[1], k.shape[3], k.element_size())
        k, v = (self._snap(x) for x in (k, v))
        if recording_on(SNAPPED_KEYS, layer=layer):
            tap(SNAPPED_KEYS, k, "batch head key width", layer=layer)
        return self.inside.extend(layer, k, v, rope)

    def _snap(self, x: Tensor) -> Tensor:
        return shrink(x, bits=self.bits, along="token", group=self.group or x.shape[-1]).read(x.dtype)

    def observe(self, layer: int, pattern: Tensor) -> None:
        self.inside.observe(layer, pattern)

    def observe_residual(self, layer: int, x: Tensor) -> None:
        self.inside.observe_residual(layer, x)

    def advance(self, count: int) -> None:
        self.inside.advance(count)
        super().advance(count)
        self.at_once = self.inside.at_once

    def kept(self, layer: int) -> Tensor:
        return self.inside.kept(layer)

    @property
    def nbytes(self) -> int:
        floats, codes = 0, 0.0
        for layer, (heads, width, size) in self._sizes.items():
            slots = heads * self.kept(layer).shape[-1]
            floats += 2 * slots * width * size
            codes += slots * token_bytes(bits=self.bits, group=self.group or width, kv_heads=1, head_width=width)
        return round(codes) + self.inside.nbytes - floats
