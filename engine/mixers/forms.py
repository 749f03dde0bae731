"""One layer's queries, keys and values through every form of linear attention, so that forms can be compared.

Katharopoulos 2020 (arXiv:2006.16236), Choromanski 2021 (arXiv:2009.14794), Sun 2023 (arXiv:2307.08621).
Paper -> here: phi = a `Map`, gamma = `decay` [H], S = the state, D = the decay mask. The forms themselves stand in
linear.py and retention.py; this file measures them. Shapes: q, k, v [H, T, D], float64.
Deviation: any feature map may be given a decay, which no paper here does; decay 1 is linear attention as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches import View
from engine.mixers import linear, retention
from engine.mixers.performer import (
    gaussian_omega,
    orthogonal_omega,
    positive_features,
    softmax_kernel,
    trigonometric_features,
)
from engine.mixers.softmax import K, Q, V, attend
from engine.mixers.state import at_least
from engine.model import Decoder
from engine.recording import record

FAVOR = {"positive": positive_features, "trigonometric": trigonometric_features}
MAPS = ("elu", *FAVOR, "none")


@dataclass(frozen=True)
class Map:
    """A feature map by name, with the directions it draws. "none" leaves q and k as they are, as retention does."""

    name: str
    omega: Tensor | None = None  # m D, for the random ones

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        if self.name == "elu":
            return linear.elu_features(x)
        if self.omega is None:
            return x * x.shape[-1] ** -0.25  # the product is then over the root of the width
        return FAVOR[self.name](x * x.shape[-1] ** -0.25, self.omega.to(x))

    @property
    def normalised(self) -> bool:
        """Whether answers are divided by the sum of their weights."""
        return self.name != "none"


def feature_map(name: str, width: int, *, count: int, orthogonal: bool = True, seed: int = 0) -> Map:
    """The map called `name`; `count` and `orthogonal` matter to the random ones."""
    if name not in MAPS:
        raise ValueError(f"name must be one of {', '.join(MAPS)}, not {name!r}")
    if name not in FAVOR:
        return Map(name)
    return Map(name, (orthogonal_omega if orthogonal else gaussian_omega)(count, width, seed=seed))


def heads_of(model: Decoder, ids: Tensor, *, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rotated queries and keys, and the values, of one layer that read ids [1, T]: [H, T, D] each."""
    wanted = {"layer": layer}
    with record(keep={Q: wanted, K: wanted, V: wanted}) as inner:
        model.hidden(ids)
    recording = inner.freeze()
    q, k, v = (torch.from_numpy(recording.stack(name, **wanted)[0].copy()).double() for name in (Q, K, V))
    groups = q.shape[0] // k.shape[0]
    return q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)


def written(phi_k: Tensor, v: Tensor, *, decay: Tensor) -> Iterator[Tensor]:
    """The state after each token, with a last column that holds the sum of the features: [H, F, D + 1]."""
    S = linear.empty_state(phi_k, linear.with_ones(v))
    for k_t, v_t in zip(phi_k.split(1, -2), linear.with_ones(v).split(1, -2), strict=True):
        _, S = retention.recurrent(torch.zeros_like(k_t), k_t, v_t, S, decay=decay)
        yield S


def weights(phi_q: Tensor, phi_k: Tensor, *, decay: Tensor, normalised: bool) -> Tensor:
    """The attention that a state implies: [H, T, T]."""
    made = (phi_q @ phi_k.mT) * retention.decay_mask(decay, phi_q.shape[-2]).to(phi_q)
    return made / made.sum(-1, keepdim=True) if normalised else made


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """What softmax attention would pay with the same queries and keys: [H, T, T]."""
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1)


def disagreement(phi_q: Tensor, phi_k: Tensor, v: Tensor, *, decay: Tensor, chunk: int) -> float:
    """The largest difference between the parallel, the recurrent and the chunked form, of their largest answer."""
    at_once = retention.parallel(phi_q, phi_k, v, decay=decay)
    one_by_one, _ = retention.recurrent(phi_q, phi_k, v, decay=decay)
    by_chunks, _ = retention.chunked(phi_q, phi_k, v, decay=decay, chunk=chunk)
    worst = max(float((at_once - other).abs().max()) for other in (one_by_one, by_chunks))
    return worst / max(float(at_once.abs().max()), 1e-300)


def estimates(x: Tensor, y: Tensor, *, name: str, count: int, orthogonal: bool, draws: int, seed: int = 0) -> Tensor:
    """Raw estimates of exp(x_p · y_p) by the first 1, 2, … `count` features, for so many draws: [draws, count, P].

    x and y are [P, D]. No epsilon is added and no maximum subtracted: either would bias them.
    """
    at_least("draws", draws, 1)
    counts = torch.arange(1, count + 1, dtype=x.dtype)[:, None]
    made = []
    for n in range(draws):
        omega = feature_map(name, x.shape[-1], count=count, orthogonal=orthogonal, seed=seed + n).omega
        assert omega is not None
        product = (FAVOR[name](x, omega) * FAVOR[name](y, omega)).mT * count  # m or 2m, P
        made.append(product.view(-1, count, len(x)).sum(0).cumsum(0) / counts)
    return torch.stack(made)


@dataclass(frozen=True)
class Error:
    """How raw estimates differ from the kernel, over draws and pairs, each relative to the kernel's own value."""

    bias: float  # mean of estimate / kernel - 1
    doubt: float  # the standard error of that mean
    squared: Tensor  # [m] the mean squared relative error by the first 1 … m features
    below: float  # share of estimates below 0


def errors(x: Tensor, y: Tensor, *, name: str, count: int, orthogonal: bool, draws: int, seed: int = 0) -> Error:
    """Bias, error and sign of `estimates`, measured."""
    kernel = softmax_kernel(x[:, None], y[:, None])[:, 0, 0]  # P
    made = estimates(x, y, name=name, count=count, orthogonal=orthogonal, draws=draws, seed=seed)
    off = made / kernel - 1  # draws m P
    means = off[:, -1].mean(-1)  # a draw serves all pairs, so draws are what is independent
    doubt = float(means.std() / draws**0.5) if draws > 1 else float("inf")
    return Error(float(means.mean()), doubt, off.square().mean((0, 2)), float((made[:, -1] < 0).double().mean()))


def seconds(form: str, T: int, *, width: int, heads: int, chunk: int, tries: int = 3) -> float:
    """How long one layer's attention takes here, "softmax" or "chunked": the best of `tries`."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = torch.rand(3, 1, heads, T, width, generator=generator).unbind(0)  # 1 H T D
    runs: dict[str, Callable[[], object]] = {
        "softmax": lambda: attend(q, View(k, v, range(T), causal=True)),
        "chunked": lambda: linear.chunked(q, k, v, chunk=chunk),
    }
    if form not in runs:
        raise ValueError(f"form must be one of {', '.join(runs)}, not {form!r}")
    taken = []
    for _ in range(at_least("tries", tries, 1)):
        began = time.perf_counter()
        runs[form]()
        taken.append(time.perf_counter() - began)
    return min(taken)


def crossover(width: int, *, longest: int = 100_000) -> int:
    """The first length at which the state takes fewer multiplications than the matrix, by counting."""
    for T in range(1, longest):
        counts: Sequence[int] = [linear.multiplications(form, T, width, width) for form in ("recurrent", "softmax")]
        if counts[0] < counts[1]:
            return T
    raise ValueError(f"no crossover below {longest} for a width of {width}")
