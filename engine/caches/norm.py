"""Keep the short keys: a token whose key has a small norm will be looked at, and no attention need be watched.

"A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (Devoto et al. 2024, arXiv:2406.11430).
Paper -> here: ‖k‖₂ = minus the score, kept tokens = `low`. RoPE turns a key and leaves its norm, so that keys before
rotation do. Deviations: the last `recent` tokens are always kept, and one token goes whenever one comes; the authors
compress by a share of the text. To leave some layers whole, as they do with the first, give `low` a number a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.caches.selected import Selected


class LowNorm(Selected):
    """The last `recent` tokens and, in each layer and head, the `low` ones of the smallest key norm."""

    def __init__(self, low: int | Sequence[int], *, recent: int, sinks: int = 0) -> None:
        super().__init__(low, recent=recent, sinks=sinks, called="low")

    def first_score(self, k: Tensor) -> Tensor:
        wide = torch.promote_types(k.dtype, torch.float32)
        return -torch.linalg.vector_norm(k, dim=-1, dtype=wide)  # B H_kv T

    def why(self, worth: float) -> str:
        return f"its key was the longest of its head: {-worth:.3g}"
