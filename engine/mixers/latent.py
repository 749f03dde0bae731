"""Latent attention: a token leaves one short sketch in the cache, and keys and values of all heads are redrawn from it.

Multi-head Latent Attention of DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C.
Paper -> here: c_t^KV = `c`, W^DKV and W^KR = `compress` (latent rows first), W^UK and W^UV = `rebuild` (of each head
the keys first), k_t^R = rope key, one for all heads, d_c = `rank`, d_h = head_width (of a value, and of a key
without its position), d_h^R = `rope_width`, d_c' = `q_rank`, W^DQ = `q_compress`, W^UQ and W^QR = `q` (of each head the
former first).
Scores are divided by sqrt(d_h + d_h^R). RMSNorm sits on the latent, before it is cached.

Two forms of the same sums. "naive" rebuilds every key and value: k = W^UK c. "absorbed" moves the matrices over to the
query and to the answer, q · (W^UK c) = (W^UKᵀ q) · c, so that latents are attended to as the one key and value of all
heads (multi-query attention) and nothing is rebuilt. The form is no matter of weights: `in_form` gives the same model
in the other one.

The cache is given the rope key as its key and the latent as its value, rank + rope_width values a token and layer,
one vector and not two: every cache that keeps keys and values keeps latents too.
Deviations: halves are paired in RoPE as in all of this engine, where DeepSeek pairs neighbours; kv_heads of the shape
is not used.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.caches import Cache, View, fresh
from engine.mixers.rope import Rope, rope_tables
from engine.mixers.softmax import PATTERN, SCORES, K, Q, V, attend, attention_scores, own_keys
from engine.mixers.state import at_least, check_tokens
from engine.norm import RMSNorm
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Decoder, Shape

LATENT = site("latent.c", "the sketch of each token, from which keys and values of all heads are rebuilt", symbol="c",
              grows="key")  # fmt: skip
ROPE_KEY = site("latent.rope_key", "the part of the keys that knows the position, shared by all heads, after rotation",
                symbol="k^R", grows="key")  # fmt: skip
ABSORBED = site("latent.query", "the query carried over to the space of the latents, and its rotated part",
                symbol="W^UKᵀ q, q^R", grows="query")  # fmt: skip

FORMS = ("naive", "absorbed")


class Latent(nn.Module):
    """Mixer of one layer. `q_rank` (None: none) compresses queries too, which saves weights and no cache."""

    def __init__(
        self, shape: Shape, layer: int, *, rank: int, rope_width: int, q_rank: int | None = None, form: str = "naive"
    ) -> None:
        super().__init__()
        at_least("rank", rank, 1)
        if at_least("rope_width", rope_width, 2) % 2:
            raise ValueError(f"rope_width must be even, since RoPE turns pairs, not {rope_width}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        self.layer, self.heads, self.head_width = layer, shape.heads, shape.head_width
        self.rank, self.rope_width, self.q_rank, self.form = rank, rope_width, q_rank, form
        self.q_compress: nn.Module | None = None
        if q_rank is not None:
            self.q_compress = nn.Sequential(
                nn.Linear(shape.width, at_least("q_rank", q_rank, 1), bias=False), RMSNorm(q_rank, eps=shape.norm_eps)
            )
        self.q = nn.Linear(q_rank or shape.width, shape.heads * (shape.head_width + rope_width), bias=False)
        self.compress = nn.Linear(shape.width, rank + rope_width, bias=False)
        self.norm = RMSNorm(rank, eps=shape.norm_eps)
        self.rebuild = nn.Linear(rank, shape.heads * 2 * shape.head_width, bias=False)
        self.out = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)
        self._base, self._positions = shape.rope_base, shape.max_positions
        self._ropes: dict[tuple[torch.dtype, torch.device], Rope] = {}

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        """`rope` has angles for the head's whole width; the narrower rotated part needs its own."""
        check_tokens(x, self.compress.in_features)
        B, T, _ = x.shape
        H, D = self.heads, self.head_width
        turn = self._rope(x)
        q = self.q(x if self.q_compress is None else self.q_compress(x))
        q = q.view(B, T, H, D + self.rope_width).transpose(1, 2)  # B H T D+R
        c, k_rope = self.compress(x).split((self.rank, self.rope_width), -1)
        c, k_rope = self.norm(c)[:, None], k_rope[:, None]  # B 1 T rank, B 1 T R
        held = fresh(k_rope, c, turn) if cache is None else cache.extend(self.layer, k_rope, c, turn)
        q = torch.cat((q[..., :D], turn.rotate(q[..., D:], held.q_positions)), -1)  # B H T D+R
        if self.form == "naive":
            asked, view = q, self._rebuilt(held)
            y = attend(asked, view)  # B H T D
        else:
            asked, view = self._absorbed(q, held)
            y = attend(asked, view) @ self._matrices()[:, D:].mT  # B H T D
        self._show(q, asked, c, view, cache, T if show is None else show)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))

    def _matrices(self) -> Tensor:
        """W^UK above W^UV of each head: [H, 2D, rank]."""
        return self.rebuild.weight.view(self.heads, 2 * self.head_width, self.rank)

    def _rebuilt(self, held: View) -> View:
        """Keys and values of all heads, from the latents and the rope keys that the cache holds."""
        rows, _, S, _ = held.k.shape
        k, v = self.rebuild(held.v[:, 0]).view(rows, S, self.heads, -1).transpose(1, 2).chunk(2, -1)  # rows H S D
        k = torch.cat((k, held.k.expand(-1, self.heads, -1, -1)), -1)  # rows H S D+R
        return View(k, v, held.q_positions, held.mask, held.causal)

    def _absorbed(self, q: Tensor, held: View) -> tuple[Tensor, View]:
        """Queries that meet the latents as they are, and the latents as key and value of one shared head."""
        D = self.head_width
        q = torch.cat((q[..., :D] @ self._matrices()[:, :D], q[..., D:]), -1)  # B H T rank+R
        # The kernel divides by the root of what it sees, and the sum is one of D + R products.
        q = q * ((self.rank + self.rope_width) / (D + self.rope_width)) ** 0.5
        return q, View(torch.cat((held.v, held.k), -1), held.v, held.q_positions, held.mask, held.causal)

    def _rope(self, x: Tensor) -> Rope:
        key = (x.dtype, x.device)
        if key not in self._ropes:
            self._ropes[key] = rope_tables(
                self.rope_width, base=self._base, count=self._positions, dtype=x.dtype, device=x.device
            )
        return self._ropes[key]

    def _show(self, q: Tensor, asked: Tensor, c: Tensor, view: View, cache: Cache | None, show: int) -> None:
        layer, D, B, T = self.layer, self.head_width, q.shape[0], q.shape[2]
        watched = cache is not None and cache.watches
        if recording_on(Q, layer=layer):
            tap(Q, q[:, :, -show:], "batch head query width", layer=layer)
        if recording_on(LATENT, layer=layer):
            tap(LATENT, c[:, 0, -show:], "batch key width", layer=layer)
        if any(recording_on(name, layer=layer) for name in (ROPE_KEY, K, V)):
            k = own_keys(view, B, T)[:, :, -show:]  # B H T D+R, or B 1 T rank+R
            tap(ROPE_KEY, k[:, 0, :, -self.rope_width :], "batch key width", layer=layer)
            if self.form == "naive":
                tap(K, k, "batch head key width", layer=layer)
                v = c[:, :, -show:] @ self._matrices()[:, D:].mT  # B H T D
                tap(V, v, "batch head key width", layer=layer)
        if self.form == "absorbed" and recording_on(ABSORBED, layer=layer):
            tap(ABSORBED, asked[:, :, -show:], "batch head query width", layer=layer)
        if watched or recording_on(PATTERN, layer=layer) or recording_on(SCORES, layer=layer):
            scores = attention_scores(asked, view, show)  # B H show S
            tap(SCORES, scores, "batch head query key", layer=layer)
            pattern = tap(PATTERN, scores.softmax(-1), "batch head query key", layer=layer)
            if cache is not None and cache.watches:
                cache.observe(layer, pattern)

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """Of `rows` new tokens that meet `keys` tokens, by the parts of `engine.generate`; `out` is in its weights.

        Rebuilding the `keys` keys and values counts as qkv; carrying queries over as scores, answers back as values.
        """
        H, D, R = self.heads, self.head_width, self.rope_width
        weights = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and n[:3] not in ("out", "reb"))
        if self.form == "naive":
            met = rows * keys * H
            rebuilt = keys * self.rebuild.weight.numel()
            return {"qkv": rows * weights + rebuilt, "scores": met * (D + R), "values": met * D}
        carried, met = rows * H * D * self.rank, rows * keys * H
        return {
            "qkv": rows * weights,
            "scores": carried + met * (self.rank + R),
            "values": carried + met * self.rank,
        }

    def values_moved(self, *, keys: int) -> dict[str, int]:
        """Values read or written for one new token that meets `keys` tokens: weights once, the cache once, and, in the
        naive form, every rebuilt key and value once written and once read."""
        H, D, R = self.heads, self.head_width, self.rope_width
        rebuilt = 2 * keys * H * (2 * D + R) if self.form == "naive" else 0
        return {
            "weights": sum(p.numel() for p in self.parameters()),
            "cache": keys * (self.rank + R),
            "rebuilt": rebuilt,
        }


