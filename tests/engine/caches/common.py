"""Eviction by hand, for all policies that choose by worth: plain lists, a token, a layer and a head at a time."""

import itertools
import math

import torch
from hypothesis import strategies as st

from tests.engine.test_model import decoder, turned


def peaked(**changes):
    """The random model with sharper attention: when it is flat, raw sums only ever keep the first tokens."""
    model = decoder(**changes)
    for block in model.blocks:
        block.mixer.qkv.weight[: model.shape.heads * model.shape.head_width].mul_(8)
    return model


def fed(model, ids, cache, parts=None):
    """The logits [B, T, V] of ids [B, T] brought in portions; one by one unless told otherwise."""
    return torch.cat([model(part, cache=cache) for part in ids.split(parts or 1, 1)], 1)


def portions(total):
    """Hypothesis: how to cut `total` tokens."""
    return st.lists(st.integers(1, total), min_size=0, max_size=6).map(lambda cuts: _cut(total, cuts))


def _cut(total, cuts):
    ends = sorted({*(c for c in cuts if c < total), total})
    return [b - a for a, b in itertools.pairwise([0, *ends])]


def by_hand(model, ids, worth, *, chosen, recent, sinks=0):
    """Logits [T, V] and, token by token, what each layer and head keeps.

    A head remembers dicts: position, key before rotation, value, `paid` (the attention of all queries so far).
    When it is full, the dict of the least `worth(dict, position of the coming token)` goes, sinks and recent excepted.
    """
    s = model.shape
    H, G, D = s.heads, s.kv_heads, s.head_width
    memory = [[[] for _ in range(G)] for _ in model.blocks]
    rows, kept = [], []
    for t, token in enumerate(ids.tolist()):
        x = model.embed.weight[token]
        for block, heads in zip(model.blocks, memory, strict=True):
            q, k, v = (block.mixer.qkv.weight @ normed(x, block.norm1)).split([H * D, G * D, G * D])
            out = []
            for g, held in enumerate(heads):
                if len(held) == sinks + chosen + recent:
                    free = [one for one in held if one["position"] >= sinks and one["position"] <= t - recent]
                    held.remove(min(free, key=lambda one: worth(one, t)))
                held.append({"position": t, "key": k.view(G, D)[g], "value": v.view(G, D)[g], "paid": 0.0})
                for h in range(g * (H // G), (g + 1) * (H // G)):
                    query = turned(q.view(H, D)[h], len(held) - 1)
                    scores = [float(query @ turned(one["key"], i)) / math.sqrt(D) for i, one in enumerate(held)]
                    weights = [math.exp(score - max(scores)) for score in scores]
                    shares = [weight / sum(weights) for weight in weights]
                    out.append(sum(share * one["value"] for share, one in zip(shares, held, strict=True)))
                    for share, one in zip(shares, held, strict=True):
                        one["paid"] += share
            x = x + block.mixer.out.weight @ torch.cat(out)
            gate, up = (block.ffn.gate_up.weight @ normed(x, block.norm2)).chunk(2)
            x = x + block.ffn.down.weight @ (gate * gate.sigmoid() * up)
        rows.append((model.embed.weight if s.tied else model.head.weight) @ normed(x, model.norm))
        kept.append([[[one["position"] for one in held] for held in heads] for heads in memory])
    return torch.stack(rows), kept


def normed(x, norm):
    return x / torch.sqrt((x * x).mean() + norm.eps) * norm.weight
