"""Windows: attention that leaves out most cells of the matrix, and a cache that stops growing.

Sliding window: Longformer (arXiv:2004.05150), section 3.1, and Mistral 7B (arXiv:2310.06825, section 2, figures 1 and
2; the first release: later ones and Mixtral attend fully). Dilated, and local + global: Longformer, section 3.1.
Paper -> here: W = `window`, the token itself among them (so keys i-W+1 to i); d = `dilation`; tokens with global
attention = the first `global_tokens`; rolling buffer cache = what `WindowAttention` leaves in `cache.states`.

Shapes: q [B, H, T, D], k and v [B, H_kv, T, D]. `window_mask` with masked attention is the clear form;
`banded_attention` computes only the cells near the diagonal. Deviations: Longformer looks both ways and gives global
tokens projections of their own; here all is causal and projections are shared. The buffer is cut off at its old end
rather than written round and round: the same content, in the order of the text. A dilated window must keep
(window - 1) · dilation tokens to read `window` of them, since the next token reads others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.hybrid import Mixer, hybrid
from engine.mixers.rope import Rope
from engine.mixers.softmax import PATTERN, SCORES, K, Q, SoftmaxAttention, V, attend, attention_scores
from engine.mixers.state import at_least, carried, carry, check_tokens, positions
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Decoder, Shape

MASK = site("window.mask", "whether a query may look at a key", grows="query", low=0.0, high=1.0)
REACH = site("window.reach", "how strongly one output token hangs on each token that enters a layer",
             symbol="‖∂y/∂x‖", low=0.0)  # fmt: skip


class Past(NamedTuple):
    """What a window layer keeps: the keys and values that some later token may still read, in the order of the text."""

    k: Tensor  # B H_kv S D, rotated
    v: Tensor  # B H_kv S D


def may_look(q_at: Tensor, k_at: Tensor, *, window: int, dilation: int = 1, global_tokens: int = 0) -> Tensor:
    """True where a query at a place of the text may look at a key at another: [..., Q], [..., K] -> [..., Q, K]."""
    back = q_at[..., :, None] - k_at[..., None, :]
    near = (back < window * dilation) & (back % dilation == 0)
    shared = (k_at[..., None, :] < global_tokens) | (q_at[..., :, None] < global_tokens)
    return (back >= 0) & (near | shared)


def window_mask(T: int, *, window: int, dilation: int = 1, global_tokens: int = 0) -> Tensor:
    """The mask of a whole text, true where a query may look: [T, T]."""
    check_window(window, dilation, global_tokens)
    places = torch.arange(at_least("T", T, 1))
    return may_look(places, places, window=window, dilation=dilation, global_tokens=global_tokens)


def attended_cells(T: int, *, window: int, dilation: int = 1, global_tokens: int = 0) -> int:
    """How many cells of the mask are true, without making it. A window of T or more: T (T + 1) / 2."""
    check_window(window, dilation, global_tokens)
    total = 0
    for t in range(at_least("T", T, 1)):
        near = min(window, t // dilation + 1)
        near_not_global = min(near, max(0, (t - global_tokens) // dilation + 1))
        total += near_not_global + min(global_tokens, t + 1)
    return total


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, dilation: int = 1, global_tokens: int = 0
) -> Tensor:
    """Softmax attention through the window, block against block: [B, H, T, D].

    A dilated window is a plain one over every `dilation`-th token. Each block of `window` queries meets its own keys,
    those of the block before, and the global tokens: T (2 window + global_tokens) scores instead of T².
    """
    check_window(window, dilation, global_tokens)
    B, H, T, D = q.shape
    G, r = k.shape[1], dilation
    n = -(-T // (window * r))  # blocks of each of the r interleaved sequences

    def blocks(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, n * window * r - T))
        return x.view(B, x.shape[1], n, window, r, D).permute(0, 1, 4, 2, 3, 5)  # B h r n w D

    def with_previous(x: Tensor) -> Tensor:
        before = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :, :n]
        return torch.cat((before, x), -2)  # B h r n 2w D

    places = torch.arange(n * window * r, device=q.device).view(n, window, r).permute(2, 0, 1)  # r n w
    k_at = torch.cat((places - window * r, places), -1)  # r n 2w, negative before the text
    mask = may_look(places, k_at, window=window, dilation=r) & (k_at >= global_tokens)[..., None, :]
    qb = blocks(q).unflatten(1, (G, H // G))  # B G H/G r n w D
    kb, vb = (with_previous(blocks(x))[:, :, None] for x in (k, v))  # B G 1 r n 2w D
    scores = (qb @ kb.mT).masked_fill(~mask, -torch.inf)  # B G H/G r n w 2w
    if global_tokens:
        kg, vg = (x[:, :, None, None, None, :global_tokens] for x in (k, v))  # B G 1 1 1 g D
        seen = places[..., None] >= torch.arange(kg.shape[-2], device=q.device)  # r n w g
        scores = torch.cat((scores, (qb @ kg.mT).masked_fill(~seen, -torch.inf)), -1)
        weights = (scores / D**0.5).softmax(-1)
        y = weights[..., : 2 * window] @ vb + weights[..., 2 * window :] @ vg
    else:
        y = (scores / D**0.5).softmax(-1) @ vb  # B G H/G r n w D
    return y.flatten(1, 2).permute(0, 1, 3, 4, 2, 5).reshape(B, H, n * window * r, D)[:, :, :T]


def kept_positions(seen: int, *, window: int, dilation: int = 1, global_tokens: int = 0) -> Tensor:
    """The places in the text of what is kept after `seen` tokens: the global ones and the last few, [S]."""
    first = max(0, seen - (window - 1) * dilation)
    return torch.cat((torch.arange(min(global_tokens, first)), torch.arange(first, seen)))


def window_view(
    k: Tensor, v: Tensor, past: Past | None, places: range, *, window: int, dilation: int = 1, global_tokens: int = 0
) -> tuple[View, Tensor, Past]:
    """The new keys and values [B, H_kv, T, D] behind those kept: a view (without its mask), the place in the text of
    each of its keys [S], and what to keep."""
    sizes = {"window": window, "dilation": dilation, "global_tokens": global_tokens}
    before = kept_positions(places.start, **sizes)
    k_at = torch.cat((before, torch.arange(places.start, places.stop))).to(k.device)
    if len(before) != (0 if past is None else past.k.shape[2]):
        held = 0 if past is None else past.k.shape[2]
        raise ValueError(f"{held} keys are kept, where after {places.start} tokens there must be {len(before)}")
    if past is not None:
        k, v = torch.cat((past.k, k), 2), torch.cat((past.v, v), 2)  # B H_kv S D
    keep = torch.isin(k_at, kept_positions(places.stop, **sizes).to(k.device))
    return View(k, v, range(len(before), k.shape[2])), k_at, Past(k[:, :, keep], v[:, :, keep])


def in_text(rows: Tensor, k_at: Tensor, *, fill: float) -> Tensor:
    """Columns [..., S] at their places in the text [..., N], `fill` where a key is no longer kept."""
    wide = rows.new_full((*rows.shape[:-1], int(k_at[-1]) + 1), fill)
    wide[..., k_at] = rows
    return wide


def receptive_field(layers: int, *, window: int, dilation: int = 1) -> int:
    """How many tokens, itself among them, an output token depends on: L (w - 1) d + 1. Global tokens come on top."""
    check_window(window, dilation, 0)
    return at_least("layers", layers, 0) * (window - 1) * dilation + 1


def measured_reach(model: Decoder, ids: Tensor, *, position: int = -1, seed: int = 0) -> Tensor:
    """The gradients of the output at `position` by each token of the residual stream: [layers, T].

    Row l tells which tokens entering layer l matter; an exact 0 says that nothing gets through. Taps the rows.
    """
    entering: list[Tensor] = []

    def enter(_: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # weights may be frozen
        entering.append(x)
        return (x,)

    with torch.inference_mode(False), torch.enable_grad():
        handles = [b.register_forward_pre_hook(enter) for b in model.blocks]
        try:
            y = model.hidden(ids.clone())[:, position]  # B W
        finally:
            for handle in handles:
                handle.remove()
        random = torch.Generator().manual_seed(seed)
        direction = torch.randn(y.shape[-1], generator=random).to(y)  # a plain sum is nearly constant after a norm
        gradients = torch.autograd.grad((y @ direction).sum(), entering)
    return tap(REACH, torch.stack([g.norm(dim=-1).sum(0) for g in gradients]).detach(), "layer token")


def check_window(window: int, dilation: int, global_tokens: int) -> None:
    for name, value, low in (("window", window, 1), ("dilation", dilation, 1), ("global_tokens", global_tokens, 0)):
        at_least(name, value, low)


class WindowAttention(SoftmaxAttention):
    """Softmax attention of one layer through a window; its weights are named alike, so either loads the other's."""

    def __init__(self, shape: Shape, layer: int, *, window: int, dilation: int = 1, global_tokens: int = 0) -> None:
        super().__init__(shape, layer)
        check_window(window, dilation, global_tokens)
        self.window, self.dilation, self.global_tokens = window, dilation, global_tokens

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        check_tokens(x, self.qkv.in_features)
        B, T, _ = x.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * G, self.head_width).transpose(1, 2)  # B H+2G T D
        places = positions(cache, T)
        q, k = rope.rotate(qkv[:, :H], places), rope.rotate(qkv[:, H : H + G], places)  # B H T D, B H_kv T D
        v = qkv[:, H + G :]
        sizes = {"window": self.window, "dilation": self.dilation, "global_tokens": self.global_tokens}
        past: Past | None = carried(cache, self.layer, x)
        view, k_at, kept = window_view(k, v, past, places, **sizes)
        if past is None and 2 * self.window * self.dilation < T:
            y = banded_attention(q, k, v, **sizes)
        else:
            view.mask = may_look(k_at[-T:], k_at, **sizes)  # T S
            y = attend(q, view)  # B H T D
        carry(cache, self.layer, kept)
        self._show_window(q, k, v, view, k_at, T if show is None else show)
        return self.out(y.transpose(1, 2).reshape(B, T, H * self.head_width))

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """As `forward` computes it: banded for a long text that nothing came before, else the new tokens by what is
        kept and themselves. `keys` counts the text so far, the new tokens included."""
        w, d, g = self.window, self.dilation, self.global_tokens
        if rows == keys and 2 * w * d < rows:
            cells = -(-rows // (w * d)) * w * d * (2 * w + min(g, rows))
        else:
            cells = rows * (rows + len(kept_positions(keys - rows, window=w, dilation=d, global_tokens=g)))
        met = cells * self.heads * self.head_width
        return {"scores": met, "values": met}

    def _show_window(self, q: Tensor, k: Tensor, v: Tensor, view: View, k_at: Tensor, show: int) -> None:
        """As full attention shows itself, keys at their places in the text: what was dropped has a pattern of 0."""
        layer, T = self.layer, q.shape[2]
        for name, tensor, rows in ((Q, q, "query"), (K, k, "key"), (V, v, "key")):
            if recording_on(name, layer=layer):
                tap(name, tensor[:, :, -show:], f"batch head {rows} width", layer=layer)
        if any(recording_on(name, layer=layer) for name in (MASK, SCORES, PATTERN)):
            view.mask = may_look(
                k_at[-T:], k_at, window=self.window, dilation=self.dilation, global_tokens=self.global_tokens
            )
            tap(MASK, in_text(view.mask[-show:], k_at, fill=0), "query key", layer=layer)
            scores = in_text(attention_scores(q, view, show), k_at, fill=-torch.inf)  # B H show N
            tap(SCORES, scores, "batch head query key", layer=layer)
            tap(PATTERN, scores.softmax(-1), "batch head query key", layer=layer)


def interleaved(shape: Shape, *, window: int, every: int) -> Mixer:
    """Window layers, and full attention in every `every`-th layer (2: as Gemma 2; 1: in all)."""
    at_least("every", every, 1)
    return hybrid(
        shape,
        lambda layer: WindowAttention(shape, layer, window=window),
        lambda layer: SoftmaxAttention(shape, layer),
        at=range(every - 1, shape.layers, every),
    )