def in_form(model: Decoder, form: str) -> Decoder:
    """A decoder of the same weights, not copied, whose latent attention works in that form."""
    from engine.model import Decoder

    mixers = [block.mixer for block in model.blocks if isinstance(block.mixer, Latent)]
    if len(mixers) < len(model.blocks):
        raise ValueError(f"model must have latent attention in all layers, and has it in {len(mixers)}")

    def mixer(layer: int) -> Latent:
        m = mixers[layer]
        return Latent(model.shape, layer, rank=m.rank, rope_width=m.rope_width, q_rank=m.q_rank, form=form)

    with torch.device("meta"):
        twin = Decoder(model.shape, mixer=mixer)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.train(model.training).requires_grad_(model.embed.weight.requires_grad)


def with_rope(model: Decoder, *, width: int) -> Decoder:
    """A copy in which `width` values of the rope keys still work, the quickest pairs first; the others are zero.

    Nothing is trained again and the cache is as large as before: it shows what the part that knows positions is for.
    """
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        m = block.mixer
        if not isinstance(m, Latent):
            raise ValueError("model must have latent attention in all layers, and a layer has another mixer")
        if not 0 <= width <= m.rope_width or width % 2:
            raise ValueError(f"width must be even and from 0 to rope_width={m.rope_width}, not {width}")
        with torch.no_grad():
            for half in (m.rank, m.rank + m.rope_width // 2):  # a pair has one value in each half
                m.compress.weight[half + width // 2 : half + m.rope_width // 2] = 0.0
    return twin
