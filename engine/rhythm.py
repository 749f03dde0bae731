"""Does attention have a rhythm? How far a token looks back, how much later ones look at it, and whether these couple.

Li et al. 2025, "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm ..." (arXiv:2510.13554).
Paper -> here: local heads = `near`, global heads = `far`, told apart by their mean distance; WAAD (windowed average
attention distance) = `waad`; FAI (future attention influence) = `fai`; preplan tokens = peaks of WAAD over the near
heads; anchor tokens = peaks of FAI over the far heads.

    distance(head) = mean over t of Σ_s A[t, s] · (t − s)
    WAAD(t) = Σ_s A[t, s] · min(t − s, window)
    FAI(s)  = mean over t = s + first .. min(s + last, T − 1) of A[t, s]

The abstract says what WAAD and FAI measure; these formulas, the peaks and the test of their coupling are written here
after that idea and may differ from the paper in detail. Ours for sure: `sinks`, the first tokens that are left out as
keys (what a query pays to the others is then scaled to 1), because most heads of small models rest on the first token,
which would count as a long look; a query that sees nothing else counts as distance 0.
Shapes: patterns [H, T, T] a layer, query by key, rows summing to 1 -> measures [L, H] and [L, H, T].
Errors: ValueError for patterns that are no square of shares, and sizes out of range.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches.full import Full
from engine.model import Decoder
from engine.recording import site, tap

DISTANCE = site("rhythm.distance", "how far back a head looks on average", low=0.0, unit="tokens")
WAAD = site("rhythm.waad", "how far back a token looks, clipped to the window, mean over the near heads",
            symbol="WAAD", low=0.0, unit="tokens")  # fmt: skip
FAI = site("rhythm.fai", "share of attention that later tokens pay to a token, mean over the far heads", symbol="FAI",
           low=0.0)  # fmt: skip
PEAKS = site("rhythm.peaks", "whether a token is a peak of the measure", low=0.0, high=1.0)
CHANCE = site("rhythm.chance", "shares of coupled peaks when positions are turned about by chance", low=0.0, high=1.0)

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Rhythm:
    """The measures of a text of T tokens, head by head."""

    distance: Tensor  # L H
    waad: Tensor  # L H T
    fai: Tensor  # L H T, NaN for tokens with too few after them

    def over(self, heads: Sequence[Head]) -> tuple[Tensor, Tensor]:
        """WAAD and FAI [T], averaged over these heads."""
        if not heads:
            raise ValueError("heads must name one (layer, head) at least")
        layers, numbers = zip(*heads, strict=True)
        return self.waad[list(layers), list(numbers)].mean(0), self.fai[list(layers), list(numbers)].mean(0)


def measure(pattern: Tensor, *, window: int = 10, first: int = 4, last: int = 50,
            sinks: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of one layer's pattern [H, T, T]: mean distance [H], WAAD [H, T] and FAI [H, T], in float64."""
    if pattern.dim() != 3 or pattern.shape[1] != pattern.shape[2] or not pattern.numel():
        raise ValueError(f"pattern must have shape [head, query, key], both as many, not {list(pattern.shape)}")
    T = pattern.shape[1]
    if window < 1 or not 1 <= first <= last:
        raise ValueError(f"window must be 1 or more and 1 <= first <= last, not {window}, {first} and {last}")
    if not 0 <= sinks < T:
        raise ValueError(f"sinks must be from 0 to {T - 1}, not {sinks}")
    a = pattern.double()
    if not bool(((a.sum(-1) - 1).abs() < 1e-3).all()) or bool(a.triu(1).any()):
        raise ValueError("pattern must hold shares: each row sums to 1, and no query looks ahead")
    if sinks:
        a = torch.cat([torch.zeros_like(a[..., :sinks]), a[..., sinks:]], -1)
        a = a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)  # a row with nothing left stays zero
    places = torch.arange(T, device=a.device)
    back = (places[:, None] - places).clamp_min(0)  # T T, query minus key
    far = (a * back).sum(-1)  # H T
    waad = (a * back.clamp_max(window)).sum(-1)  # H T
    later = (back >= first) & (back <= last)  # T T
    fai = (a * later).sum(1) / later.sum(0)  # H T, 0/0 = NaN where nobody comes late enough
    return far[:, sinks:].mean(-1), waad, fai


