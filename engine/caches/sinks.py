"""Attention sinks: the window, and the first few tokens for ever.

StreamingLLM (arXiv:2309.17453), section 3.2 and figure 4. Paper -> here: "attention sinks" = the first `sinks`
tokens, "rolling KV cache" = the last `window` tokens, the one being read among them; cache size = sinks + window.
Positions are counted in the cache: when the text is longer, the sinks stay at slots 0, 1, ... right before the
window, and keys are rotated where they lie. With sinks = 0 it is the plain window.
"""

from __future__ import annotations

from engine.caches.window import Window


class Sinks(Window):
    """The first `sinks` tokens and the last `window`."""

    def __init__(self, sinks: int, window: int) -> None:
        if not isinstance(sinks, int) or sinks < 0:
            raise ValueError(f"sinks must be a number of tokens, 0 or more, not {sinks!r}")
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a number of tokens above 0, not {window!r}")
        super().__init__(sinks + window)
        self.sinks, self.window = sinks, window

    def slots(self, position: int) -> list[int]:
        if position < self.size:
            return list(range(position + 1))
        return [*range(self.sinks), *range(position - self.window + 1, position + 1)]

    def why(self) -> str:
        return f"it is neither among the first {self.sinks} nor among the last {self.window}"
