r"""A KV cache in few bits: old keys and values are stored as packed codes, the newest tokens as they came.

KIVI (arXiv:2402.02750), section 3.2 and algorithm 1; keys before rotation: KVQuant (arXiv:2401.18079), section 3.2.
Paper -> here: G = group, R = recent, s_X and z_X = `scale` and `least`; X' = s_X Q(X) + z_X.

    z = min X,   s = (max X - min X) / (2^B - 1),   Q(X) = round((X - z) / s)

Keys share scale and minimum along the `group` tokens of a chunk, channel by channel, since keys have outlier channels;
values along `group` channels of a token. "tensor" is one pair for a whole chunk of a layer: the naive way.
As soon as the tail holds recent + group tokens, its oldest `group` move to the packed side, together. The tokens of a
pass see each other in full precision and what was packed before as it is stored (so does KIVI's prefill); to measure on
a text, bring `group` tokens at a time: `at_once`.
Sizes: a layer at 16 bits is kept as it came. Else scale and minimum have 16 bits each, rounded outwards, so that the
error of a value is at most s / 2. `nbytes` counts codes bit-packed, scales, minima and the tail.
Errors: ValueError for bits outside 1..16, groups that don't divide, keys or values that are not finite.
Deviations: values wait for their chunk as keys do (KIVI: one token at a time); no sparse outliers as in KVQuant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.rope import Rope
from engine.quant import check_bits, check_values
from engine.quant.packing import pack, unpack
from engine.recording import event, recording_on, site, tap

KEYS = site("kv_bits.keys", "the keys as they are stored, read back", symbol="K'", grows="key")
VALUES = site("kv_bits.values", "the values as they are stored, read back", symbol="V'", grows="key")
KEY_CODES = site("kv_bits.key_codes", "which level stands for each key value", symbol="Q(K)", grows="key", low=0)
VALUE_CODES = site("kv_bits.value_codes", "which level stands for each value", symbol="Q(V)", grows="key", low=0)
KEY_ERROR = site("kv_bits.key_error", "what rounding changed in the keys", symbol="K'-K", grows="key")
VALUE_ERROR = site("kv_bits.value_error", "what rounding changed in the values", symbol="V'-V", grows="key")

ALONG = ("channel", "token", "tensor")
NARROW = torch.float16  # of scales and minima
PLAIN = 16  # bits at which nothing is rounded


@dataclass(frozen=True)
class Packed:
    """Chunks of tokens as stored: codes, and a scale and a minimum for those values that share them."""

    codes: Tensor  # N bytes, uint8
    scale: Tensor  # N B H T' D' n', 1 along the shared axes
    least: Tensor
    bits: int
    shape: tuple[int, ...]  # of a chunk: B H T D/n n, the last axis split into the groups of a token

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.least))

    def levels(self) -> Tensor:
        """The codes, unpacked: [N, B, H, T, D/n, n] int32."""
        return unpack(self.codes, self.bits, math.prod(self.shape)).unflatten(-1, self.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """s q + z of all chunks, one after the other: [B, H, N T, D]."""
        wide = torch.promote_types(dtype, torch.float32)
        return _tokens(torch.addcmul(self.least.to(wide), self.levels().to(wide), self.scale.to(wide))).to(dtype)

    def joined(self, more: Packed) -> Packed:
        """These chunks, then those."""
        codes, scale, least = (
            torch.cat((getattr(self, name), getattr(more, name))) for name in ("codes", "scale", "least")
        )
        return Packed(codes, scale, least, self.bits, self.shape)


def shrink(x: Tensor, *, bits: int, along: str, group: int) -> Packed:
    """Store a chunk x [B, H, T, D] in few bits. `along` says what shares a scale: a "channel" over all T tokens,
    `group` channels of a "token", or the whole "tensor" (of each sequence)."""
    check_bits(bits)
    check_values(x)
    if along not in ALONG:
        raise ValueError(f"along must be one of {', '.join(ALONG)}, not {along!r}")
    if along == "token" and x.shape[-1] % group:
        raise ValueError(f"group must divide head_width={x.shape[-1]} to be shared by a token's channels, not {group}")
    parts = x.unflatten(-1, (-1, group if along == "token" else 1))[None]  # 1 B H T D/n n
    shared = {"channel": (3,), "token": (5,), "tensor": (2, 3, 4, 5)}[along]
    steps = 2**bits - 1
    least = _rounded(parts.amin(shared, keepdim=True).double(), down=True)
    scale = _rounded((parts.amax(shared, keepdim=True).double() - least.double()) / steps, down=False)
    if not bool((scale.isfinite() & least.isfinite()).all()):
        raise ValueError(f"x must stay within the range of {NARROW}, and reaches {float(x.abs().max()):.3g}")
    wide = torch.promote_types(x.dtype, torch.float32)
    # Without a difference there is nothing to scale: any step but 0 will do.
    lines = (parts.to(wide) - least.to(wide)) / torch.where(scale == 0, 1, scale).to(wide)
    codes = lines.round().clamp(0, steps).int()
    return Packed(pack(codes.flatten(1), bits), scale, least, bits, tuple(parts.shape[1:]))


class Quantised(Cache):
    """`bits`: one number for all layers, or one each. `keys` and `values` say what shares a scale; `rotated`, whether
    keys are stored after RoPE (as KIVI does) or before (as KVQuant: channels then keep their outliers in place)."""

    def __init__(
        self,
        bits: int | Sequence[int],
        *,
        keys: str = "channel",
        values: str = "token",
        group: int = 32,
        recent: int = 32,
        rotated: bool = True,
        at_once: int | None = None,
    ) -> None:
        super().__init__()
        for each in [bits] if isinstance(bits, int) else bits:
            check_bits(each)
        for name, along in (("keys", keys), ("values", values)):
            if along not in ALONG:
                raise ValueError(f"{name} must be one of {', '.join(ALONG)}, not {along!r}")
        if group < 1 or recent < 0:
            raise ValueError(f"group must be 1 or more and recent 0 or more, not {group} and {recent}")
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once must be 1 or more tokens, or None, not {at_once}")
        self._bits, self._along, self._group, self._recent = bits, (keys, values), group, recent
        self._rotated, self.at_once = rotated, at_once
        self._packed: dict[int, tuple[Packed, Packed]] = {}  # layer -> keys and values, oldest first
        self._tail: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> B H_kv T D, twice

    def bits(self, layer: int) -> int:
        """The bits of a layer."""
        if isinstance(self._bits, int):
            return self._bits
        if layer >= len(self._bits):
            raise ValueError(f"bits must name a number for every layer, and has {len(self._bits)} for layer {layer}")
        return self._bits[layer]

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        start, stop = self.seen, self.seen + k.shape[2]
        bits = self.bits(layer)
        new = rope.rotate(k, range(start, stop)) if self._rotated else k
        if layer in self._tail:
            new, v = (torch.cat((old, more), 2) for old, more in zip(self._tail[layer], (new, v), strict=True))
        all_k, all_v = new, v  # B H_kv S D
        if layer in self._packed:
            stored = (part.read(k.dtype) for part in self._packed[layer])
            all_k, all_v = (torch.cat(pair, 2) for pair in zip(stored, (new, v), strict=True))
        if bits < PLAIN:
            new, v = self._move(layer, bits, new, v)
        self._tail[layer] = (new, v)
        if not self._rotated:
            all_k = rope.rotate(all_k, range(stop))
        view = View(all_k, all_v, range(start, stop), causal=start == 0)
        if start and stop - start > 1:
            view.mask = torch.ones(stop - start, stop, dtype=torch.bool, device=k.device).tril(start)  # T S
        return view

    def _move(self, layer: int, bits: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Pack the oldest `group` tokens of the tail as long as `recent` are left; returns the rest."""
        group = self._group
        first = self._packed[layer][0].codes.shape[0] * group if layer in self._packed else 0
        while k.shape[2] >= self._recent + group:
            pair = []
            for side, (x, along) in enumerate(zip((k, v), self._along, strict=True)):
                old = x[:, :, :group]
                chunk = shrink(old, bits=bits, along=along, group=group)
                codes, back, error = ((KEY_CODES, KEYS, KEY_ERROR), (VALUE_CODES, VALUES, VALUE_ERROR))[side]
                if recording_on(codes, layer=layer):
                    tap(codes, _tokens(chunk.levels()), "batch head key width", layer=layer)
                if recording_on(back, layer=layer) or recording_on(error, layer=layer):
                    read = tap(back, chunk.read(x.dtype), "batch head key width", layer=layer)
                    tap(error, read - old, "batch head key width", layer=layer)
                pair.append(chunk)
            if layer in self._packed:
                pair = [old.joined(new) for old, new in zip(self._packed[layer], pair, strict=True)]
            self._packed[layer] = (pair[0], pair[1])
            event("cache.pack", layer=layer, first=first, count=group, bits=bits, cache=self.name)
            first += group
            # A copy, or the slice would keep the whole tail alive.
            k, v = k[:, :, group:].clone(), v[:, :, group:].clone()
        return k, v

    def kept(self, layer: int) -> Tensor:
        return torch.arange(self.seen)

    @property
    def nbytes(self) -> int:
        packed = sum(part.nbytes for pair in self._packed.values() for part in pair)
        return packed + sum(t.numel() * t.element_size() for pair in self._tail.values() for t in pair)

    @property
    def whole_values(self) -> int:
        """How many values are still as they came."""
        return sum(t.numel() for pair in self._tail.values() for t in pair)


def token_bytes(*, bits: int, group: int, kv_heads: int, head_width: int) -> float:
    """Bytes that a packed token takes in one layer, keys by channel and values by token: codes, and for each `group`
    values a scale and a minimum."""
    check_bits(bits, high=PLAIN - 1)
    return 2 * kv_heads * head_width * (bits / 8 + 4 / group)


def _tokens(chunks: Tensor) -> Tensor:
    """[N, B, H, T, D/n, n] -> [B, H, N T, D]."""
    return chunks.flatten(-2).movedim(0, 2).flatten(2, 3)


def _rounded(x: Tensor, *, down: bool) -> Tensor:
    """`x` in 16 bits, never above it (down) or never below it."""
    near = x.to(NARROW)
    wrong = near.double() > x if down else near.double() < x
    step = x.abs().clamp(min=torch.finfo(NARROW).smallest_normal) * torch.finfo(NARROW).eps
    return torch.where(wrong, (x - step if down else x + step).to(NARROW), near)
