"""No cache at all: for every new token the model reads the text before it anew, or its last tokens.

"Sliding window with re-computation" of StreamingLLM (arXiv:2309.17453), figure 1c: O(T L²) for T tokens and
L = size. Without a size it is what a cache saves: O(T³) for the attention of a whole generation.

It is a way of reading, not a cache: nothing survives from one token to the next, the first token of each window
stands at position 0 and is seen by nobody before it, which is why it works as a sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from engine.caches import Cache

if TYPE_CHECKING:
    from engine.model import Decoder


@dataclass(frozen=True)
class Recompute:
    """Reads the last `size` tokens for every token; None: all of them."""

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"size must be None or a number of tokens above 0, not {self.size!r}")

    @property
    def bound(self) -> int | None:
        return self.size

    def rows(self, count: int) -> int:
        """How many positions are computed for the last of `count` tokens."""
        return count if self.size is None else min(count, self.size)

    def hidden(self, model: Decoder, ids: Tensor, *, cache: Cache | None = None, show: int = 1) -> Tensor:
        """The last `show` rows [B, show, W] after all tokens `ids` [B, T]. A fresh `cache` may watch the pass."""
        window = ids[:, -self.rows(ids.shape[1]) :]
        return model.hidden(window, cache=cache, show=show)[:, -show:]