def rhythm(patterns: Iterable[Tensor], *, window: int = 10, first: int = 4, last: int = 50, sinks: int = 0) -> Rhythm:
    """The measures of every layer's pattern [H, T, T], taken one at a time."""
    found = [measure(p, window=window, first=first, last=last, sinks=sinks) for p in patterns]
    if not found:
        raise ValueError("patterns must hold one layer at least")
    return Rhythm(*(torch.stack(parts) for parts in zip(*found, strict=True)))


class Listener(Full):
    """A full cache that measures each layer's pattern as it passes, and keeps none. One pass reads the whole text."""

    watches = True

    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.settings = settings
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, layer: int, pattern: Tensor) -> None:
        self.found.append(measure(pattern[0], **self.settings))


@torch.inference_mode()
def listen(model: Decoder, ids: Tensor, *, window: int = 10, first: int = 4, last: int = 50, sinks: int = 0) -> Rhythm:
    """The measures of ids [T] or [1, T], read in one pass: patterns live one layer at a time."""
    rows = ids if ids.dim() == 2 else ids[None]
    if len(rows) != 1 or not rows.shape[1]:
        raise ValueError(f"ids must be one text with a token at least, not of shape {list(ids.shape)}")
    cache = Listener(window=window, first=first, last=last, sinks=sinks)
    model.hidden(rows.to(model.embed.weight.device), cache=cache)
    if not cache.found:
        raise ValueError("model must have layers with an attention pattern")
    found = Rhythm(*(torch.stack(parts).cpu() for parts in zip(*cache.found, strict=True)))
    tap(DISTANCE, found.distance, "layer head")
    return found


def near_and_far(distance: Tensor, *, share: float = 0.3) -> tuple[list[Head], list[Head]]:
    """The `share` of all heads [L, H] that look nearest, and those that look farthest, one at least of each."""
    if distance.dim() != 2 or distance.numel() < 2 or not 0 < share <= 0.5:
        raise ValueError(f"distance must be [layer, head] with two heads, and share in (0, 0.5], not {share}")
    count = max(1, int(share * distance.numel()))
    order = distance.flatten().argsort(stable=True).tolist()
    near, far = ([divmod(i, distance.shape[1]) for i in part] for part in (order[:count], order[-count:]))
    return near, far


def peaks(curve: Tensor, *, share: float = 0.2, name: str = "") -> Tensor:
    """Which tokens [T] are peaks: no lower than both neighbours, and among the highest `share`. NaN is never one."""
    if curve.dim() != 1 or len(curve) < 3 or not 0 < share < 1:
        raise ValueError(f"curve must hold three tokens and share be in (0, 1), not {list(curve.shape)} and {share}")
    known = curve[~curve.isnan()]
    if not len(known):
        raise ValueError("curve must hold one number at least that is not NaN")
    middle = curve.nan_to_num(nan=-torch.inf)
    padded = torch.cat([middle[:1], middle, middle[-1:]])
    high = middle >= torch.quantile(known, 1 - share)
    found = (middle >= padded[:-2]) & (middle >= padded[2:]) & ((middle > padded[:-2]) | (middle > padded[2:])) & high
    return tap(PEAKS, found, "query", measure=name) if name else found


@dataclass(frozen=True)
class Coupling:
    """The share of planning peaks with an anchor at most `within` tokens after, by chance too, and how rare that is."""

    share: float
    chance: Tensor  # of each shuffle
    p: float  # share of shuffles (this one counted) that couple as much


