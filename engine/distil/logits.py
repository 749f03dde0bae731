r"""Soft labels: learn from all the teacher's probabilities, and with a temperature from its small ones too.

Hinton et al. (arXiv:1503.02531), section 2 and equations 1 to 4. Paper -> here: v = teacher's logits; z = student's;
q_i = exp(z_i/T) / Σ_j exp(z_j/T) = `soft`; T = temperature; α = alpha, the weight of the soft term.

    L = α T² KL(softmax(v/T) ‖ softmax(z/T)) + (1-α) CE(z, the right word)
    ∂/∂z of the soft term, over N rows = T (softmax(z/T) - softmax(v/T)) / N           T² keeps it large as T grows
    T -> ∞: (z - mean z - v + mean v) / (N V), the gradient of half the mean squared difference of centred logits

Shapes: logits [..., V], targets [...] -> terms, each a scalar: the mean over rows (batchmean, not the mean over V).
Errors: ValueError for a temperature that is not above 0, an alpha outside 0..1, shapes that differ.
Deviations: the entropy of the teacher is subtracted (KL, where the paper has cross-entropy): same gradient, and 0 where
student and teacher agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.recording import site, tap

SOFT = site("distil.soft", "the likeliest words' probabilities at each temperature", symbol="softmax(z/T)",
            low=0.0, high=1.0)  # fmt: skip
WORDS = site("distil.words", "ids of these words, likeliest first")
ENTROPY = site("distil.entropy", "how undecided the answer is at each temperature", symbol="H", low=0.0, unit="nats")


@dataclass(frozen=True)
class Terms:
    """The loss and what it is made of. `soft` has T² in it; neither is weighed by alpha."""

    total: Tensor
    soft: Tensor
    hard: Tensor


def soft(logits: Tensor, *, temperature: float) -> Tensor:
    """softmax(z/T)."""
    _check_temperature(temperature)
    return (logits / temperature).softmax(-1)


def divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher ‖ student), both at T, the mean over rows."""
    _check_temperature(temperature)
    if student.shape != teacher.shape or not student.numel():
        raise ValueError(f"student and teacher must have one shape, not {list(student.shape)}, {list(teacher.shape)}")
    q = (student / temperature).log_softmax(-1).flatten(0, -2)  # N V
    p = (teacher.detach() / temperature).log_softmax(-1).flatten(0, -2)  # N V
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def loss(student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float = 2.0, alpha: float = 0.5) -> Terms:
    """α T² KL + (1-α) CE, and both terms."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, not {alpha}")
    if targets.shape != student.shape[:-1]:
        raise ValueError(f"targets must have shape {list(student.shape[:-1])}, not {list(targets.shape)}")
    kl = divergence(student, teacher, temperature=temperature)
    ce = F.cross_entropy(student.flatten(0, -2), targets.flatten())
    return Terms(alpha * kl + (1 - alpha) * ce, kl, ce)


def gradient(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """∂ divergence / ∂ student in closed form: T (softmax(z/T) - softmax(v/T)) / N."""
    rows = student[..., 0].numel()
    difference = soft(student, temperature=temperature) - soft(teacher, temperature=temperature)
    return temperature * difference / rows


def gradient_at_infinity(student: Tensor, teacher: Tensor) -> Tensor:
    """What `gradient` becomes as T grows: the centred logits' difference over N V."""
    difference = student - teacher
    return (difference - difference.mean(-1, keepdim=True)) / student.numel()


def soften(
    logits: Tensor, *, temperatures: Sequence[float], top: int = 12, words: Tensor | None = None, **index: int | str
) -> Tensor:
    """One position's distribution [V] at each temperature, of `words` (the `top` likeliest if none are given): tapped
    and returned [T, top]."""
    if logits.dim() != 1 or not 1 <= top <= len(logits):
        raise ValueError(f"logits must have shape [V] with top={top} words at least, not {list(logits.shape)}")
    if not temperatures:
        raise ValueError("temperatures must hold one at least, not none")
    words = logits.topk(top).indices if words is None else words
    whole = torch.stack([soft(logits.double(), temperature=t) for t in temperatures])  # T V
    tap(WORDS, words, "word", **index)
    tap(ENTROPY, -(whole * whole.clamp(min=1e-300).log()).sum(-1), "temperature", **index)
    return tap(SOFT, whole[:, words], "temperature word", **index)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a number above 0, not {temperature}")
