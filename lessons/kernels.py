"""What lesson linear measures: how random features close in on softmax's kernel, what each form costs by length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from engine.mixers import forms
from engine.mixers.linear import multiplications
from engine.mixers.performer import positive_error, running_estimates, softmax_kernel
from engine.recording import note, site, tap

LENGTHS = (64, 128, 256, 512, 1024, 2048)  # timed
DRAWS, FEW = 120, 10  # draws of random features; tokens whose kernel is shown
KINDS = {f"{name} {'orthogonal' if o else 'independent'}": (name, o) for name in forms.FAVOR for o in (False, True)}


KERNEL = site("linear.kernel", "the softmax kernel of a few tokens", symbol="exp(q·k/√d)", low=0.0)
ESTIMATE = site("linear.estimate", "the same, as the features drawn so far see it", symbol="φ(q)·φ(k)")
OFF = site("linear.off", "how far the estimate is off, of the kernel's value; 1 and more look alike",
           symbol="estimate/kernel − 1", low=-1.0, high=1.0)  # fmt: skip
ERROR = site("linear.error", "mean squared error of an estimate over draws, of the kernel's value squared")
COUNT = site("linear.count", "multiplications of one head for a text of each length")
LENGTH = site("linear.length", "lengths")
RATIO = site("linear.ratio", "how many times longer softmax took than the matrix, here", unit="×")
RULE = site("linear.rule", "the same by multiplications: n / d", unit="×")


def estimates(q: Any, k: Any, knobs: Any) -> Iterator[None]:
    """Feature by feature: the kernel of a few tokens as estimated, and how wrong each kind of feature is by then."""
    scale = q.shape[-1] ** -0.25 * knobs.sharp
    x, y = q[-FEW:] * scale, k[-FEW:] * scale
    name = knobs.map if knobs.map in forms.FAVOR else "positive"
    omega: Any = forms.feature_map(name, q.shape[-1], count=knobs.features, orthogonal=knobs.orthogonal).omega
    exact = softmax_kernel(x, y).numpy()
    made = running_estimates(x, y, omega, features=forms.FAVOR[name]).numpy()
    pairs = {"count": knobs.features, "draws": DRAWS}
    found = None
    for m in range(knobs.features):
        tap(KERNEL, exact.astype(np.float32), "query key")
        tap(ESTIMATE, made[m].astype(np.float32), "query key")
        tap(OFF, np.clip(made[m] / exact - 1, -1, 1).astype(np.float32), "query key")
        if m:  # the first picture need not wait for the draws
            if found is None:
                found = {kind: forms.errors(x, y, name=n, orthogonal=o, **pairs) for kind, (n, o) in KINDS.items()}
                note(
                    bias={kind: [e.bias, e.doubt] for kind, e in found.items()},
                    squared={kind: float(e.squared[-1]) for kind, e in found.items()},
                    below={kind: e.below for kind, e in found.items()},
                    lemma=float((positive_error(x, y, count=knobs.features) / (x * y).sum(-1).exp() ** 2).mean()),
                )
            for kind, e in found.items():
                tap(ERROR, float(e.squared[m]), "", kind=kind)
        yield


def count_lengths(D: int, chunk: int) -> None:
    """Multiplications by length, for whole texts."""
    lengths = np.unique(np.geomspace(2, 4096, 60).astype(int))
    tap(LENGTH, lengths.astype(np.float32), "text", of="counts")
    for form in ("softmax", "recurrent", "chunked"):
        counts = [multiplications(form, int(n), D, D, chunk=chunk) for n in lengths]
        tap(COUNT, np.array(counts, np.float32), "text", of=form)
    cross = forms.crossover(D)
    tap(LENGTH, float(cross), "", of="crossover")
    tap(COUNT, float(multiplications("softmax", cross, D, D)), "", of="crossover")


def time_length(n: int, D: int, heads: int) -> None:
    took = [forms.seconds(form, n, width=D, heads=heads, chunk=64) for form in ("softmax", "chunked")]
    tap(RATIO, took[0] / took[1], "")
    tap(RULE, n / D, "")
    tap(LENGTH, float(n), "", of="timed")
    note(longest=n, seconds=took)