def coupled(planning: Tensor, anchors: Tensor, *, within: int = 2) -> float:
    """The share of planning peaks [T] with an anchor [T] at the same token or at most `within` later."""
    _check_peaks(planning, anchors, within)
    reach = torch.stack([torch.cat([anchors[k:], anchors.new_zeros(k)]) for k in range(within + 1)]).any(0)  # T
    return int((planning & reach).sum()) / int(planning.sum())


def coupling(planning: Tensor, anchors: Tensor, *, within: int = 2, shuffles: int = 999, seed: int = 0,
             turned: bool = True) -> Coupling:  # fmt: skip
    """How often peaks [T] go together, against chance: a permutation test with p = (1 + as high) / (1 + shuffles).

    By chance the anchors are turned round the text as a ring, which keeps their distances (`turned`), or all mixed up.
    """
    if shuffles < 1:
        raise ValueError(f"shuffles must be 1 or more, not {shuffles}")
    _check_peaks(planning, anchors, within)
    share = coupled(planning, anchors, within=within)
    generator = torch.Generator().manual_seed(seed)
    T = len(anchors)
    values = []
    for _ in range(shuffles):
        if turned:
            moved = anchors.roll(int(torch.randint(1, T, (1,), generator=generator)))
        else:
            moved = anchors[torch.randperm(T, generator=generator)]
        values.append(coupled(planning, moved, within=within))
    chance = tap(CHANCE, torch.tensor(values, dtype=torch.float64), "shuffle")
    return Coupling(share, chance, (1 + int((chance >= share).sum())) / (1 + shuffles))


def shuffled(ids: Tensor, *, seed: int, fixed: int = 1) -> Tensor:
    """The same tokens [T] in another order, the first `fixed` in their place: a text whose order means nothing."""
    if ids.dim() != 1 or not 0 <= fixed <= len(ids):
        raise ValueError(f"ids must be [T] and fixed from 0 to T, not {list(ids.shape)} and {fixed}")
    order = torch.randperm(len(ids) - fixed, generator=torch.Generator().manual_seed(seed)) + fixed
    return torch.cat([ids[:fixed], ids[order.to(ids.device)]])


def beat(found: Rhythm, *, share: float = 0.3, high: float = 0.2, within: int = 2, skip: int = 1, shuffles: int = 999,
         seed: int = 0) -> tuple[Tensor, Tensor, Coupling]:  # fmt: skip
    """All of it, tapped: WAAD [T] over the near heads, FAI [T] over the far heads, and the coupling of their peaks.

    `skip` tokens at the start and all whose FAI nobody can know yet take no part in the coupling.
    """
    near, far = near_and_far(found.distance, share=share)
    waad, fai = tap(WAAD, found.over(near)[0], "query"), tap(FAI, found.over(far)[1], "query")
    known = ~fai.isnan()
    known[:skip] = False
    inner = slice(skip, int(known.nonzero().max()) + 1) if bool(known.any()) else slice(0, 0)
    planning, anchors = peaks(waad[inner], share=high), peaks(fai[inner], share=high)
    for name, marks in (("waad", planning), ("fai", anchors)):
        all_marks = torch.zeros(len(waad), dtype=torch.bool)
        all_marks[inner] = marks
        tap(PEAKS, all_marks, "query", measure=name)
    return waad, fai, coupling(planning, anchors, within=within, shuffles=shuffles, seed=seed)


def _check_peaks(planning: Tensor, anchors: Tensor, within: int) -> None:
    if planning.dim() != 1 or planning.shape != anchors.shape or {planning.dtype, anchors.dtype} != {torch.bool}:
        raise ValueError("planning and anchors must be true or false for each token of one text")
    if not bool(planning.any()) or not bool(anchors.any()) or not 0 <= within < len(planning):
        raise ValueError(f"planning and anchors must hold a peak each, and within be from 0 to T - 1, not {within}")
